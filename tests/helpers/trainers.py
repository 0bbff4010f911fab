"""A Trainer that prints, logs and saves nothing, data for it, and whether two modules are the same afterwards."""

from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

SILENT: dict[str, Any] = {"accelerator": "cpu"}
SILENT |= dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)


def quiet(*callbacks: Callback, **settings: Any) -> Trainer:
    return Trainer(callbacks=[*callbacks], **SILENT | settings)


def loader(batches: list[Any]) -> DataLoader[Any]:
    return DataLoader(batches, batch_size=None)


def pairs(count: int = 24, seed: int = 0) -> TensorDataset:
    draws = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(count, 3, generator=draws), torch.randn(count, 2, generator=draws))


def identical(one: nn.Module, other: nn.Module) -> bool:
    """Whether parameters and buffers are equal, bit for bit."""
    ours, theirs = ({**dict(each.named_parameters()), **dict(each.named_buffers())} for each in (one, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
