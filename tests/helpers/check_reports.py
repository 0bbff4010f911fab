"""Rows and reports of checks, from measurements that are made up."""

import math
from collections.abc import Callable

import numpy as np

from mlu_lightning import CheckReport, Shape
from mlu_lightning.checking.quantities import Kind, Quantity
from mlu_lightning.checking.verdicts import Point, fit_row

FACTORS = (1, 2, 4, 8)
READ = Quantity(Kind.UPDATE, "blocks.*.read.weight", "branch_in")


def points(law: Callable[[int, int], float], seeds: int = 3, factors: tuple[int, ...] = FACTORS) -> list[Point]:
    return [Point(f, seed, *[law(f, seed)] * 3) for f in factors for seed in range(seeds)]


def noisy(power: float, noise: float) -> Callable[[int, int], float]:
    draws = np.random.default_rng(0).normal(size=(9, 9)) * noise
    return lambda factor, seed: float((1 + seed) * factor**power * math.exp(draws[factor.bit_length(), seed]))


def failing_report(warnings: tuple[str, ...] = ()) -> CheckReport:
    rows = tuple(fit_row(READ, axis, points(noisy(1.0, 0.01))) for axis in ("depth", "hidden"))
    return CheckReport(Shape(2, 3, 4), FACTORS, 3, 5, rows, warnings)
