"""Activations that are computed again in the backward pass: plans and runs are those of the module without that."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.architecture_runs import quiet
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as wrappers
from torch.utils.checkpoint import checkpoint

from mlu_lightning import Plan, restore_multipliers
from mlu_lightning.callbacks import MLUCallback

LARGE, SMALL = {"depth": 3, "heads": 3, "width": 12}, {"depth": 2, "heads": 1, "width": 6}
BATCHES = [torch.randint(11, (4, 5), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]


class Attention(nn.Module):
    """Its queries are rows of a weight that nn.MultiheadAttention holds for queries, keys and values."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, stream: Tensor) -> Any:
        read = self.norm(stream)
        return self.attention(read, read, read, need_weights=False)[0]


class Net(LightningModule):
    def __init__(self, depth: int, heads: int, width: int, reentrant: Any = None, only: Any = None) -> None:
        super().__init__()
        torch.manual_seed(depth)
        self.reentrant, self.only = reentrant, only
        self.losses: list[float] = []
        self.embed = nn.Embedding(11, width)
        block = [Attention(heads, width), nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, width))]
        self.blocks = nn.ModuleList(part for _ in range(depth) for part in copy.deepcopy(block))
        self.readout = nn.Linear(width, 11, bias=False)
        self.readout.weight = self.embed.weight  # tied, so that its multiplier stays a hook when others are folded

    def forward(self, tokens: Tensor) -> Tensor:
        stream: Tensor = self.embed(tokens)
        for number, block in enumerate(self.blocks):
            if self.reentrant is not None and self.only in (None, number):
                stream = stream + checkpoint(block, stream, use_reentrant=self.reentrant)
            else:
                stream = stream + block(stream)
        return torch.as_tensor(self.readout(stream))

    def training_step(self, batch: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01, eps=1e-3)


def wrapped(module: Net, *parts: type[nn.Module]) -> Net:
    wrappers.apply_activation_checkpointing(module, check_fn=lambda part: type(part) in parts)
    return module


def trained(module: Net, base: Net, residual: Any, path: Path) -> MLUCallback:
    callback = MLUCallback(base, residual=residual)
    trainer = quiet(callback, max_epochs=2)
    trainer.fit(module, torch.utils.data.DataLoader(BATCHES, batch_size=None))  # type: ignore[arg-type]  # a list serves as a Dataset
    trainer.save_checkpoint(path)
    return callback


@pytest.mark.parametrize("residual", ["hook", "fold"])
@pytest.mark.parametrize(
    "parts",
    [(Attention, nn.Sequential), (nn.MultiheadAttention, nn.Linear), (Attention, nn.LayerNorm, nn.Embedding)],
    ids=["blocks", "inside", "nested"],
)
def test_run_with_wrappers_is_the_run_without(parts: Any, residual: Any, tmp_path: Path) -> None:
    plain, module = Net(**LARGE), wrapped(Net(**LARGE), *parts)
    expected = trained(plain, Net(**SMALL), residual, tmp_path / "plain.ckpt").plan
    assert expected is not None
    places = {multiplier.site.where for multiplier in expected.multipliers if multiplier.site is not None}
    assert places == {"output", "input", "weight"}
    found = trained(module, wrapped(Net(**SMALL), *parts), residual, tmp_path / "wrapped.ckpt").plan
    assert found is not None
    assert found.to_yaml() == expected.to_yaml()
    assert module.losses == plain.losses

    checkpoint = torch.load(tmp_path / "wrapped.ckpt", weights_only=True)
    saved = torch.load(tmp_path / "plain.ckpt", weights_only=True)["state_dict"]
    torch.testing.assert_close(checkpoint["state_dict"], saved, rtol=0, atol=0)
    loaded = Net(**LARGE)
    restore_multipliers(loaded, checkpoint)
    assert all(torch.equal(each(BATCHES[0]), plain(BATCHES[0])) for each in (loaded, module))


def test_module_with_wrappers_has_the_base_without(tmp_path: Path) -> None:
    plain, module = Net(**LARGE), wrapped(Net(**LARGE), Attention)
    for each in (plain, module):
        trained(each, Net(**SMALL), "hook", tmp_path / "any.ckpt")
    assert module.losses == plain.losses


def test_checkpointing_by_calls_is_seen_through() -> None:
    expected = Plan.from_model(Net(**LARGE), BATCHES[0], base=Net(**SMALL)).to_yaml()
    module = Net(**LARGE, reentrant=False)
    assert Plan.from_model(module, BATCHES[0], base=Net(**SMALL, reentrant=False)).to_yaml() == expected


def test_reentrant_checkpointing_is_refused_with_what_to_do() -> None:
    reentrant = partial(wrappers.checkpoint_wrapper, checkpoint_impl=wrappers.CheckpointImpl.REENTRANT)
    wrapping = Net(**LARGE)
    wrappers.apply_activation_checkpointing(wrapping, reentrant, check_fn=lambda part: part is wrapping.blocks[1])
    for module in (Net(**LARGE, reentrant=True), Net(**LARGE, reentrant=True, only=1), wrapping):
        message = r"Net uses reentrant activation checkpointing.*Give use_reentrant=False.*after the module was planned"
        with pytest.raises(ValueError, match=message):
            Plan.from_model(module, BATCHES[0], base=Net(**SMALL))
