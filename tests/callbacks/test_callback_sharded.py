"""MLUCallback with FSDP2 (ModelParallelStrategy), in one process."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.callback_runs import BASE, WIDE, Net, loader
from helpers.trainers import quiet
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from mlu_lightning import MLUCallback, Plan

pytestmark = pytest.mark.slow


class Sharded(Net):  # shards itself in configure_model, and draws no random numbers
    def build(self) -> None: ...

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def configure_model(self) -> None:
        if hasattr(self, "embed"):
            return
        Net.build(self)
        mesh = self.device_mesh["data_parallel"]
        for block in self.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(self, mesh=mesh)


@pytest.fixture(autouse=True)
def processes() -> Iterator[None]:
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def plan() -> Plan:
    return Plan.from_model(Net(**WIDE), next(iter(loader())), base=Net(**BASE))


def fit(module: Sharded, *callbacks: Any, epochs: int = 2, ckpt_path: Any = None) -> Trainer:
    strategy = ModelParallelStrategy(1, 1, process_group_backend="gloo")
    trainer = quiet(*callbacks, devices=1, strategy=strategy, max_epochs=epochs)
    trainer.fit(module, loader(False), ckpt_path=ckpt_path)
    return trainer


def identical(one: nn.Module, other: nn.Module) -> bool:
    pairs: Any = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(ours.full_tensor(), theirs.full_tensor()) for ours, theirs in pairs)


class OnMeta(Sharded):  # gets its values from Lightning, after it was sharded
    def configure_model(self) -> None:
        with torch.device("meta"):
            super().configure_model()


@pytest.mark.parametrize("make", [Sharded, OnMeta])
@pytest.mark.parametrize("residual", ["hook", "fold"])
def test_resumed_run_is_the_uninterrupted_run(residual: Any, make: type[Sharded], plan: Plan, tmp_path: Path) -> None:
    def run(epochs: int, ckpt_path: Path | None = None) -> tuple[Sharded, Trainer]:
        torch.manual_seed(0)
        module = make(**WIDE)
        return module, fit(module, MLUCallback(plan=plan, residual=residual), epochs=epochs, ckpt_path=ckpt_path)

    half, trainer = run(2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    whole, _ = run(4)
    resumed, _ = run(4, tmp_path / "half.ckpt")
    assert identical(resumed, whole) and not identical(resumed, half)


def test_sharded_module_without_a_plan_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sharded already \(DTensor\).*Plan it before.*MLUCallback\(plan=path\)"):
        fit(Sharded(**WIDE), MLUCallback(Net(**BASE)))
