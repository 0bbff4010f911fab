"""Steps of a run at which it is looked at."""

from __future__ import annotations

from typing import Literal

__all__ = ["Steps", "is_due", "validated_steps"]

Steps = Literal["log"] | int | list[int]
"""Optimizer steps: ``"log"``, every so many, or a list of them."""


def validated_steps(steps: Steps) -> Steps:
    """Refuse what is not a choice of steps.

    Args:
        steps: as in :func:`is_due`.

    Raises:
        ValueError: if it is none.

    >>> validated_steps([0, 10, 100])
    [0, 10, 100]
    """
    if steps == "log":
        return steps
    numbers = steps if isinstance(steps, list) else [steps]
    if not numbers or not all(type(number) is int and number >= 0 for number in numbers) or steps == 0:
        raise ValueError(
            f'steps={steps!r} is none of: "log" (0, 1, 2, 4, 8, 16, ...), a number n (every n steps), or a list '
            "of steps from 0."
        )
    return steps


def is_due(steps: Steps, step: int) -> bool:
    """Whether a run is looked at after a number of optimizer steps.

    Args:
        steps: ``"log"`` for 0 and the powers of two, a number n for 0 and the multiples of n, or a list.
        step: optimizer steps made so far.

    >>> [step for step in range(50) if is_due("log", step)]
    [0, 1, 2, 4, 8, 16, 32]
    """
    if isinstance(steps, list):
        return step in steps
    if isinstance(steps, int):
        return step % steps == 0
    return step & (step - 1) == 0
