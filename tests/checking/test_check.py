"""Checks of real modules: what is measured, that the right plan passes, and that faults are found and named."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from helpers.architecture_runs import SMALL, Trained, batches_like
from helpers.architectures import ARCHITECTURES
from helpers.check_runs import CONTEXT, VOCABULARY, few, tokens, transformer
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from mlu_lightning import MLUCallback, Role, Shape, check
from mlu_lightning.checking.quantities import Kind
from mlu_lightning.models import CausalTransformer, ResNet
from recipes.check.plan_faults import Fault, FaultyCallback


def test_right_plan_passes_and_is_the_same_with_hooks_and_folded() -> None:
    hook, fold = (
        few(axes=["depth"], seeds=2, callbacks=lambda base, mode=mode: [MLUCallback(base, residual=mode)])
        for mode in ("hook", "fold")
    )
    assert hook.verdict == "pass", hook
    assert {row.quantity.kind for row in hook.rows} == set(Kind)
    assert [row.quantity for row in hook.rows] == [row.quantity for row in fold.rows]
    for one, other in zip(hook.rows, fold.rows, strict=True):
        if (
            one.quantity.kind is not Kind.DECAY
        ):  # weights that hold their multipliers have the same decay, but for rounding
            assert other.slope == pytest.approx(one.slope, abs=2e-3), one


@pytest.mark.parametrize(
    ("role", "factor", "axis", "says"),
    [
        (Role.BRANCH_IN, "lr", "embedding", "lr"),
        (Role.BRANCH_OUT, "std", "hidden", "multiplier or std"),
        (Role.BRANCH_OUT, "multiplier", "depth", "multiplier or std"),
        (Role.READOUT, "multiplier", "embedding", "multiplier or std"),
        (Role.EMBEDDING, "weight_decay", "embedding", "weight decay"),
    ],
)
def test_faults_are_found_and_named(role: Role, factor: Any, axis: str, says: str) -> None:
    report = few(axes=[axis], seeds=2, callbacks=lambda base: [FaultyCallback(Fault(role, factor), base)])
    assert report.verdict == "fail"
    assert (report.causes[0].role, report.causes[0].factor) == (role.value, says), report


def test_eps_is_found_where_it_matters() -> None:
    fault = Fault(Role.BRANCH_OUT, "eps")

    def build(**shape: int) -> LightningModule:
        return transformer(**shape, eps=1.0, lr=0.3, weight_decay=0.0)

    report = few(build=build, axes=["depth"], callbacks=lambda base: [FaultyCallback(fault, base)])
    assert report.verdict == "fail"
    assert (report.causes[0].role, report.causes[0].factor) == ("branch_out", "lr or eps"), report


class OneForgotten(MLUCallback):
    """Does not multiply one branch, as a hand-written block that was left out would not be."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        block = pl_module.blocks[len(pl_module.blocks) // 2]
        block._forward_hooks.clear()


def test_one_branch_without_its_multiplier_is_found() -> None:
    inputs = torch.randn(8, 16, 3, generator=torch.Generator().manual_seed(0))
    data = [(x, torch.stack((x[:, 0] * x[:, 1], x[:, 2].abs()), 1)) for x in inputs]

    def build(depth: int, hidden: int, embedding: int) -> ResNet:
        return ResNet(depth, hidden, embedding, inputs=3, outputs=2)

    settings: dict[str, Any] = {"build": build, "base": Shape(2, 32, 16), "data": data, "axes": ["depth"], "seeds": 4}
    report = few(**settings, factors=(1, 2, 4, 8), callbacks=lambda base: [OneForgotten(base)])
    starts = [row for row in report.rows if row.quantity.kind == "start" and row.quantity.role == "branch_out"]
    assert [row.verdict for row in starts] == ["fail"]
    assert starts[0].reason == "at the place where it is largest"
    assert report.causes[0].role == "branch_out"


class Text(LightningDataModule):
    """Batches that only come right through a hook of the data."""

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.cat(tokens()) + 1), batch_size=16)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Tensor:
        result: Tensor = batch[0] - 1
        return result


