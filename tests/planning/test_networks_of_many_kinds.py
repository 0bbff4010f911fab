"""Networks of kinds that only some people write: learning rates of Adam and SGD by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.residual_networks import Block, Net, in_a_row, stream
from torch import Tensor, nn
from torch.nn import functional as F

from mlu_lightning import Plan

BATCH = torch.arange(15.0).sin().reshape(5, 3)


class Kernel(nn.Module):  # of each channel, computed from complex numbers: a diagonal state space
    def __init__(self, width: int) -> None:
        super().__init__()
        self.states, self.decay = nn.Parameter(torch.randn(width, 2, 2)), nn.Parameter(torch.rand(width, 2))
        self.write = nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        powers = ((1j * torch.pi - self.decay)[..., None] * torch.arange(5)).exp()
        states = torch.view_as_complex(self.states) * (powers[..., 1] - 1) / self.decay
        kernel = torch.einsum("dn,dnt->dt", states, powers).real
        mixed: Tensor = torch.fft.irfft(torch.fft.rfft(h.T, 10) * torch.fft.rfft(kernel, 10), 10)
        return self.write(F.gelu(mixed[..., :5].T))


def diffusion(net: Any, x: Tensor) -> Any:  # the time is embedded by sinusoids of as many entries as the stream has
    angles = x[:, :1] * torch.arange(net.time.in_features // 2)
    h = net.embed(x) + net.time(torch.cat([angles.sin(), angles.cos()], -1))
    return net.out(h + net.blocks[0](h))


def variational(net: Any, x: Tensor) -> Any:
    h = stream(net, x)
    mean, log_variance = net.out(h), net.spread(h)
    latents = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
    return F.mse_loss(net.other(latents), x) + (mean.square() + log_variance.exp() - log_variance).mean()


def adversarial(net: Any, x: Tensor) -> Any:
    fake = net.other(x[:, :2])
    against = in_a_row(net, fake.detach()).mean() - in_a_row(net, x).mean()  # of which one term depends on no data
    return against, -in_a_row(net, fake)


def policy(net: Any, x: Tensor) -> Any:
    return torch.distributions.Normal(in_a_row(net, x), net.log_std.exp()).log_prob(x[:, :2]).mean()


def equation(net: Any, x: Tensor) -> Any:  # with derivatives of outputs by inputs, twice
    first = torch.autograd.grad(in_a_row(net, x).sum(), x, create_graph=True)[0]
    return torch.autograd.grad(first[:, 0].sum(), x, create_graph=True)[0].square().mean()


def state_space(net: Any, x: Tensor) -> Any:
    h = net.embed(x)
    return net.out(h + net.kernel(h))


# n and 1/g of parameters, at ratios to the base of depth l, hidden width m and stream d
KINDS: dict[Callable[[Any, Tensor], Any], str] = {
    diffusion: "time.weight d d, embed.weight 1 d, out.weight 1 d",
    variational: "out.weight d 1, spread.weight d 1, spread.bias 1 1, other.embed.weight 1 d",
    adversarial: "embed.weight 1 d, embed.bias 1 d, other.out.weight d 1, out.weight 1 d",
    policy: "log_std 1 1, out.weight 1 d, out.bias 1 1",
    equation: "blocks.0.read.weight d l*m, blocks.0.write.weight m l*d, out.weight 1 d",
    state_space: "kernel.states 1 d, kernel.decay 1 d, kernel.write.weight d d",
}


def built(forward: Any, depth: int, hidden: int, width: int, ends: tuple[int, int] = (3, 2), **parts: Any) -> Net:
    blocks = nn.ModuleList(Block(width, hidden=hidden) for _ in range(depth))
    return Net(forward, embed=nn.Linear(ends[0], width), out=nn.Linear(width, ends[1]), blocks=blocks, **parts)


@pytest.mark.parametrize("forward", KINDS)
def test_learning_rates(forward: Callable[[Any, Tensor], Any]) -> None:
    def whole(*shape: int) -> Net:
        width = shape[-1]
        parts = {"time": nn.Linear(width, width), "spread": nn.Linear(width, 2), "kernel": Kernel(width)}
        log_std = nn.Parameter(torch.zeros(2))
        return built(forward, *shape, other=built(None, *shape, ends=(2, 3)), log_std=log_std, **parts)

    plan = Plan.from_model(whole(2 * 3, 2 * 5, 4 * 7), BATCH, base=whole(2, 2, 4))
    for name, *powers in map(str.split, KINDS[forward].split(",")):
        n, inverse_g = (eval(power, {"l": 3, "m": 5, "d": 7}) for power in powers)
        found = plan.scales("adamw")[name].lr, plan.scales("sgd")[name].lr
        assert found == pytest.approx((1 / n, inverse_g / n)), name
