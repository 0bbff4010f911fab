"""Tables of what was measured, and from which distance on the best learning rate moves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rich.table import Table

from mlu_lightning import Plan
from mlu_lightning.tuning.found import Estimate
from mlu_lightning.utilities.fitted_tables import number_table
from recipes.aspect.attention import Errors
from recipes.aspect.limit import Distances
from recipes.lr_transfer.report import NAMES
from recipes.lr_transfer.runs import Run, Shape, Study, shared_runs
from recipes.lr_transfer.search import DECADES, best, curves_of, mean, transfers


@dataclass(frozen=True)
class Row:
    """What became of the best learning rate at one shape, with one parameterization."""

    study: str
    change: str  # next to the base
    aspect: float  # M/D over the base's, of the kind of branch that is farthest from the limit
    ratio: float  # r = √(d/(l·m)), of that kind
    absolute: float  # √(D/(L·M)), of that kind
    parameterization: str
    runs_of: str  # parameterization whose runs these are
    drift: Estimate  # octaves
    bound: str  # "≤" or "≥" if the best may be further
    regret: Estimate
    loss: Estimate

    @property
    def kind(self) -> str:
        """What is trained, and by which optimizer, whatever the base."""
        return self.study.split(",")[0]


def rows_of(name: str, study: Study, plans: Mapping[tuple[Shape, str], Plan], runs: Sequence[Run]) -> Iterator[Row]:
    """Rows of a study, the base's first, each shape once; losses and regret are those at learning rates that were tried."""
    shared, curves = shared_runs(plans), curves_of(study, runs)
    seen: set[tuple[Shape, str]] = set()
    for transfer in transfers(study, shared, runs):
        key = shape, parameterization = study.shapes(transfer.axis)[transfer.factor], transfer.parameterization
        if key in seen:
            continue
        seen.add(key)
        far = max(plans[shape, "mlu"].distances, key=lambda distance: distance.ratio or 0.0)
        stream, ratio = plans[shape, "mlu"].streams[far.stream], far.ratio or math.nan
        changes = [f"{argument} {value}" for argument, value in shape if (argument, value) not in study.base]
        curve = curves[shape, shared[key], study.horizons[-1]]
        base = curves[study.base, shared[study.base, parameterization], study.horizons[-1]]
        own, kept = curve[best(curve).tried], curve[best(base).tried]
        regrets = [loss - least for loss, least in zip(kept, own, strict=True)]
        yield Row(
            study=name,
            change=", ".join(changes) or "base",
            aspect=stream.base_depth / stream.depth / ratio**2,
            ratio=ratio,
            absolute=far.absolute,
            parameterization=parameterization,
            runs_of=shared[key],
            drift=Estimate(transfer.drift.value / DECADES, transfer.drift.error / DECADES),
            bound=transfer.bound,
            regret=Estimate.over(regrets, mean(regrets)),
            loss=Estimate.over(own, mean(own)),
        )


def drift_table(rows: Sequence[Row]) -> Table:
    """Drift, regret and loss of every shape; parameterizations whose runs are the same have one line."""
    table = number_table("shape", "r", "√(D/LM)", "", "drift (octaves)", "regret", "loss")
    table.columns[3].justify = "left"
    for study in dict.fromkeys(row.study for row in rows):
        table.add_section()
        table.add_row(f"[bold]{study}[/bold]")
        of_study = [row for row in rows if row.study == study]
        compared = {row.parameterization for row in of_study}
        for change in dict.fromkeys(row.change for row in of_study):
            of_shape = [row for row in of_study if row.change == change]
            start = (change, f"{of_shape[0].ratio:.2f}", f"{of_shape[0].absolute:.2f}")
            for row in of_shape:
                if row.runs_of != row.parameterization:
                    continue
                same = [NAMES[other.parameterization] for other in of_shape if other.runs_of == row.runs_of]
                names = "all" if len(same) == len(compared) else ", ".join(same)
                drift = f"{row.bound} {row.drift.value:+.1f} ± {row.drift.error:.1f}".lstrip()
                regret = row.regret.text(3) if math.isfinite(row.regret.value) else "diverged"
                table.add_row(*start, names, drift, regret, row.loss.text(3))
                start = ("",) * 3
    return table


def thresholds(rows: Sequence[Row]) -> Iterator[str]:
    """Say from which size on the best learning rate of MLU falls, and how well ratio and absolute size explain it."""
    for name in dict.fromkeys(row.kind.split()[0] for row in rows):
        of_kind = [row for row in rows if row.parameterization == "mlu" and row.kind.split()[0] == name]
        if len(of_kind) < 8:  # two numbers are fitted
            continue
        drifts = np.array([row.drift.value for row in of_kind])
        for label, sizes in (
            ("r", [row.ratio for row in of_kind]),
            ("√(D/(L·M))", [row.absolute for row in of_kind]),
        ):
            start, slope, scatter = fit_onset(np.log2(sizes), drifts)
            left = [fit_onset(np.delete(np.log2(sizes), i), np.delete(drifts, i))[0] for i in range(len(drifts))]
            # jackknife
            error = math.sqrt((len(left) - 1) * float(np.var(left)))
            yield (
                f"{name}, MLU: the best lr goes as {label}^{slope:.1f} above {label} = {2**start:.2f} "
                f"(within a factor {2**error:.2f}); what is left is {scatter:.2f} octaves, {len(drifts)} shapes"
            )


def fit_onset(sizes: np.ndarray, drifts: np.ndarray) -> tuple[float, float, float]:
    """Fit drift = slope · max(0, size - start), in octaves, by least squares; what is left comes last."""
    found = []
    for start in np.linspace(min(sizes) - 1, max(sizes), 200):
        above = np.maximum(0, sizes - start)
        slope = float(above @ drifts / (above @ above)) if above.any() else 0.0
        found.append((float(np.sqrt(np.mean((drifts - slope * above) ** 2))), float(start), slope))
    scatter, start, slope = min(found)
    return start, slope, scatter


def attention_lines(found: Errors) -> Iterator[str]:
    """Errors of Transformers without perceptrons, and the constants that fit them."""
    for depth, error in found.depths.items():
        yield f"infinite model, {depth} Euler steps: {error:.3f}"
    for shape, estimate in found.shapes.items():
        yield f"L = {shape.depth}, {shape.hidden} heads, D = {shape.embedding}: {estimate.text(3)}"
    of_depth, hidden, embedding = found.constants
    yield (
        f"constants: depth {of_depth:.2g}, hidden {hidden:.2g}, embedding {embedding:.2g}; networks are within "
        f"{100 * found.scatter:.0f} % of the bound"
    )


def limit_table(found: Sequence[Distances]) -> Table:
    """Distances from the infinite model and from the widest network, by parameterization and hidden width."""
    table = number_table("parameterization", "M", "M/D", "to the infinite model", "to the widest of its kind")
    for row in found:
        cells = (each.text(3) if each.value < 100 else "diverged" for each in (row.to_limit, row.to_widest))
        table.add_row(NAMES[row.parameterization], str(row.hidden), f"{row.aspect:g}", *cells)
    return table
