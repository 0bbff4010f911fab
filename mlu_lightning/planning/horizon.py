"""Batch size and duration: AdamW's numbers for runs with other batches, or more data, than the base.

The rules are those of Complete(d)P (arXiv 2512.22382), which come from AdamW's limit of small steps: they keep the noise
that a run has gathered when it ends. They go together with the table of any parameterization, by multiplication.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from mlu_lightning.table import OptimizerFamily, Scale


@dataclass(frozen=True)
class Forgetting:
    """A factor of 1 - β for every average that an optimizer keeps."""

    factor: float

    def __call__(self, betas: tuple[float, ...]) -> tuple[float, ...]:
        """Return the run's betas from the base's, none of which may become negative."""
        found = tuple(1 - (1 - beta) * self.factor for beta in betas)
        if min(found) < 0:
            worst = min(betas)
            raise ValueError(
                f"beta {worst:g} would become {min(found):g}: batch_ratio/token_ratio is {self.factor:g}, and 1 - beta is "
                "multiplied with it, because an average has to forget faster where there are fewer steps. Choose a "
                f"batch_ratio of less than {1 / (1 - worst):g} times the token_ratio, or larger betas at the base."
            )
        if max(found) >= 1:
            raise ValueError(
                f"beta {max(betas):g} would become 1, up to rounding: batch_ratio/token_ratio is {self.factor:g}, and "
                "1 - beta is multiplied with it. Choose ratios that are nearer to each other."
            )
        return found

    def undone(self, betas: tuple[float, ...]) -> tuple[float, ...]:
        """Return the base's betas from the run's."""
        return tuple(1 - (1 - beta) / self.factor for beta in betas)


@dataclass(frozen=True)
class Horizon:
    """Batch size and duration of a run, in tokens or samples, over those of the base.

    With s = sqrt(batch_ratio / token_ratio): lr·s, eps/s, decoupled decay·s, and (1 - β)·s² (Complete(d)P, arXiv
    2512.22382). The run has 1/s² times the base's optimizer steps.

    Raises:
        ValueError: if a ratio is not a positive number.

    >>> Horizon(batch_ratio=4.0).scaled(Scale(), OptimizerFamily.ADAMW)
    Scale(multiplier=1.0, std=1.0, lr=2.0, eps=0.5, weight_decay=2.0)
    >>> Horizon(batch_ratio=4.0, token_ratio=2.0).forgetting
    Forgetting(factor=2.0)
    """

    batch_ratio: float = 1.0
    token_ratio: float = 1.0

    def __post_init__(self) -> None:
        """Check the ratios."""
        for name in ("batch_ratio", "token_ratio"):
            value = getattr(self, name)
            if not 1e-20 <= value <= 1e20:  # as of all numbers in the file of a plan
                raise ValueError(
                    f"{name} is {value!r}, and it has to be a positive number, from 1e-20 to 1e+20: "
                    "what the run has over what the base has."
                )

    @property
    def is_identity(self) -> bool:
        """Whether the run has as many steps as the base, so that nothing is to be changed."""
        return self.batch_ratio == self.token_ratio

    @property
    def forgetting(self) -> Forgetting:
        """Factor of 1 - β, for every β."""
        return Forgetting(self.batch_ratio / self.token_ratio)

    def scaled(self, scale: Scale, family: OptimizerFamily) -> Scale:
        """Multiply a parameter's factors with those of batch size and duration."""
        if self.is_identity:
            return scale
        if family not in (OptimizerFamily.ADAM, OptimizerFamily.ADAMW):
            raise ValueError(
                f"batch_ratio={self.batch_ratio:g} and token_ratio={self.token_ratio:g} are given, and there are no rules "
                f"for them in the {family} family: those of Complete(d)P are AdamW's. Leave them at 1 and tune the "
                "learning rate for this batch size and duration, or use AdamW."
            )
        s = math.sqrt(self.forgetting.factor)
        return replace(scale, lr=scale.lr * s, eps=scale.eps / s, weight_decay=scale.weight_decay * s)
