"""Real text to train on: the documentation inside Python's standard library."""

from __future__ import annotations

from functools import cache

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from mlu_lightning.quickstart.study import Windows, load_text

CONTEXT = 32
"""Length of the samples of :func:`text_batches`, which have one character more."""


class Text(LightningDataModule):
    """Bytes of a text: samples at random places of its first nine tenths, validation on the rest.

    Args:
        context: length of a sample, which has one byte more, to be predicted.
        batches: number of training batches.
        batch_size: samples in a batch.
        seed: of the places of the training samples, which depend on nothing else.
        validation_batches: number of batches for validation.
    """

    def __init__(
        self, context: int = 32, batches: int = 200, batch_size: int = 16, seed: int = 0, validation_batches: int = 4
    ) -> None:
        super().__init__()
        values = torch.frombuffer(bytearray(load_text()), dtype=torch.uint8).long()
        cut = len(values) * 9 // 10
        self.batch_size = batch_size
        draws = torch.Generator().manual_seed(seed)
        starts = torch.randint(cut - context, (batches * batch_size,), generator=draws)
        self.training = Windows(values[:cut], starts, context + 1)
        spaced = torch.linspace(0, len(values) - cut - context - 1, validation_batches * batch_size).long()
        self.validation = Windows(values[cut:], spaced, context + 1)

    def train_dataloader(self) -> DataLoader[Tensor]:
        """Samples in the order of their drawing."""
        return DataLoader(self.training, batch_size=self.batch_size)

    def val_dataloader(self) -> DataLoader[Tensor]:
        """Samples evenly spaced over the rest of the text, of which the first batch is the probe."""
        return DataLoader(self.validation, batch_size=self.batch_size)


@cache
def characters() -> tuple[Tensor, int]:
    """The whole text as tokens, and the number of different ones."""
    text = torch.frombuffer(bytearray(load_text()), dtype=torch.uint8)
    vocabulary, tokens = torch.unique(text, return_inverse=True)
    return tokens, len(vocabulary)


@cache
def text_batches() -> list[Tensor]:
    """64 batches of 16 samples of consecutive characters, from places drawn at random, the same in every process."""
    tokens = characters()[0]
    starts = torch.randint(len(tokens) - CONTEXT, (64, 16, 1), generator=torch.Generator().manual_seed(0))
    return list(tokens[starts + torch.arange(CONTEXT + 1)])
