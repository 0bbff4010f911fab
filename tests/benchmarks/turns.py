"""Trainings in several threads that take turns, so that what slows the machine down for a while slows all of them down."""

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from lightning.pytorch import Callback, Trainer

__all__ = ["Runner", "Turns", "take_turns"]


class Turns:
    """Lets trainings in several threads take turns, a step each, and measures the steps.

    Every round has another order, so that none always finds the caches as the same other one leaves them. Times are the
    thread's processor time, which work of other processes does not lengthen.
    """

    def __init__(self, runners: int) -> None:
        self.seconds: list[list[float]] = [[] for _ in range(runners)]
        self._waiting = 0  # runners that have come to their first step
        self._order = random.Random(0)
        self._round: list[int] = []  # who is still to come in this round
        self._changed = threading.Condition()

    def wait_for_start(self, number: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting > number, timeout=600)

    def begin(self, number: int) -> None:
        with self._changed:
            self._waiting = max(self._waiting, number + 1)
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._next() == number, 600), "another runner has stopped"

    def end(self, number: int, seconds: float) -> None:
        with self._changed:
            self.seconds[number].append(seconds)
            self._round.pop(0)
            self._changed.notify_all()

    def _next(self) -> int | None:
        """Whose turn it is, None as long as not everyone has come."""
        if self._waiting < len(self.seconds):
            return None
        if not self._round:
            self._round = self._order.sample(range(len(self.seconds)), len(self.seconds))
        return self._round[0]


class Runner(Callback):  # one of those that take turns
    def __init__(self, turns: Turns, number: int) -> None:
        self._turns = turns
        self._number = number
        self._start = 0.0

    def on_train_batch_start(self, *_: object) -> None:
        self._turns.begin(self._number)
        self._start = time.thread_time()

    def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
        seconds = time.thread_time() - self._start
        for optimizer in trainer.optimizers:
            optimizer.zero_grad()  # as the next step does: those who wait need no memory for gradients
        self._turns.end(self._number, seconds)


def take_turns(turns: Turns, fit: Callable[[int], object]) -> np.ndarray:
    """Call ``fit`` for every runner, each in a thread; seconds of every step, [runner, step].

    A runner starts when those before it have come to their first step, so that start-ups do not disturb each other.
    """
    with ThreadPoolExecutor(len(turns.seconds)) as pool:
        fits = []
        for number in range(len(turns.seconds)):
            fits.append(pool.submit(fit, number))
            turns.wait_for_start(number)
        for done in fits:
            done.result()
    return np.array(turns.seconds)
