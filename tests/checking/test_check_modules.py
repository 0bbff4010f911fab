"""Checks of modules as people write them: numbered layers, parameters of their own, hooks that build, data of any kind."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, cast

import pytest
import torch
from helpers.check_runs import CONTEXT, few, tokens, transformer
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, RichModelSummary, TQDMProgressBar
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from mlu_lightning import CheckReport, MLUCallback, Plan, Role, Shape
from mlu_lightning.checking.measurement import measure
from mlu_lightning.checking.verdicts import Point, fit_row
from recipes.check.plan_faults import Fault, FaultyCallback

FEATURES = 6
PLAIN = Shape(depth=2, hidden=16, embedding=8)
QUICK: dict[str, Any] = {"factors": (1, 2), "seeds": 1, "steps": 2}


def points(count: int = 12, samples: int = 16) -> list[tuple[Tensor, Tensor]]:
    draws = torch.Generator().manual_seed(0)
    inputs = [torch.randn(samples, FEATURES, generator=draws) for _ in range(count)]
    return [(x, (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()) for x in inputs]


def samples() -> TensorDataset:
    return TensorDataset(*map(torch.cat, zip(*points(), strict=True)))


class Layers(LightningModule):
    """A perceptron whose blocks are ``nn.Sequential``, so that all of its matrices have numbers for names."""

    def __init__(self, depth: int, hidden: int, embedding: int) -> None:
        super().__init__()
        linear, norm = partial(nn.Linear, bias=False), partial(nn.LayerNorm, embedding, bias=False)
        self.first, self.norm, self.last = linear(FEATURES, embedding), norm(), linear(embedding, 4)
        blocks = ((norm(), linear(embedding, hidden), nn.GELU(), linear(hidden, embedding)) for _ in range(depth))
        self.blocks = nn.ModuleList(nn.Sequential(*block) for block in blocks)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        stream = self.first(batch[0])
        for block in self.blocks:
            stream = stream + block(stream)
        return F.cross_entropy(self.last(self.norm(stream)), batch[1])

    def configure_optimizers(self) -> Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3, weight_decay=0.1)


def layers(build: Callable[..., LightningModule] = Layers, **settings: Any) -> CheckReport:
    return few(**{"build": build, "base": PLAIN, "data": points(), "axes": ["depth"], "seeds": 2} | settings)


@cache
def plain(**settings: Any) -> dict[str, float]:
    return _values(layers(**settings))


FAULTS = {"embedding": [Fault(Role.BRANCH_NORM, "lr"), Fault(Role.BRANCH_IN, "weight_decay")]}
FAULTS["depth"] = [Fault(Role.BRANCH_OUT, "multiplier")]


@pytest.mark.parametrize(("axis", "fault"), [(axis, fault) for axis, faults in FAULTS.items() for fault in faults])
def test_layers_with_numbers_for_names_are_told_apart(axis: str, fault: Fault) -> None:
    report = layers(axes=[axis], seeds=3, callbacks=lambda base: [FaultyCallback(fault, base)])
    assert (report.verdict, report.causes[0].role) == ("fail", fault.role.value), report
    rows = {(row.quantity.name, row.quantity.role) for row in report.rows if row.quantity.kind == "update"}
    assert {role for name, role in rows if name == "blocks.*.*.weight"} == {"branch_norm", "branch_in", "branch_out"}


class Flat(nn.Module):  # everything in one ``nn.Sequential``, in which the depth moves what comes after the blocks
    class Block(nn.Sequential):
        def forward(self, stream: Tensor) -> Tensor:
            return stream + super().forward(stream)

    def __init__(self, depth: int, hidden: int, embedding: int) -> None:
        super().__init__()
        blocks = [Flat.Block(*block) for block in cast("Any", Layers(depth, hidden, embedding).blocks)]
        ends = nn.LayerNorm(embedding), nn.Linear(embedding, 4)
        self.layers = nn.Sequential(nn.Linear(FEATURES, embedding), *blocks, *ends)

    def forward(self, inputs: Tensor) -> Tensor:
        return cast("Tensor", self.layers(inputs))


def test_roles_are_those_of_a_large_module_whatever_the_numbers() -> None:
    inputs = torch.ones(3, FEATURES)
    small = Plan.from_model(Flat(2, 16, 8), (inputs,), base=Flat(2, 16, 8))
    wide = Plan.from_model(Flat(2, 32, 16), (inputs,), base=small)
    deep = Plan.from_model(Flat(4, 16, 8), (inputs,), base=small)
    named = {name.removeprefix("layers."): role.value for name, role in deep.roles.items()}
    assert wide.roles == small.roles and named["0.weight"] == "embedding"
    for block in (1, 4):
        roles = [named[f"{block}.{place}.weight"] for place in (0, 1, 3)]
        assert roles == ["branch_norm", "branch_in", "branch_out"]
    assert (named["5.weight"], named["6.weight"], named["6.bias"]) == ("stream_norm", "readout", "readout_bias")


class Positions(LightningModule):
    """A Transformer that holds its positions itself, and whose readout is its embedding, transposed."""

    def __init__(self, depth: int, hidden: int, embedding: int) -> None:
        super().__init__()
        inner = transformer(depth, hidden, embedding)
        self.tokens, self.branches, self.norm = inner.tokens, inner.branches, inner.norm
        self.positions = nn.Parameter(torch.randn(CONTEXT, embedding) / 8)

    def forward(self, tokens: Tensor) -> Tensor:
        stream = self.tokens(tokens) + self.positions
        for branch in self.branches:
            stream = stream + branch(stream)
        return cast("Tensor", self.norm(stream)) @ self.tokens.weight.T

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return F.cross_entropy(self(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    def configure_optimizers(self) -> Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2**-6, weight_decay=0.1)


def test_positions_and_a_norm_under_a_multiplier_are_read_as_they_are() -> None:
    model, base = Positions(2, 4, 32), Positions(2, 4, 16)
    plan = Plan.from_model(model, tokens()[0], base=base)
    assert [multiplier.site and multiplier.site.module for multiplier in plan.multipliers][-1] == "norm"
    initial, batch = Initial(), tokens()[0]
    found = measure(model, plan, [MLUCallback(base), initial], [batch], batch, 1, {})
    start = {one.quantity.name: one.values for one in found.measurements if one.quantity.kind == "start"}
    size = initial.positions.square().mean().sqrt().item()
    assert start["positions"] == pytest.approx([size] * len(start["positions"]), rel=1e-6)
    # outputs of a norm with gains of one, before the readout's multiplier of 1/2
    assert start["norm.weight"] == pytest.approx([1.0] * len(start["norm.weight"]), abs=1e-3)


class Initial(Callback):  # keeps the positions as they are when the training starts
    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.positions: Tensor = pl_module.positions.detach().clone()


def test_positions_of_the_module_itself_pass_along_the_embedding() -> None:
    report = few(build=Positions, base=Shape(2, 2, 16), axes=["embedding"])
    assert report.verdict == "pass", report


class OwnData(Layers):  # gets its data in ``setup``
    def setup(self, stage: str) -> None:
        self.samples = samples()

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.samples, batch_size=16)


class BuiltLate(Layers):  # builds its layers in ``configure_model``
    def __init__(self, depth: int, hidden: int, embedding: int) -> None:
        LightningModule.__init__(self)
        self.shape, self.late = (depth, hidden, embedding), cast("Any", None)

    def configure_model(self) -> None:
        self.late = self.late or Layers(*self.shape)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return cast("Tensor", self.late.training_step(batch, batch_idx))


class Talkative(Layers):  # asks its Trainer for everything that it has in a training
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.log("lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        self.log("next", self.trainer.lr_scheduler_configs[0].scheduler.get_last_lr()[0])
        cast("Any", self.logger).experiment.add_scalar("anything", 1.0, self.trainer.global_step)
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)]


class Changing(Layers):  # changes a parameter itself, as a step does in which a teacher follows
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if not self.training:
            with torch.no_grad():
                self.first.weight.mul_(0.5)
        return loss


@pytest.mark.parametrize("build", [BuiltLate, Talkative, Changing])
def test_modules_that_are_built_by_hooks_or_ask_their_trainer_or_change_are_as_others(build: Any) -> None:
    assert _values(layers(build, **QUICK)) == pytest.approx(plain(**QUICK))


def test_data_of_the_modules_own_setup() -> None:
    assert _values(layers(OwnData, data=None, **QUICK)).keys() == plain(**QUICK).keys()


class World(LightningDataModule):  # asks its Trainer how many processes there are, and has two loaders
    def train_dataloader(self) -> Any:
        assert self.trainer is not None
        return [DataLoader(samples(), batch_size=16 // self.trainer.world_size) for _ in range(2)]


class OfTwo(Layers):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return sum((super(OfTwo, self).training_step(one, batch_idx) for one in batch), torch.zeros(()))


def test_lists_of_loaders_and_a_datamodule_that_asks_its_trainer() -> None:
    assert _values(layers(OfTwo, data=World(), **QUICK)).keys() == plain(**QUICK).keys()


def test_callbacks_that_log_and_save_and_print_do_no_harm(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def callbacks(base: LightningModule) -> list[Callback]:
        watching = LearningRateMonitor(), ModelCheckpoint(every_n_train_steps=1), TQDMProgressBar(), RichModelSummary()
        return [MLUCallback(base), *watching]

    assert _values(layers(callbacks=callbacks, **QUICK)) == plain(**QUICK) and list(tmp_path.iterdir()) == []


def _values(report: CheckReport) -> dict[str, float]:
    """What was measured in the first run, by name; those of modules that hold others have the others' names."""
    return {str(row.quantity).replace("late.", ""): row.points[0].value for row in report.rows}


