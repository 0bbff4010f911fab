"""A callback that works with the Trainers of both ``lightning.pytorch`` and ``pytorch_lightning``."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback
from typing_extensions import Self

from mlu_lightning.utilities.lightning_namespaces import of_both


class EitherCallback(Callback):
    """A callback that is one of ``pytorch_lightning`` too, if that is imported when it is made."""

    _written: type[EitherCallback] | None = None  # the class in a module that this one was made from

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Make an instance of the class, or of one that has both parents."""
        missing = [parent for parent in of_both(Callback) if not issubclass(cls, parent)]
        both: Any = cls
        if missing:
            # of this private module, where command lines do not look for callbacks to build
            names = {"__module__": __name__, "__qualname__": cls.__qualname__, "_written": cls}
            both = type(cls.__name__, (cls, *missing), names)
        instance: Self = super().__new__(both)
        return instance

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Be pickled as the class in a module, because where it is unpickled other packages may be imported."""
        return _made, (self._written or type(self),), vars(self)


def _made(cls: type[EitherCallback]) -> EitherCallback:
    return cls.__new__(cls)
