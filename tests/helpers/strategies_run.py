"""Runs under Lightning's strategies, in one process or two."""

import re
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.strategies.fsdp import _setup_activation_checkpointing
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.data import DataLoader, DistributedSampler

from helpers.perceptrons import Branch
from helpers.ranks import rank
from helpers.trainers import pairs, quiet
from mlu_lightning import MLUCallback, Plan
from mlu_lightning.models import ResNet

INPUTS, OUTPUTS, BATCH, SAMPLES = 3, 2, 8, 24
BASE = {"depth": 2, "hidden": 8, "embedding": 4}
WIDE = {"depth": 4, "hidden": 32, "embedding": 16}
ALL = [*product(("hook", "fold"), (1, 2))]  # where multipliers are, and over how many batches gradients are accumulated
RUNS = {"few": [("hook", 2), ("fold", 1)], "all": ALL}


class Linear(nn.Linear):
    """Initial values depend on its size only, also where a strategy asks for them after it has sharded the layer."""

    def reset_parameters(self) -> None:
        for parameter in (self.weight, self.bias):
            generator = torch.Generator().manual_seed(sum(parameter.shape))
            values = torch.randn(parameter.shape, generator=generator, device="cpu") / self.in_features**0.5
            if isinstance(parameter, DTensor):
                values = distribute_tensor(values, parameter.device_mesh, parameter.placements)
            with torch.no_grad():
                parameter.copy_(values)


class Net(LightningModule):
    def __init__(self, depth: int, hidden: int, embedding: int) -> None:
        super().__init__()
        self.shape = depth, hidden, embedding
        self.losses: list[Tensor] = []
        self.build()

    def build(self) -> None:
        depth, hidden, embedding = self.shape
        self.embed = Linear(INPUTS, embedding)
        self.blocks = nn.ModuleList(Branch(hidden, embedding, Linear) for _ in range(depth))
        self.readout = Linear(embedding, OUTPUTS)

    forward = ResNet.forward

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = nn.functional.mse_loss(self(batch[0]), batch[1])
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> Any:
        # as large as gradients are, so that its factor counts, and rounding does not
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.02, eps=1e-3, weight_decay=0.1)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)]


class Late(Net):  # built in configure_model, and divided there, as subclasses do it
    divide: Callable[[Any], None]

    def build(self) -> None: ...

    def configure_model(self) -> None:
        if not hasattr(self, "embed"):
            Net.build(self)
            self.divide(self.device_mesh)


class Sharded(Late):
    def divide(self, mesh: Any) -> None:
        for block in self.blocks:
            fully_shard(block, mesh=mesh["data_parallel"])
        fully_shard(self, mesh=mesh["data_parallel"])


class ShardedCheckpointed(Sharded):
    """Blocks are computed again in the backward pass, by torch's wrapper, which parts have inside of their names."""

    def divide(self, mesh: Any) -> None:
        apply_activation_checkpointing(self, check_fn=lambda part: isinstance(part, Branch))
        super().divide(mesh)


class ShardedOnMeta(Sharded):
    def configure_model(self) -> None:
        with torch.device("meta"):
            super().configure_model()


class Parallel(Late):  # hidden units of every branch are divided among the processes, each of which has the whole batch
    def divide(self, mesh: Any) -> None:
        for block in self.blocks:
            parallelize_module(block, mesh["tensor_parallel"], {"read": ColwiseParallel(), "write": RowwiseParallel()})


class FullySharded(FSDPStrategy):
    """Lightning refuses FSDP1 itself on CPUs, and names it no device there; torch does not mind."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        self.kwargs["device_id"] = torch.device("cpu")
        policy = ModuleWrapPolicy({Branch})
        kwargs = {name: value for name, value in self.kwargs.items() if name != "auto_wrap_policy"}
        divided = FullyShardedDataParallel(model, auto_wrap_policy=policy, **kwargs)
        _setup_activation_checkpointing(divided, self._activation_checkpointing_kwargs)
        return divided


@dataclass(frozen=True)
class Way:  # how a run is divided among processes
    module: type[Net]
    strategy: Callable[[], Strategy | str]
    processes: int = 2
    parts: int = 2  # of a batch
    planned: bool = False  # whether MLUCallback is given a plan: a module cannot be planned after it was divided


def model_parallel(data: int, tensor: int) -> Callable[[], Strategy]:
    return lambda: ModelParallelStrategy(data, tensor, process_group_backend="gloo")


CHECKPOINTED = {"activation_checkpointing_policy": {Branch}}
WAYS = {
    "single": Way(Net, lambda: SingleDeviceStrategy("cpu"), 1, 1),
    "ddp": Way(Net, lambda: "ddp"),
    "fsdp2": Way(Sharded, model_parallel(2, 1), planned=True),
    "fsdp2-meta": Way(ShardedOnMeta, model_parallel(2, 1), planned=True),
    "tensor-parallel": Way(Parallel, model_parallel(1, 2), parts=1, planned=True),
    "fsdp1": Way(Net, lambda: FullySharded(use_orig_params=True)),
    "fsdp2-checkpointed": Way(ShardedCheckpointed, model_parallel(2, 1), planned=True),
    "fsdp1-checkpointed": Way(Net, lambda: FullySharded(use_orig_params=True, **CHECKPOINTED)),
}


def loader(parts: int = 1, part: int = 0) -> DataLoader[Any]:
    data = pairs(SAMPLES)
    sampler: DistributedSampler[Any] = DistributedSampler(data, parts, part, shuffle=False)
    return DataLoader(data, BATCH // parts, sampler=sampler)


def weights(module: nn.Module) -> dict[str, Tensor]:
    found = {}
    wrapped = isinstance(module, FullyShardedDataParallel)
    with FullyShardedDataParallel.summon_full_params(module, writeback=False) if wrapped else nullcontext():
        for name, value in module.named_parameters():
            name = re.sub(r"_(fsdp|checkpoint)_wrapped_module\.", "", name).removeprefix("module.")
            found[name] = (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
    return found


class AtStart(Callback):
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.weights = weights(trainer.strategy.model)


def fit(way: Way, residual: Any, accumulate: int) -> dict[str, Any]:
    with isolate_rng():
        # every process draws a base of its own, whose sampled std differs from those of others
        torch.manual_seed(rank())
        base = Net(**BASE)
        for parameter in base.parameters():
            nn.init.normal_(parameter, std=0.5)
    module = way.module(**WIDE)
    plan = Plan.from_model(Net(**WIDE), next(iter(loader())), base=base) if way.planned else None
    callback = MLUCallback(None if plan else base, plan=plan, residual=residual)
    settings = {"devices": way.processes, "strategy": way.strategy(), "accumulate_grad_batches": accumulate}
    start = AtStart()
    trainer = quiet(callback, start, max_epochs=2, use_distributed_sampler=False, **settings)
    trainer.fit(module, loader(way.parts, rank() % way.parts))
    weighed = {"start": start.weights, "end": weights(trainer.strategy.model)}
    return {"plan": callback.plan.to_yaml(), "losses": torch.stack(module.losses), **weighed}


def run_all(folder: Path, runs: list[Any], names: list[str]) -> None:
    for name in names:
        torch.save({run: fit(WAYS[name], *run) for run in runs}, folder / f"{name}-{rank()}.pt")
