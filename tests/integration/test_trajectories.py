"""Every optimizer with every scheduler: MLUCallback's run is that of a plain loop with parameter groups by hand."""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import pytest
import torch
from helpers.optimizers_by_hand import CASES, Case, Row
from helpers.perceptrons import INPUTS, OUTPUTS, Perceptron, role_of
from helpers.table_by_hand import EXPECTED, MUON, Shape, wanted
from helpers.trainers import loader, quiet
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn, optim
from torch.nn import functional as F
from torch.optim import lr_scheduler as lrs

from mlu_lightning import MLUCallback, Plan, Role

Residual = Literal["hook", "fold"]
Clip = Literal["none", "norm", "value"]

SAMPLES = 6
EPOCHS, BATCHES = 2, 4
CLIP = {"norm": 0.3, "value": 0.02}


class Sizes(NamedTuple):  # depth, hidden width and embedding dimension of the base and of the module
    base: tuple[int, int, int]
    shape: tuple[int, int, int]

    @property
    def ratios(self) -> Shape:
        depth, m, d = (size / base for size, base in zip(self.shape, self.base, strict=True))
        return Shape(depth, m, m, d, d)


# Ratios are powers of two and d is a square, so that every factor, also d^(-1/2), is exact
EXACT = Sizes((1, 2, 2), (2, 32, 8))


class Net(Perceptron):  # trains with any optimizer and any scheduler, and keeps its losses and learning rates
    def __init__(self, depth: int, hidden: int, embedding: int, cell: Cell | None = None) -> None:
        super().__init__(depth, hidden, embedding)
        self.cell = cell
        self.losses: list[Tensor] = []
        self.rates: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = super().training_step(batch)
        self.log("loss", loss)
        self.losses.append(loss.detach())
        return loss

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.rates.append(float(self.optimizers().param_groups[0]["lr"]))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        assert self.cell is not None
        optimizer = optimizer_of(CASES[self.cell.optimizer], [*trained(self, self.cell).values()])
        schedule: Any = {"scheduler": SCHEDULERS[self.cell.scheduler](optimizer), "interval": "step", "monitor": "loss"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}


class Cell(NamedTuple):  # one run of the matrix; the names of an optimizer and a scheduler
    optimizer: str
    scheduler: str
    accumulate: int
    clip: Clip


def in_momentum(optimizer: optim.Optimizer) -> bool:
    """Whether a cycle of the momentum finds one."""
    return "momentum" in optimizer.defaults or "betas" in optimizer.defaults