@pytest.mark.parametrize(
    ("axis", "size", "says"),
    [("depth", 2, "streams have 2 additions"), ("hidden", 16, "branches have 16"), ("embedding", 8, "streams have 8")],
)
def test_what_does_not_grow_is_refused(axis: str, size: int, says: str) -> None:
    refusal = rf"not grow with its {axis}: its {says}.*as they had at half of it.*leave it out"
    with pytest.raises(ValueError, match=refusal):
        layers(lambda **shape: Layers(**shape | {axis: size}), axes=[axis], callbacks=lambda _: [])


def test_of_what_grows_together_one_is_enough() -> None:
    assert layers(lambda depth, hidden, embedding: Layers(2, hidden, 8), axes=["together"], factors=(1, 2, 4)).rows
    refusal = r"does not grow with its depth, hidden width or embedding\. Let the module_factory use depth=\.\.\., "
    with pytest.raises(ValueError, match=refusal):
        layers(lambda depth, hidden, embedding: Layers(2, 16, 8), axes=["together"])


class Stops(Callback):
    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        trainer.should_stop = True


class WithoutOptimizer(Layers):
    def configure_optimizers(self) -> None:  # type: ignore[override]  # which Lightning takes
        return None


@pytest.mark.parametrize(
    "settings", [{"callbacks": lambda base: [MLUCallback(base), Stops()]}, {"trainer": {"fast_dev_run": True}}]
)
def test_runs_that_stop_early_are_refused(settings: Any) -> None:
    with pytest.raises(ValueError, match=r"A run made 1 of 3 steps\. Leave out what stops it"):
        layers(**settings)


def test_a_module_without_an_optimizer_does_not_pass() -> None:
    report = layers(WithoutOptimizer)
    names = "features of blocks.* (mlp)", "stream of s=1", "output of output"
    still = [f"{name}: it does not move" for name in names]
    assert (report.verdict, report.summary.splitlines()[1:]) == ("undecided", still)


class FromData(Layers):  # a stream that begins with the data
    def __init__(self, depth: int, hidden: int, embedding: int) -> None:
        super().__init__(depth, hidden, FEATURES)
        self.first = nn.Identity()


def test_streams_that_begin_with_the_data_pass() -> None:
    report = layers(FromData, seeds=4)
    assert report.verdict == "pass", report
    rows = {str(row.quantity): row for row in report.rows}
    begins = rows["stream of s=0"]
    assert (begins.verdict, begins.reason) == ("pass", "it does not move at any size")
    still = [Point(factor, seed, 0.0, 0.0, 0.0) for factor in (1, 2, 4) for seed in (0, 1)]
    assert fit_row(rows["stream of s=1"].quantity, "depth", still).verdict == "undecided"
