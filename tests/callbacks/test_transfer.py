"""What the table is for: after a few steps every role has moved the logits equally far, at every shape."""

import copy
from functools import cache, partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mlu_lightning import Plan, attach_multipliers, initialize, scale_optimizer
from mlu_lightning.models import CausalTransformer

BASE = {"depth": 2, "heads": 4, "embedding": 64}
SHAPES = {
    "deeper": {"depth": 8, "heads": 4, "embedding": 64},
    "wider": {"depth": 2, "heads": 16, "embedding": 64},
    "wider stream": {"depth": 2, "heads": 4, "embedding": 256},
    "bigger": {"depth": 6, "heads": 8, "embedding": 128},
}
# small steps, so that a change is about proportional to its learning rate
OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=3e-2),
    "adamw": partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.0),
    "muon": partial(torch.optim.Muon, lr=1e-2, weight_decay=0.0),
}
ROLES = ("embedding", "branch_in", "branch_out", "branch_norm", "stream_norm", "readout")
MATRICES = ("branch_in", "branch_out")


@cache
def _built(shape: str | None) -> tuple[CausalTransformer, Plan, Tensor]:
    """A module of a shape, its plan, and tokens."""
    tokens = torch.randint(32, (4, 17), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    base = CausalTransformer(32, 16, head_dim=8, **BASE)
    module = CausalTransformer(32, 16, head_dim=8, **(BASE if shape is None else SHAPES[shape]))
    return module, Plan.from_model(module, tokens, base=base), tokens


@cache
def _moved(family: str, role: str, shape: str | None, scaled: bool) -> float:
    """Root mean square by which the logits change in five steps of the parameters of one role alone."""
    built, plan, tokens = _built(shape)
    module, (inputs, targets) = copy.deepcopy(built), (tokens[:, :-1], tokens[:, 1:].flatten())
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(plan.roles[name] == role)
    optimizer = OPTIMIZERS[family]([parameter for parameter in module.parameters() if parameter.requires_grad])
    if scaled:
        attach_multipliers(initialize(module, plan, "normal", seed=0), plan)
        scale_optimizer(optimizer, module, plan)
    before = module(inputs).detach()
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(module(inputs).flatten(0, 1), targets).backward()
        optimizer.step()
    return float((module(inputs).detach() - before).square().mean().sqrt())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("family", "role"),
    [(family, role) for family in OPTIMIZERS for role in ROLES if family != "muon" or role in MATRICES],
)
def test_every_role_moves_the_logits_equally_far_at_every_shape(family: str, role: str, shape: str) -> None:
    ratio = _moved(family, role, shape, scaled=True) / _moved(family, role, None, scaled=True)
    # gains act through the initial random matrices after them, and that part of a branch falls as sqrt(D/M)
    least = 0 if role in ("branch_norm", "stream_norm") else 1 / 2
    assert least < ratio < 2, f"{ratio:.2f} times as far as at the base shape"


@pytest.mark.parametrize(
    ("role", "shape"), [("branch_in", "wider stream"), ("branch_out", "wider"), ("branch_out", "deeper")]
)
def test_without_the_plan_they_do_not(role: str, shape: str) -> None:
    ratio = _moved("adamw", role, shape, scaled=False) / _moved("adamw", role, None, scaled=False)
    assert not 1 / 2 < ratio < 2, f"{ratio:.2f}: the measurement cannot tell the parameterizations apart"
