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
def _built(shape: str | None, seed: int) -> tuple[CausalTransformer, Plan, Tensor]:
    """A module of a shape, its plan, and tokens."""
    tokens = torch.randint(32, (8, 17), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(seed)
    base = CausalTransformer(32, 16, head_dim=8, **BASE)
    module = CausalTransformer(32, 16, head_dim=8, **(BASE if shape is None else SHAPES[shape]))
    return module, Plan.from_model(module, tokens, base=base), tokens


@cache
def _moved(family: str, role: str, shape: str | None, scaled: bool) -> float:
    """Root mean square by which the logits change in five steps of the parameters of one role alone."""
    changes = []
    for seed in (0, 1):
        built, plan, tokens = _built(shape, seed)
        module = copy.deepcopy(built)
        parameters = [parameter for name, parameter in module.named_parameters() if plan.roles[name] == role]
        optimizer = OPTIMIZERS[family](parameters)
        if scaled:
            initialize(module, plan, "normal", seed=seed)
            attach_multipliers(module, plan)
            scale_optimizer(optimizer, module, plan)
        before = module(tokens[:, :-1]).detach()
        for _ in range(5):
            loss = F.cross_entropy(module(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        changes.append((module(tokens[:, :-1]).detach() - before).square().mean().sqrt().item())
    return sum(changes) / len(changes)


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
