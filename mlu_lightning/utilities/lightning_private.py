"""What the package uses of Lightning that is not public, in one file, so that a new release is checked here."""

from lightning.pytorch.core.optimizer import _configure_optimizers as configured_optimizers

__all__ = ["configured_optimizers"]
