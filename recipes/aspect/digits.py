"""Handwritten digits of scikit-learn, for the paper's ResNet."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningDataModule
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset


class Digits(LightningDataModule):
    """1,797 images of 8 x 8 pixels, each of mean 0, of mean square 1 together, and their classes as one-hot vectors.

    What is validated is what is trained on: the question is how fast it is learned.

    Args:
        batches: number of training batches.
        batch_size: samples in a batch, drawn with replacement.
        seed: of the drawing.
    """

    def __init__(self, batches: int = 200, batch_size: int = 64, seed: int = 0) -> None:
        super().__init__()
        images, classes = load_digits(return_X_y=True)
        pixels = torch.tensor(images, dtype=torch.float32)
        pixels = pixels - pixels.mean(0)
        pixels = pixels / pixels.square().mean().sqrt()
        self.digits = TensorDataset(pixels, torch.nn.functional.one_hot(torch.tensor(classes)).float())
        drawn = torch.randint(len(pixels), (batches * batch_size,), generator=torch.Generator().manual_seed(seed))
        self.training, self.batch_size = Subset(self.digits, drawn.tolist()), batch_size

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Samples in the order of their drawing."""
        return DataLoader(self.training, self.batch_size)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """All digits at once."""
        return DataLoader(self.digits, len(self.digits))
