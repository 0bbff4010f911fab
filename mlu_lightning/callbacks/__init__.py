"""Lightning callbacks: thin adapters of the functions of the package."""

from mlu_lightning.callbacks.parameterization import MLUCallback

__all__ = ["MLUCallback"]