def loader() -> DataLoader[Any]:
    return DataLoader(torch.cat(tokens()), batch_size=16)  # type: ignore[arg-type]  # a tensor is a dataset of its rows


class Own(CausalTransformer):
    """Has its own data."""

    def train_dataloader(self) -> DataLoader[Any]:
        return loader()


def test_data_can_be_batches_a_loader_a_module_or_the_modules_own() -> None:
    def own(depth: int, hidden: int, embedding: int) -> Own:
        return Own(VOCABULARY, CONTEXT, depth, embedding, hidden, head_dim=8, mlp_hidden=32 * hidden)

    settings: dict[str, Any] = {"axes": ["depth"], "seeds": 1, "factors": (1, 2), "steps": 2, "build": own}
    of_list, of_loader, of_own = (few(data=data, **settings) for data in (tokens(), loader(), None))
    assert of_list.to_json() == of_loader.to_json() == of_own.to_json()
    with pytest.raises(ValueError, match="There are no batches in the data"):
        few(data=[], **settings)


def test_hooks_of_a_datamodule_transfer_batches() -> None:
    settings: dict[str, Any] = {"axes": ["depth"], "seeds": 1, "factors": (1, 2), "steps": 2}
    data = Text()
    report = few(data=data, **settings)
    assert all(np.isfinite(point.value) for row in report.rows for point in row.points)
    assert "train_dataloader" not in vars(data)


def test_nothing_is_left_behind() -> None:
    random.seed(5), np.random.seed(5), torch.manual_seed(5)  # the global states are what is meant
    states = random.getstate(), copy.deepcopy(np.random.get_state()), torch.get_rng_state()
    calls: list[tuple[int, int]] = []
    data = tokens()
    before = [batch.clone() for batch in data]
    few(axes=["depth"], seeds=1, factors=(1, 2), steps=1, data=data, progress=lambda *count: calls.append(count))
    assert random.getstate() == states[0]
    assert all(map(np.array_equal, np.random.get_state(), states[1]))
    assert torch.equal(torch.get_rng_state(), states[2])
    assert all(map(torch.equal, data, before))
    assert calls == [(1, 2), (2, 2)]


def test_same_seed_same_report() -> None:
    settings: dict[str, Any] = {"axes": ["hidden"], "seeds": 1, "factors": (1, 2), "steps": 1}
    first, again = few(**settings), few(**settings)
    assert first.to_json() == again.to_json()
    assert few(**settings | {"seed": 7}).to_json() != first.to_json()


def test_what_cannot_be() -> None:
    for wrong in ({"seeds": 0}, {"steps": 0}):
        with pytest.raises(ValueError, match="should both be 1 or more"):
            few(**wrong)


PASSING = (
    *("gpt2", "llama", "tied llama", "mistral", "qwen3", "mixtral", "gpt-neox", "t5", "vit"),
    *("pre-norm encoder", "post-norm encoder", "basic resnet"),
)
FAILING = ("gemma2", "bert")
FURTHER = "gains of norms move further in deep networks than in shallow ones, next to what is expected"
ARCHITECTURES_CHECKED = [
    *PASSING,
    *(pytest.param(name, marks=pytest.mark.xfail(strict=True, reason=FURTHER)) for name in FAILING),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES_CHECKED)
def test_architectures_pass_and_without_the_plugin_they_fail(name: str) -> None:
    architecture = ARCHITECTURES[name]
    _, heads, embedding = SMALL
    base = Shape(2, heads, embedding)  # gradients of a single block differ from those of many by more than a drift

    def build(depth: int, hidden: int, embedding: int) -> LightningModule:
        return Trained(architecture.build(depth, hidden, embedding))

    data = batches_like(architecture.example, 24)
    arguments: dict[str, Any] = {"axes": ["depth"], "factors": (1, 2, 4), "seeds": 8}
    report = check(build, base, data, **arguments)
    starts = [row for row in report.rows if row.quantity.kind in ("start", "decay")]
    assert {row.verdict for row in starts} == {"pass"}, str(report)
    assert report.verdict == "pass", str(report)
    assert check(build, base, data, **arguments, callbacks=lambda _: []).verdict == "fail"
