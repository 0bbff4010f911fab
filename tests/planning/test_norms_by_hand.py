"""Norms that modules write by hand: entries of order one need nothing, vectors of length one are 1/sqrt(D) each."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mlu_lightning import Plan

X = torch.linspace(-1, 1, 60).reshape(4, 5, 3)
# of the stream, a gain and sqrt(D), and the size of what it makes as a power of D
NORMS: dict[str, tuple[Callable[[Tensor, Tensor, float], Tensor], float]] = {
    "gain last": (lambda x, g, root: F.normalize(x, dim=-1) * root * g, 0),
    "gain first": (lambda x, g, root: F.normalize(x, dim=-1) * g * root, 0),
    "clamped": (lambda x, g, root: x / x.norm(dim=-1, keepdim=True).clamp(min=1e-6) * g * root, 0),
    "of squares": (lambda x, g, root: x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) * root * g, 0),
    "mean": (lambda x, g, root: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * g, 0),
    "scaled size": (lambda x, g, root: x / (x.norm(dim=-1, keepdim=True) / root + 1e-8) * g, 0),
    "channels": (lambda x, g, root: (F.normalize(x.mT, dim=1) * g[:, None] * root).mT, 0),
    "length one": (lambda x, g, root: F.normalize(x, dim=-1) * g, -0.5),
}


class Normed(nn.Module):
    def __init__(self, form: str, width: int, depth: int = 2) -> None:
        super().__init__()
        self.form, self.embed, self.out = form, nn.Linear(3, width), nn.Linear(width, 2)
        self.gains = nn.ParameterList(torch.ones(width) for _ in range(2 * depth))
        self.read = nn.ModuleList(nn.Linear(width, 16) for _ in range(depth))
        self.write = nn.ModuleList(nn.Linear(16, width) for _ in range(depth))

    def norm(self, x: Tensor, i: int) -> Tensor:
        return NORMS[self.form][0](x, self.gains[i], x.shape[-1] ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.embed(x)
        for i, (read, write) in enumerate(zip(self.read, self.write, strict=True)):
            h = h + self.norm(write(torch.tanh(read(self.norm(h, 2 * i)))), 2 * i + 1)
        return torch.as_tensor(self.out(h))


@pytest.mark.parametrize("form", NORMS)
def test_constants_are_those_of_the_entries_that_a_norm_makes(form: str) -> None:
    size = 4 ** NORMS[form][1]  # next to the base, at four times its width
    plan = Plan.from_model(Normed(form, 32), X, base=Normed(form, 8))
    assert [m.value for m in plan.multipliers if m.kind == "branch"] == pytest.approx([1 / size] * 2)
    read = plan.scales("adamw")["read.0.weight"]
    assert (read.std, read.lr) == pytest.approx((0.5 / size, 0.25 / size))
