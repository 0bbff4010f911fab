"""Run steps of a LightningModule outside of the Trainer's loops, without logging and without updates."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer

from mlu_lightning.utilities.lightning_private import train_dataloaders

StepName = Literal["training_step", "validation_step"]
_MANY = 1000  # steps of a training whose number is not known yet


def is_lightning_module(module: nn.Module) -> bool:
    """Tell whether a module is trained through ``training_step``."""
    return callable(getattr(module, "training_step", None))


def call_step(module: Any, name: StepName, batch: Any, number: int = 0) -> Any:
    """Call a step of a LightningModule with as many arguments as it takes; the loader has the index 0."""
    step = getattr(module, name)
    if is_param_in_hook_signature(step, "dataloader_iter", explicit=True):
        return step(iter([(batch, number, 0)]))
    args = [batch]
    if is_param_in_hook_signature(step, "batch_idx", min_args=2):
        args.append(number)
    if is_param_in_hook_signature(step, "dataloader_idx", explicit=True):
        args.append(0)
    return step(*args)


def call_module(module: nn.Module, arguments: Any) -> Any:
    """Call a module with keyword arguments, several arguments, or one."""
    if isinstance(arguments, Mapping):
        return module(**arguments)
    return module(*(arguments if isinstance(arguments, (tuple, list)) else (arguments,)))


def run_start_hooks(module: Any, batch: Any) -> None:
    """Call the hooks of a LightningModule that Lightning calls before the first ``training_step``."""
    for name in ("on_fit_start", "on_train_start", "on_train_epoch_start"):
        getattr(module, name)()
    module.on_train_batch_start(batch, 0)


def mute(
    module: Any,
    losses: list[Tensor],
    optimizers: Callable[[], Sequence[Any]],
    schedulers: Callable[[], Sequence[Any]],
    gradients: bool = False,
) -> None:
    """Give a LightningModule a class whose steps log nothing, print nothing and change no weights.

    Losses given to ``manual_backward`` go to ``losses``, and with ``gradients`` parameters get some, of zeros.
    ``optimizers()`` and ``lr_schedulers()`` return idle stand-ins of the given ones, and so does the module's Trainer, if
    it has one.
    """

    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    def manual_backward(self: Any, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        losses.append(loss)
        for parameter in self.parameters() if gradients else ():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

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
        methods["trainer"] = property(lambda self: _TrainerView(attached.__get__(self), optimizers, schedulers))
    module.__class__ = type(cls.__name__, (cls,), methods)


@contextmanager
def muted(module: Any) -> Iterator[None]:
    """Mute a LightningModule for a while, with the optimizers and schedulers of its Trainer, if it has one."""
    cls = type(module)

    def trainer() -> Any:
        return cls.trainer.__get__(module)

    try:
        mute(
            module,
            [],
            lambda: trainer().optimizers,
            lambda: [config.scheduler for config in trainer().lr_scheduler_configs],
        )
        yield
    finally:
        module.__class__ = cls


class _TrainerView:
    def __init__(
        self, original: Any, optimizers: Callable[[], Sequence[Any]], schedulers: Callable[[], Sequence[Any]]
    ) -> None:
        self._original, self._optimizers, self._schedulers = original, optimizers, schedulers

    def __getattr__(self, name: str) -> Any:
        if name in ("num_training_batches", "estimated_stepping_batches") and self._original.train_dataloader is None:
            return max(self._original.max_steps, _MANY)  # to count them, Lightning would begin to read them
        return getattr(self._original, name)

    @property
    def optimizers(self) -> list[Any]:
        return list(self._optimizers())

    @property
    def train_dataloader(self) -> Any:
        return self._original.train_dataloader or train_dataloaders(self._original)

    @property
    def lr_scheduler_configs(self) -> list[LRSchedulerConfig]:
        return [LRSchedulerConfig(scheduler) for scheduler in self._schedulers()]


class _Idle:
    def __init__(self, original: Any) -> None:
        self._original = original

    def __getattr__(self, name: str) -> Any:
        if name == "optimizer" and not hasattr(self._original, name):
            return self  # as Lightning's own wrapper has it
        found = getattr(self._original, name)
        if isinstance(found, Optimizer):
            return _Idle(found)
        # what torch's optimizers do not have may be a part of a step, as SAM's first and second one
        steps = isinstance(self._original, Optimizer) and inspect.ismethod(found) and not hasattr(Optimizer, name)
        return self.step if steps else found

    def step(self, closure: Callable[[], Any] | None = None, *args: Any, **kwargs: Any) -> Any:
        return closure() if callable(closure) else None

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        return None

    def toggle_model(self, *args: Any, **kwargs: Any) -> Any:
        return nullcontext()
