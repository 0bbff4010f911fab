"""The optimizer steps at which a run is observed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Steps = Literal["log"] | int | list[int]
"""``"log"`` for 0, 1, 2, 4, 8, 16, ... and the last step, a number n for every n steps, or a list of steps."""


@dataclass(frozen=True)
class Schedule:
    """Whether a run is looked at after an optimizer step."""

    steps: Steps

    def __post_init__(self) -> None:
        numbers = self.steps if isinstance(self.steps, list) else [self.steps]
        numbered = numbers and all(type(number) is int and number >= 0 for number in numbers) and self.steps != 0
        if self.steps != "log" and not numbered:
            raise ValueError(
                f'steps={self.steps!r} is none of: "log" (0, 1, 2, 4, 8, 16, ...), a number n (every n steps), or a list '
                "of steps from 0."
            )

    @property
    def ends_with_last(self) -> bool:
        """Whether the last step is looked at whatever its number is."""
        return self.steps == "log"

    def is_due(self, step: int) -> bool:
        """Whether the run is looked at after this many optimizer steps."""
        if isinstance(self.steps, list):
            return step in self.steps
        if isinstance(self.steps, int):
            return step % self.steps == 0
        return step & (step - 1) == 0
