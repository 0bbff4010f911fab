"""MLUCallback at every precision of Lightning's Trainer: std, multipliers, and the run with numbers by hand."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers.callback_runs import InConfigureModel, Net, fit, loader
from helpers.watched_runs import Weights
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn, optim

from mlu_lightning import MLUCallback, Plan

# depth, heads and embedding are 5/3, 3 and 3 times the base's: multiplying by these rounds, as by powers of two it does not
BASE = {"depth": 3, "hidden": 10, "embedding": 6}
WIDE = {"depth": 5, "hidden": 30, "embedding": 18}

# The rows of theory.md, section 3, written out: multiplier, std, and AdamW's lr and eps; its decay is 1/lr.
ROWS = {
    "embed.weight": (1.0, 1.0, 1.0, 1 / 3),
    "embed.bias": (1.0, 1.0, 1.0, 1 / 3),
    "read.weight": (1.0, 3**-0.5, 1 / 3, 1 / 5),
    "write.weight": (3 / 5, 3**-0.5, 1 / 3, 1 / 5),
    "readout.weight": (1 / 3, 1.0, 1.0, 1 / 3),
    "readout.bias": (1.0, 1.0, 1.0, 1.0),
}
LR, EPS, DECAY = 0.02, 1e-3, 0.1


class ByHand(Net):
    """Multiplies in its own forward, or not, where its weights are multiplied; each parameter has its own group."""

    folded = False

    def forward(self, x: Tensor) -> Tensor:
        if self.folded:
            return super().forward(x)
        stream = self.embed(x)
        for block in self.blocks:
            stream = stream + block(stream) * (3 / 5)
        return self.readout(stream * (1 / 3))

    def groups(self) -> Iterator[dict[str, Any]]:
        for name, parameter in self.named_parameters():
            multiplier, _, lr, eps = ROWS[".".join(name.split(".")[-2:])]
            a = multiplier if self.folded else 1.0
            yield {"params": [parameter], "lr": LR * lr * a, "eps": EPS * eps / a, "weight_decay": DECAY / (lr * a)}


class Master(optim.Optimizer):  # AdamW on float32 copies of its parameters, which it keeps in its state
    def __init__(self, parameters: Any, lr: float = LR, eps: float = EPS, weight_decay: float = DECAY) -> None:
        super().__init__(parameters, {"lr": lr, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["copy"] = nn.Parameter(parameter.float())
                    state["adamw"] = optim.AdamW([state["copy"]])
                state["adamw"].param_groups[0].update({key: group[key] for key in ("lr", "eps", "weight_decay")})
                state["copy"].grad = parameter.grad.float()
                state["adamw"].step()
                parameter.copy_(state["copy"])
        return loss


class CopiesInGroups(optim.AdamW):  # the other way to keep float32 copies
    def __init__(self, parameters: Any) -> None:
        super().__init__([nn.Parameter(parameter.float()) for parameter in parameters])


def adamw(parameters: Any) -> optim.Optimizer:
    return optim.AdamW(parameters, lr=LR, eps=EPS, weight_decay=DECAY)


def scaled_gradients() -> dict[str, Any]:
    """Overflows in the first steps, which are left out."""
    return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**22))]}


def base_of(std: float) -> Net:
    base = Net(**BASE).double()
    for parameter in base.parameters():
        parameter.data.mul_(std / parameter.data.square().mean().sqrt())
    return base


def rms(weights: dict[str, Tensor], ends: str) -> float:
    entries = torch.cat([weight.flatten().double() for name, weight in weights.items() if name.endswith(ends)])
    return float(entries.square().mean().sqrt())


PRECISIONS = ["32-true", "64-true", "bf16-true", "16-true", "bf16-mixed", "16-mixed"]
CASES = [
    *((Net, precision, adamw) for precision in PRECISIONS),
    # made at the precision, while Net is converted to it after its initialization
    *((InConfigureModel, precision, adamw) for precision in PRECISIONS if precision.endswith("true")),
    (Net, "bf16-true", Master),
    (Net, "bf16-mixed", Master),
]


@pytest.mark.parametrize("residual", ["hook", "fold"])
@pytest.mark.parametrize(("make", "precision", "optimizer"), CASES)
def test_std_and_run_are_those_of_numbers_by_hand(make: Any, precision: str, optimizer: Any, residual: Any) -> None:
    def settings() -> dict[str, Any]:
        return scaled_gradients() if precision == "16-mixed" else {"precision": precision}

    start, base = Weights(), base_of(0.25)
    ours = make(**WIDE, optimizers=lambda module: optimizer(module.parameters()))
    family = "adamw" if optimizer is Master else None
    run = fit(ours, MLUCallback(base, residual=residual, family=family), start, **settings())
    dtypes = {"64-true": torch.float64, "bf16-true": torch.bfloat16, "16-true": torch.float16}
    dtype = dtypes.get(precision, torch.float32)
    assert {parameter.dtype for parameter in ours.parameters()} == {dtype}
    # a mean over rounded numbers; Net is multiplied in float32 and converted then, also to float64
    rounding = torch.finfo(dtype if make is InConfigureModel or dtype.itemsize == 2 else torch.float32).eps
    for name, (multiplier, std, *_) in ROWS.items():
        expected = 0.25 * std * (multiplier if residual == "fold" else 1)
        assert rms(start.at[0], name) == pytest.approx(expected, rel=rounding), name
    theirs = ByHand(**WIDE, optimizers=lambda module: optimizer(module.groups())).to(dtype)
    theirs.folded = residual == "fold"
    theirs.load_state_dict(start.at[0])
    fit(theirs, **settings())
    # 1/3 of a number and a third of it
    tolerance = {"rtol": 1e-12, "atol": 1e-14} if precision == "64-true" else {"rtol": 0.0, "atol": 0.0}
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), parameter, **tolerance)
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-12)
    if precision == "16-mixed":
        steps = {int(state["step"]) for state in run.optimizers[0].state.values()}
        assert steps < {*range(1, len(ours.losses))}, "some steps were left out, because gradients overflowed"


def test_copies_in_float32_have_to_be_in_the_state_of_an_optimizer() -> None:
    module = Net(**WIDE, optimizers=lambda module: CopiesInGroups(module.parameters()))
    message = r"not a parameter of the module.*float32 copies.*in its state, not in its groups"
    with pytest.raises(ValueError, match=message):
        fit(module, MLUCallback(Net(**BASE)), precision="bf16-true")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_plan_does_not_depend_on_precision(dtype: torch.dtype) -> None:
    example, base = next(iter(loader())), base_of(0.25)
    plan = Plan.from_model(Net(**WIDE), example, base=base)
    assert Plan.from_model(Net(**WIDE).to(dtype), example, base=base) == plan
    batch = tuple(tensor.to(dtype) for tensor in example)
    assert Plan.from_model(Net(**WIDE), batch, base=base) == plan
