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
from torch import Tensor, nn, optim
from torch.distributed.fsdp import fully_shard

from mlu_lightning import MLUCallback, Plan, attach_multipliers, fold, initialize

pytestmark = pytest.mark.slow


class Silent(Net):
    """Keeps no losses: a module without values has none."""

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.mse_loss(self(batch[0]), batch[1])


class Sharded(Silent):
    """Builds and shards itself in configure_model."""

    prepare: Any = staticmethod(lambda module: None)

    def build(self) -> None: ...

    def configure_model(self) -> None:
        if hasattr(self, "embed"):
            return
        Net.build(self)
        self.prepare(self)
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
    return Plan.from_model(Silent(**WIDE), next(iter(loader())), base=Silent(**BASE))


def fit(module: Sharded, *callbacks: Any, epochs: int = 2, ckpt_path: Any = None) -> Trainer:
    strategy = ModelParallelStrategy(1, 1, process_group_backend="gloo")
    trainer = quiet(*callbacks, devices=1, strategy=strategy, max_epochs=epochs)
    trainer.fit(module, loader(False), ckpt_path=ckpt_path)
    return trainer


def identical(one: nn.Module, other: nn.Module) -> bool:
    pairs: Any = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(ours.full_tensor(), theirs.full_tensor()) for ours, theirs in pairs)


@pytest.mark.parametrize("residual", ["hook", "fold"])
def test_sharded_run_is_that_of_the_functions_called_by_hand(residual: Any, plan: Plan) -> None:
    def groups(module: nn.Module) -> optim.Optimizer:
        scales = plan.scales("adamw")
        if residual == "fold":
            scales = {name: scale.folded("adamw") for name, scale in scales.items()}
        return optim.AdamW(
            {"params": [p], "lr": 0.02 * s.lr, "eps": 1e-8 * s.eps, "weight_decay": 0.01 * s.weight_decay}
            for p, s in ((p, scales[name]) for name, p in module.named_parameters())
        )

    ours = Sharded(**WIDE, optimizers=lambda module: optim.AdamW(module.parameters(), lr=0.02))
    theirs = Sharded(**WIDE, optimizers=groups)
    put = attach_multipliers if residual == "hook" else fold
    theirs.prepare = lambda module: put(initialize(module, plan), plan)
    fit(ours, MLUCallback(plan=plan, residual=residual))
    fit(theirs)
    assert identical(ours, theirs)


class OnMeta(Sharded):
    """Gets its values from Lightning, after it was sharded."""

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
    assert identical(resumed, whole)
    assert not identical(resumed, half)


def test_sharded_module_without_a_plan_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sharded already \(DTensor\).*Plan it before.*MLUCallback\(plan=path\)"):
        fit(Sharded(**WIDE), MLUCallback(Silent(**BASE)))
