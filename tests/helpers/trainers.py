"""A Trainer that prints, logs and saves nothing, and data for it."""

from typing import Any

from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader


def quiet(*callbacks: Callback, **settings: Any) -> Trainer:
    silent = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    return Trainer(callbacks=[*callbacks], **{"accelerator": "cpu", **silent, **settings})


def loader(batches: list[Any]) -> DataLoader[Any]:
    """Whole batches in their order."""
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]  # a list serves as a Dataset
