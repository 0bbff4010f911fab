"""An error at any line of what applies a plan: the next fit is that of a module without it, or refuses the module."""

import random
from typing import Any

import pytest
import torch
from helpers.faulty_runs import own_hooks
from helpers.interruptions import Injection, Line
from helpers.runs_by_hand import BASE, Net
from helpers.trainers import quiet
from torch import optim
from torch.optim.optimizer import _global_optimizer_pre_hooks

from mlu_lightning.callbacks import MLUCallback
from mlu_lightning.planning.plan import Plan

PARTS = ["application/", "callbacks/"]
ERRORS = KeyboardInterrupt, RuntimeError
STEPS = 2
MOST = 40  # of the times that a line is reached; later ones are those of the training's steps
Weights = dict[str, torch.Tensor]


class Kept(Net):  # has one optimizer in all of its fits, without a state, and says with which weights they begin
    def __init__(self) -> None:
        super().__init__((3, 6, 12))  # factors that are no powers of two
        self.kept = optim.SGD(self.parameters(), lr=0.1)
        self.begun: list[Weights] = []
        self.after_steps: list[Weights] = []

    def configure_optimizers(self) -> Any:
        return self.kept

    def on_train_start(self) -> None:
        self.begun.append(weights(self))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.after_steps.append(weights(self))


def weights(module: Kept) -> Weights:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def same(one: Weights, other: Weights) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


class Runs:  # of one kind, and what comes after each of their steps without an error
    def __init__(self, residual: Any, init: Any) -> None:
        self.plan = Plan.from_model(Kept(), next(iter(Kept().train_dataloader())), base=Net(BASE))
        self.arguments: dict[str, Any] = {"plan": self.plan, "residual": residual, "init": init}
        module = Kept()
        counted = Injection(PARTS)
        assert counted.run(lambda: self.fit(module)) is None
        self.counts = counted.counts
        self.hooks = own_hooks(module)
        # what a fit makes of the weights that another had after so many steps
        self.starts = [module.begun[0], *module.after_steps]
        self.ends = []
        for steps in range(STEPS + 1):
            begun = Kept()
            self.fit(begun, max_steps=steps)
            self.fit(begun)
            self.ends.append(weights(begun))

    def fit(self, module: Kept, max_steps: int = STEPS) -> None:
        quiet(MLUCallback(**self.arguments), max_steps=max_steps, gradient_clip_val=0.1, limit_val_batches=0).fit(
            module
        )

    def points(self) -> list[tuple[Line, int]]:
        """Each of the first times that each line is reached, which are those of the application, and the last."""
        return [(line, time) for line, n in self.counts.items() for time in sorted({*range(1, min(n, MOST) + 1), n})]

    def check(self, point: tuple[Line, int], error: type[BaseException]) -> str:
        """Interrupt a fit, and let another come; whether it was that of an undisturbed module, or refused."""
        module, others = Kept(), dict(_global_optimizer_pre_hooks)  # those of fits of other modules, in other tests
        injection = Injection(PARTS, point, error("planted"))
        raised = injection.run(lambda: self.fit(module))
        assert injection.happened and isinstance(raised, (error, SystemExit)), raised
        begun = len(module.begun)
        try:
            self.fit(module)
        except ValueError as refusal:
            assert "was interrupted" in str(refusal) or "changed before the first step" in str(refusal), refusal
            return "refused"
        start = next(i for i, start in enumerate(self.starts) if same(start, module.begun[begun]))
        assert same(self.ends[start], weights(module))
        assert own_hooks(module) == self.hooks
        assert {name for name in vars(module) if name.startswith("_mlu")} == {"_mlu_applied"}
        assert not {"configure_optimizers", "on_load_checkpoint", "clip_gradients"} & vars(module).keys()
        assert not {"step"} & vars(module.kept).keys() and not module.kept._optimizer_state_dict_pre_hooks
        assert _global_optimizer_pre_hooks.keys() <= others.keys()
        return "repaired"


KINDS = [("fold", None), ("hook", "rescale"), ("fold", "normal"), ("hook", "coupled")]


def tell(runs: Runs, points: list[tuple[Line, int]], errors: Any = ERRORS) -> dict[str, int]:
    outcomes: dict[str, int] = {"repaired": 0, "refused": 0}
    wrong = []
    for point in points:
        for error in errors:
            try:
                outcomes[runs.check(point, error)] += 1
            except Exception as failure:  # every kind of it is counted
                wrong.append((point, error.__name__, f"{type(failure).__name__}: {str(failure)[:150]}"))
    print(f"\n{sum(outcomes.values())} interruptions: {outcomes}, wrong: {len(wrong)}")
    assert not wrong, wrong[:40]
    return outcomes


def test_interruptions_at_some_lines() -> None:
    runs = Runs("fold", None)
    points, draw = runs.points(), random.Random(0)
    writing = [point for point in points if point[0][0].endswith("transaction.py")]
    tell(runs, draw.sample(writing, 30) + draw.sample(points, 20), (KeyboardInterrupt,))


@pytest.mark.slow
@pytest.mark.parametrize(("residual", "init"), KINDS)
def test_interruptions_at_every_line(residual: str, init: Any) -> None:
    runs = Runs(residual, init)
    tell(runs, runs.points())