# Those with numbers of their own (eta_min, max_lr, min_lr) would be wrong if they saw multiplied groups
SCHEDULERS: dict[str, Callable[[optim.Optimizer], Any]] = {
    "LambdaLR": lambda opt: lrs.LambdaLR(opt, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda opt: lrs.MultiplicativeLR(opt, lambda step: 0.7),
    "StepLR": lambda opt: lrs.StepLR(opt, 2, 0.5),
    "MultiStepLR": lambda opt: lrs.MultiStepLR(opt, [1, 3], 0.3),
    "ConstantLR": lambda opt: lrs.ConstantLR(opt, 0.5, total_iters=2),
    "LinearLR": lambda opt: lrs.LinearLR(opt, 0.1, total_iters=5),
    "ExponentialLR": lambda opt: lrs.ExponentialLR(opt, 0.7),
    "SequentialLR": lambda o: lrs.SequentialLR(o, [lrs.LinearLR(o, 0.1, 1, 2), lrs.CosineAnnealingLR(o, 4, 2e-3)], [2]),
    "CosineAnnealingLR": lambda opt: lrs.CosineAnnealingLR(opt, 5, eta_min=0.002),
    "ChainedScheduler": lambda opt: lrs.ChainedScheduler([lrs.ConstantLR(opt, 0.5, 2), lrs.ExponentialLR(opt, 0.7)]),
    # the loss falls, so that "max" lowers the learning rate
    "ReduceLROnPlateau": lambda opt: lrs.ReduceLROnPlateau(opt, "max", 0.5, patience=0, min_lr=0.002),
    "CyclicLR": lambda opt: lrs.CyclicLR(opt, 0.002, 0.03, step_size_up=2, cycle_momentum=in_momentum(opt)),
    "CosineAnnealingWarmRestarts": lambda opt: lrs.CosineAnnealingWarmRestarts(opt, 3, eta_min=0.002),
    "OneCycleLR": lambda opt: lrs.OneCycleLR(opt, 0.03, total_steps=9, cycle_momentum=in_momentum(opt)),
    "PolynomialLR": lambda opt: lrs.PolynomialLR(opt, 6, power=2.0),
}
# SparseAdam takes nothing but sparse gradients
OPTIMIZERS = [name for name, case in CASES.items() if not case.sparse]
# Adafactor bounds squared gradients by eps[0]², too, which is meant to be small and is not here
ABSOLUTE = "adafactor-eps"
CLIPS: tuple[Clip, ...] = ("none", "norm", "value")
MATRIX = [Cell(*values) for values in itertools.product(OPTIMIZERS, SCHEDULERS, (1, 3), CLIPS)]


def optimizer_of(case: Case, parameters: list[Any]) -> optim.Optimizer:
    # schedulers write into a learning rate that is a tensor
    return case.make(parameters, **copy.deepcopy(case.numbers))


def trained(module: Net, cell: Cell) -> dict[str, nn.Parameter]:
    """All parameters, or the matrices of branches, which are what Muon takes."""
    everything = dict(module.named_parameters())
    if CASES[cell.optimizer].make is not optim.Muon:
        return everything
    return {name: p for name, p in everything.items() if role_of(name) in (Role.BRANCH_IN, Role.BRANCH_OUT)}


def row_of(name: str, sizes: Sizes) -> Row:
    role, at = role_of(name), sizes.ratios
    line, muon = EXPECTED[role](at), wanted(role, MUON, at)
    shape, base = sizes.shape[1:], sizes.base[1:]
    if role is Role.BRANCH_OUT:
        shape, base = shape[::-1], base[::-1]
    return Row(line.adam, line.sgd, line.eps, line.std, muon.lr, muon.eps, shape, base)


@lru_cache
def batches(dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCHES, SAMPLES, INPUTS, generator=generator).to(dtype)
    y = torch.randn(BATCHES, SAMPLES, OUTPUTS, generator=generator).to(dtype)
    return list(zip(x, y, strict=True))


@lru_cache
def plan_of(sizes: Sizes) -> Plan:
    return Plan.from_model(Net(*sizes.shape), batches(torch.float32)[0], base=Net(*sizes.base))


def fitted(cell: Cell, residual: Residual, sizes: Sizes, dtype: torch.dtype) -> Net:
    module = Net(*sizes.shape, cell=cell).to(dtype)
    clips = cell.clip != "none"
    clipping = {"gradient_clip_val": CLIP[cell.clip], "gradient_clip_algorithm": cell.clip} if clips else {}
    callback = MLUCallback(plan=plan_of(sizes), init=None, residual=residual)
    trainer = quiet(callback, max_epochs=EPOCHS, accumulate_grad_batches=cell.accumulate, **clipping)
    trainer.fit(module, loader(batches(dtype)))
    return module


def by_hand(cell: Cell, residual: Residual, sizes: Sizes, dtype: torch.dtype) -> Net:
    """The same in plain torch, with the table's numbers in a group for each parameter."""
    module, case, at = Net(*sizes.shape).to(dtype), CASES[cell.optimizer], sizes.ratios
    multipliers = {name: EXPECTED[role_of(name)](at).multiplier for name, _ in module.named_parameters()}
    held = multipliers if residual == "fold" else dict.fromkeys(multipliers, 1.0)
    branch, readout = (1 / at.depth, 1 / at.d) if residual == "hook" else (1.0, 1.0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter *= held[name]
    parameters = trained(module, cell)
    rows = [row_of(name, sizes).folded(held[name]) for name in parameters]
    optimizer = optimizer_of(case, [{"params": [parameter]} for parameter in parameters.values()])
    users = optimizer_of(case, [nn.Parameter(torch.zeros(2, 2))])
    scheduler, steps = SCHEDULERS[cell.scheduler](users), 0
    for index, (x, y) in enumerate(batches(dtype) * EPOCHS):
        module.rates.append(float(users.param_groups[0]["lr"]))
        stream = module.embed(x)
        for block in module.branches:
            stream = stream + branch * block(stream)
        output = readout * F.linear(module.norm(stream), module.readout.weight) + module.readout.bias
        loss = F.mse_loss(output, y)
        module.losses.append(loss.detach())
        (loss / cell.accumulate).backward()
        if (index % BATCHES + 1) % cell.accumulate and (index + 1) % BATCHES:
            continue
        clip(parameters, cell.clip, held)
        numbers = {key: value for key, value in users.param_groups[0].items() if key != "params"}
        for group, row in zip(optimizer.param_groups, rows, strict=True):
            group.update(case.by_hand(numbers, row, steps))
        optimizer.step()
        optimizer.zero_grad()
        users.step()
        scheduler.step(*[loss.detach()] if isinstance(scheduler, lrs.ReduceLROnPlateau) else [])
        steps += 1
    return module


def clip(parameters: dict[str, nn.Parameter], how: Clip, held: dict[str, float]) -> None:
    """Clip gradients of weights without multipliers, whether they hold them or not."""
    if how == "none":
        return
    for name, parameter in parameters.items():
        parameter.grad *= held[name]
    (nn.utils.clip_grad_norm_ if how == "norm" else nn.utils.clip_grad_value_)(parameters.values(), CLIP[how])
    for name, parameter in parameters.items():
        parameter.grad /= held[name]


def check(cell: Cell) -> None:
    """Bit for bit: all factors are powers of two."""
    start = dict(Net(*EXACT.shape).named_parameters())
    runs = []
    for residual in ("hook", "fold"):
        ours, theirs = (run(cell, residual, EXACT, torch.float32) for run in (fitted, by_hand))
        assert ours.rates == theirs.rates, (cell, residual)
        assert torch.equal(torch.stack(ours.losses), torch.stack(theirs.losses)), (cell, residual)
        for name, parameter in theirs.named_parameters():
            same = parameter.isfinite().all() and torch.equal(ours.get_parameter(name), parameter)
            assert same, (cell, residual, name)
        runs.append(ours)
    hook, fold = runs
    for name, parameter in hook.named_parameters():
        multiplier = EXPECTED[role_of(name)](EXACT.ratios).multiplier
        if cell.optimizer != ABSOLUTE:
            assert torch.equal(fold.get_parameter(name), parameter * multiplier), (cell, name)
        if name in trained(hook, cell):
            assert not torch.equal(parameter, start[name]), (cell, name)


def test_every_scheduler_of_torch_is_in_the_matrix() -> None:
    assert {*SCHEDULERS} == {*lrs.__all__} - {"LRScheduler"}


def sample(cells: list[Cell], each: int) -> list[Cell]:
    """Some cells of each optimizer that have, together, as many pairs of values as they can."""
    chosen: list[Cell] = []
    counts: Counter[Any] = Counter()
    for optimizer in OPTIMIZERS * each:
        candidates = [cell for cell in cells if cell.optimizer == optimizer]
        chosen.append(min(candidates, key=lambda cell: sum(counts[pair] for pair in pairs(cell))))
        counts.update(pairs(chosen[-1]))
    return chosen


def pairs(cell: Cell) -> list[Any]:
    return list(itertools.combinations(enumerate(cell), 2))


@pytest.mark.parametrize("cell", sample(MATRIX, 2), ids=lambda cell: "-".join(map(str, cell)))
def test_run_is_that_of_numbers_by_hand(cell: Cell) -> None:
    check(cell)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_whole_matrix(name: str) -> None:
    for cell in MATRIX:
        if cell.optimizer == name:
            check(cell)


# A rounding error decides a sign (Rprop), the digits of an input in half precision (Muon), or a bound (Adafactor)
UNEVEN = [name for name in OPTIMIZERS if not name.startswith(("rprop", "muon", "adafactor"))]
SIZES = st.tuples(*[st.integers(1, 6)] * 3)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    st.builds(Sizes, SIZES, SIZES),
    st.builds(Cell, *map(st.sampled_from, (UNEVEN, list(SCHEDULERS), (1, 3), CLIPS))),
    st.sampled_from(("hook", "fold")),
)
def test_run_is_that_of_numbers_by_hand_at_any_shape(sizes: Sizes, cell: Cell, residual: Residual) -> None:
    """Ratios below 1, with a single unit, coordinate or block: but for rounding, in double precision."""
    ours, theirs = (run(cell, residual, sizes, torch.float64) for run in (fitted, by_hand))
    assert ours.rates == theirs.rates
    torch.testing.assert_close(torch.stack(ours.losses), torch.stack(theirs.losses), rtol=1e-9, atol=1e-12)
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), parameter, rtol=1e-8, atol=1e-10)
