"""Run the steps of a LightningModule outside of the Trainer's loops: without a word to loggers, without an update."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import Tensor, nn

__all__ = ["StepName", "call_step", "is_lightning_module", "mute", "muted"]

StepName = Literal["training_step", "validation_step"]


def is_lightning_module(module: nn.Module) -> bool:
    """Whether a module is trained through ``training_step``.

    Args:
        module: any.

    >>> is_lightning_module(nn.Linear(1, 1))
    False
    """
    return callable(getattr(module, "training_step", None))


def call_step(module: Any, name: StepName, batch: Any) -> Any:
    """Call a step of a LightningModule with as many arguments as it takes.

    Args:
        module: a LightningModule.
        name: of the step.
        batch: its first argument; the index of the batch and that of its loader are 0.

    >>> class Module(nn.Module):
    ...     def validation_step(self, batch, batch_idx, dataloader_idx):
    ...         return batch, batch_idx, dataloader_idx
    >>> call_step(Module(), "validation_step", "batch")
    ('batch', 0, 0)
    """
    step = getattr(module, name)
    args = [batch]
    if is_param_in_hook_signature(step, "batch_idx", min_args=2):
        args.append(0)
    if is_param_in_hook_signature(step, "dataloader_idx", explicit=True):
        args.append(0)
    return step(*args)


def mute(
    module: Any,
    losses: list[Tensor],
    optimizers: Callable[[], Sequence[Any]],
    schedulers: Callable[[], Sequence[Any]],
) -> None:
    """Give a LightningModule a class whose steps log nothing, print nothing and change no weights.

    Its Trainer shows the same optimizers and schedulers, which it may not have yet, and keeps nothing that is set.

    Args:
        module: whose class is changed.
        losses: where those that are given to ``manual_backward`` go.
        optimizers: what ``optimizers()`` returns, made idle: they have groups and states, and their steps do nothing.
        schedulers: the same for ``lr_schedulers()``.

    >>> from mlu_lightning.models import ResNet
    >>> model = ResNet(depth=1, hidden=4, embedding=2, inputs=1, outputs=1)
    >>> mute(model, [], lambda: [model.configure_optimizers()], lambda: [])
    >>> model.log("anything", 1.0)
    >>> model.optimizers().step()
    >>> model.optimizers().param_groups[0]["lr"]
    0.1
    """

    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    def manual_backward(self: Any, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        losses.append(loss)

    def idle_optimizers(self: Any, use_pl_optimizer: bool = True) -> Any:
        found = [_Idle(optimizer) for optimizer in optimizers()]
        return found[0] if len(found) == 1 else found

    def idle_schedulers(self: Any) -> Any:
        found = [_Idle(scheduler) for scheduler in schedulers()]
        return found[0] if len(found) == 1 else found or None

    quiet = ("log", "log_dict", "print", "toggle_optimizer", "untoggle_optimizer", "clip_gradients")
    methods: dict[str, Any] = dict.fromkeys(quiet, nothing)
    methods |= {
        "manual_backward": manual_backward,
        "optimizers": idle_optimizers,
        "lr_schedulers": idle_schedulers,
        "logger": property(lambda self: DummyLogger()),
        "loggers": property(lambda self: [DummyLogger()]),
    }
    cls = type(module)
    attached = getattr(cls, "trainer", None)
    if isinstance(attached, property):
        methods["trainer"] = property(lambda self: _Shown(attached.__get__(self), optimizers, schedulers))
    module.__class__ = type(cls.__name__, (cls,), methods)


@contextmanager
def muted(module: Any) -> Iterator[None]:
    """Mute a LightningModule for a while, with the optimizers and schedulers of its Trainer.

    Args:
        module: attached to a Trainer if its steps ask for optimizers.

    >>> from mlu_lightning.models import ResNet
    >>> model = ResNet(depth=1, hidden=4, embedding=2, inputs=1, outputs=1)
    >>> with muted(model):
    ...     model.log("anything", 1.0)
    >>> type(model) is ResNet
    True
    """
    cls = type(module)

    def trainer() -> Any:
        return cls.trainer.__get__(module)

    mute(
        module,
        [],
        lambda: trainer().optimizers,
        lambda: [config.scheduler for config in trainer().lr_scheduler_configs],
    )
    try:
        yield
    finally:
        module.__class__ = cls


class _Shown:
    """Stands for a Trainer, with optimizers and schedulers of its own."""

    def __init__(
        self, original: Any, optimizers: Callable[[], Sequence[Any]], schedulers: Callable[[], Sequence[Any]]
    ) -> None:
        self._original, self._optimizers, self._schedulers = original, optimizers, schedulers

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    @property
    def optimizers(self) -> list[Any]:
        return list(self._optimizers())

    @property
    def lr_scheduler_configs(self) -> list[LRSchedulerConfig]:
        return [LRSchedulerConfig(scheduler) for scheduler in self._schedulers()]


class _Idle:
    """Stands for an optimizer or scheduler: it shows what that holds, and does nothing."""

    def __init__(self, original: Any) -> None:
        self._original = original

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def step(self, closure: Callable[[], Any] | None = None, *args: Any, **kwargs: Any) -> Any:
        return closure() if callable(closure) else None

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        return None

    def toggle_model(self, *args: Any, **kwargs: Any) -> Any:
        return nullcontext()
