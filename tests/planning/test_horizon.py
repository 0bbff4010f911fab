"""Batch size and duration: Complete(d)P's formulas, written out; what they are for; and what is refused."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.parameter_groups import ADAM_LR, EPS, Weights, groups_in_update, identical, numbers_in_update, plan_of
from helpers.trainers import quiet
from lightning.pytorch import LightningModule
from torch import Tensor, optim
from torch.utils.data import DataLoader

from mlu_lightning import MLUCallback, Plan, scale_optimizer
from mlu_lightning.models import ResNet
from mlu_lightning.planning.horizon import Horizon

# batch and tokens over those of the base, and s = sqrt(batch/tokens) by hand
RATIOS = [(4.0, 1.0, 2.0), (1.0, 16.0, 0.25), (2.0, 8.0, 0.5), (3.0, 3.0, 1.0)]


def _scaled(optimizer: Any, module: Weights, *ratios: float, identity: bool = False, family: Any = None) -> list[Any]:
    seen = groups_in_update(optimizer)
    scale_optimizer(optimizer, module, replace(plan_of(module, identity), horizon=Horizon(*ratios)), family)
    return seen


@pytest.mark.parametrize(("batch", "tokens", "s"), RATIOS)
@pytest.mark.parametrize("identity", [True, False])
def test_numbers_of_adamw(batch: float, tokens: float, s: float, identity: bool) -> None:
    """Complete(d)P, arXiv 2512.22382: lr·s, eps/s, decay·s, (1 - β)·s², together with the factors of the shape."""
    module = Weights()
    optimizer = optim.AdamW(module.parameters(), lr=0.25, betas=(0.875, 0.96875), eps=0.5, weight_decay=0.125)
    seen = _scaled(optimizer, module, batch, tokens, identity=identity)
    module.load_gradients(0)
    optimizer.step()
    shape = dict.fromkeys(ADAM_LR, 1.0) if identity else ADAM_LR
    accuracy = dict.fromkeys(EPS, 1.0) if identity else EPS
    expected = {
        "lr": {name: 0.25 * s * shape[name] for name in shape},
        "eps": {name: 0.5 / s * accuracy[name] for name in shape},
        "weight_decay": {name: 0.125 * s / shape[name] for name in shape},
        "betas": dict.fromkeys(shape, (1 - 0.125 * s**2, 1 - 0.03125 * s**2)),
    }
    assert {key: numbers_in_update(module, seen[0], key) for key in expected} == expected
    assert optimizer.param_groups[0]["betas"] == (0.875, 0.96875)


def test_betas_of_a_schedule_are_taken_over() -> None:
    module = Weights()
    optimizer = optim.AdamW(module.parameters(), lr=0.1, betas=(0.9, 0.99))
    seen = _scaled(optimizer, module, 2.0, 1.0)
    schedule = optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=6)  # cycles the first beta
    wanted, found = [], []
    for step in range(6):
        wanted.append(1 - 2 * (1 - optimizer.param_groups[0]["betas"][0]))
        module.load_gradients(step)
        optimizer.step()
        schedule.step()
        found.append({group["betas"][0] for group in seen[-1]})
    assert found == [{beta} for beta in wanted] and len(set(wanted)) > 3


def test_gathered_noise_stays_the_base_s() -> None:
    """What the rules are for: a weight that AdamW moves by noise alone goes as far, whatever the batch and duration.

    The noise's variance falls with the batch; steps are small, as is what is left; 4,000 weights are exact to 1 %.
    """
    ends = {}
    for batch, tokens in ((1.0, 1.0), (4.0, 1.0), (1.0, 4.0), (4.0, 2.0)):
        generator = torch.Generator().manual_seed(0)
        module = Weights(("norm",))
        module.norm = torch.nn.Parameter(torch.zeros(4000))
        optimizer = optim.AdamW(module.parameters(), lr=0.01, betas=(0.98, 0.98), weight_decay=1.0)
        _scaled(optimizer, module, batch, tokens, identity=True)
        for _ in range(int(800 * tokens / batch)):
            module.norm.grad = torch.randn(4000, generator=generator) / batch**0.5
            optimizer.step()
        ends[batch, tokens] = module.norm.detach().square().mean().sqrt().item()
    first = ends.pop((1.0, 1.0))
    assert {ratios: end / first for ratios, end in ends.items()} == pytest.approx(dict.fromkeys(ends, 1.0), rel=0.06)


class Momentum(optim.Optimizer):  # an optimizer of somebody else's, with betas
    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1, "betas": (0.9, 0.9)})

    def step(self, closure: Any = None) -> None: ...


TOO_LARGE = r"beta 0\.8 would become -0\.6: .* is 8.* less than 5 times"


@pytest.mark.parametrize(
    ("build", "family", "message"),
    [
        (lambda p: optim.AdamW(p, betas=(0.9, 0.8)), None, TOO_LARGE),
        (lambda p: optim.SGD(p, lr=0.1), None, "no rules for them in the sgd family.*or use AdamW"),
        (lambda p: optim.Adam(p, weight_decay=0.1), None, r"decay of this optimizer, 0\.1, is added to the gradient"),
        *((make, None, "not given by betas alone") for make in (optim.RMSprop, optim.NAdam, optim.Adafactor)),
        (Momentum, "sgd", "no rules for them in the sgd family"),
        (Momentum, "muon", "no rules for them in the muon family"),
    ],
)
def test_what_has_no_rule_is_refused(build: Callable[..., Any], family: str | None, message: str) -> None:
    module = Weights()
    optimizer = build(module.parameters())
    before = [{**group} for group in optimizer.param_groups]
    with pytest.raises(ValueError, match=message):
        _scaled(optimizer, module, 8.0, 1.0, family=family)
    assert [{**group} for group in optimizer.param_groups] == before
    _scaled(optimizer, module, 8.0, 8.0, family=None if family is None else "adamw")


def test_averages_that_would_forget_nothing_are_refused() -> None:
    module = Weights()
    with pytest.raises(ValueError, match=r"beta 0\.999 would become 1, up to rounding: .* is 1e-16"):
        _scaled(optim.AdamW(module.parameters()), module, 1e-16, 1.0)


def test_an_optimizer_of_a_named_family_with_betas() -> None:
    module = Weights()
    optimizer = Momentum(module.parameters())
    seen = _scaled(optimizer, module, 2.0, 1.0, family="adamw")
    optimizer.step()
    assert {group["betas"] for group in seen[0]} == {(1 - 2 * (1 - 0.9),) * 2}


@pytest.mark.parametrize("ratio", [0.0, -1.0, float("nan"), float("inf")])
def test_ratios_that_are_none(ratio: float) -> None:
    with pytest.raises(ValueError, match=r"token_ratio is .*it has to be a positive number"):
        Horizon(1.0, ratio)


class Regression(ResNet):  # a small network trained by AdamW
    def configure_optimizers(self) -> optim.Optimizer:
        return optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.0, eps=1e-30, betas=self.betas)


def test_in_a_trainer_and_in_files(tmp_path: Any) -> None:
    samples = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))
    data: DataLoader[list[Tensor]] = DataLoader([(x, x[:2]) for x in samples], batch_size=4)

    def fitted(module: LightningModule, *callbacks: MLUCallback) -> LightningModule:
        quiet(*callbacks, max_epochs=1).fit(module, data)
        return module

    def built(lr: float = 0.01, betas: tuple[float, float] = (0.9, 0.95)) -> Regression:
        torch.manual_seed(0)
        module = Regression(depth=2, hidden=8, embedding=6, inputs=3, outputs=2, lr=lr)
        module.betas = betas
        return module

    callback = MLUCallback(built(), batch_ratio=2.0, token_ratio=0.5)
    ours = fitted(built(), callback)
    by_hand = fitted(built(lr=0.02, betas=(1 - 4 * (1 - 0.9), 1 - 4 * (1 - 0.95))))
    assert identical(ours, by_hand)
    plan = callback.plan
    assert plan is not None and "batch 2 and tokens 0.5 times the base's: 1 - beta is multiplied by 4" in str(plan)
    plan.save(tmp_path / "plan.yaml")
    assert Plan.load(tmp_path / "plan.yaml") == plan
    assert identical(fitted(built(), MLUCallback(plan=plan)), by_hand)
    with pytest.raises(ValueError, match=r"cannot be given together with .*batch_ratio"):
        MLUCallback(plan=plan, batch_ratio=2.0)
