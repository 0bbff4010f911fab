"""Control the random numbers that decide what a forward pass runs, as in LayerDrop, so that as much as possible runs.

Generators are put into states whose next draws are all near one, or all near zero, since some code keeps a block where
a draw is large and other code where it is small.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache, reduce
from itertools import product
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

RunT = TypeVar("RunT")
_UNIFORM = frozenset({"rand", "rand_like", "uniform_"})
_ONE_NUMBER = frozenset({"bernoulli", "bernoulli_", "randint"})
_DRAWN = _UNIFORM | _ONE_NUMBER
_WORDS = 624  # numbers in the state of a Mersenne Twister, which are its next draws; two make a floating-point number


@dataclass
class _Draws:
    """Which sources draw large numbers, and which of them were asked for any."""

    large: dict[str, bool]
    asked: set[str] = field(default_factory=set)


def run_most(run: Callable[[], RunT], size: Callable[[RunT], tuple[int, ...]]) -> RunT:
    """Run something with the same random numbers every time; if some may decide what runs, so that ``size`` is largest."""
    sources = ("torch", "numpy", "python")
    with _drawing(first := _Draws(dict.fromkeys(sources, True))):
        best = run()
    asked = [source for source in sources if source in first.asked]
    for choice in list(product((True, False), repeat=len(asked)))[1:]:
        draws = _Draws({**first.large, **dict(zip(asked, choice, strict=True))})
        # these draws may leave nothing to run
        with suppress(RuntimeError, ValueError, TypeError, LookupError, AssertionError), _drawing(draws):
            best = max(best, run(), key=size)
    return best


@contextmanager
def _drawing(draws: _Draws) -> Iterator[None]:
    torch.manual_seed(0)
    python = 3, (*_state(draws.large["python"]), 0), None
    random.setstate(python)
    keys = np.array(_state(draws.large["numpy"]), dtype=np.uint32)
    np.random.set_state(("MT19937", keys, 0, 0, 0.0))
    with _TorchDraws(draws):
        yield
    if random.getstate() != python:
        draws.asked.add("python")
    state: Any = np.random.get_state()
    if state[2] != 0 or not np.array_equal(state[1], keys):
        draws.asked.add("numpy")


class _TorchDraws(TorchFunctionMode):
    """Puts the numbers that torch draws for one decision, or for one of several blocks each, near one end."""

    def __init__(self, draws: _Draws) -> None:
        super().__init__()
        self.draws = draws

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        drawn = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name not in _DRAWN or not isinstance(drawn, Tensor):
            return drawn
        if drawn.numel() != 1 and (name in _ONE_NUMBER or drawn.ndim != 1):
            return drawn
        self.draws.asked.add("torch")
        largest = self.draws.large["torch"]
        if name == "randint":
            bounds = [value for value in args if isinstance(value, int)]
            value: float = bounds[-1] - 1 if largest else (bounds[0] if len(bounds) > 1 else 0)
        elif name in _ONE_NUMBER:
            value = float(largest)
        else:
            start, end = (*args[1:3], 0.0, 1.0)[:2] if name == "uniform_" and len(args) > 2 else (0.0, 1.0)
            value = start + (end - start) * (0.999 if largest else 0.001)
        # a number that is known is one even where tensors have no values
        known = name in ("bernoulli_", "uniform_") or drawn.numel() > 1
        return drawn.fill_(value) if known else drawn.new_tensor(value).reshape(drawn.shape)


@cache
def _state(large: bool) -> tuple[int, ...]:
    """State of a Mersenne Twister whose next words are all in the highest, or the lowest, part in a thousand."""
    generator = random.Random(0)
    high = (2**10 - 1) << 22 if large else 0
    return tuple(_untempered(high + generator.getrandbits(22)) for _ in range(_WORDS))


def _untempered(word: int) -> int:
    """Invert what a Mersenne Twister does to a word of its state before it returns it."""
    word ^= word >> 18
    word ^= (word << 15) & 0xEFC60000
    shifted = reduce(lambda guess, _: word ^ ((guess << 7) & 0x9D2C5680), range(5), word)
    return reduce(lambda guess, _: shifted ^ (guess >> 11), range(3), shifted)
