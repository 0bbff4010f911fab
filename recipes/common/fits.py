"""Power laws: slopes of lines through logarithms, with their standard errors."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import linregress


@dataclass(frozen=True)
class Slope:
    """Slope of a line through logarithms."""

    value: float  # d log y / d log x
    error: float  # standard error, NaN if there are but two points
    factor: float  # y at x = 1

    def __str__(self) -> str:
        return f"{self.value:.2f}" if math.isnan(self.error) else f"{self.value:.2f} ± {self.error:.2f}"


def fit_slope(x: Sequence[float], y: Sequence[float]) -> Slope:
    """Fit a line to the logarithms of points by least squares, leaving out those that are not finite."""
    log_x, log_y = np.log(x), np.log(y)
    known = np.isfinite(log_y)
    if known.sum() < 2:
        return Slope(math.nan, math.nan, math.nan)
    line = linregress(log_x[known], log_y[known])
    error = float(line.stderr) if known.sum() > 2 else math.nan
    return Slope(float(line.slope), error, math.exp(line.intercept))


def root_mean_square(values: Collection[float]) -> float:
    """Root mean square, without overflow of the squares."""
    return math.hypot(*values) / math.sqrt(len(values))
