"""A norm between a branch's last matrix and the addition undoes that matrix's scale, so that its std is another one."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers.architectures import ARCHITECTURES
from helpers.one_part_alone import INPUTS, TARGETS, distance_moved
from helpers.residual_networks import Net, added, stream
from torch import nn, optim

from mlu_lightning import Plan, attach_multipliers, initialize
from mlu_lightning.table import Ratios, Scale

HIDDEN, EMBEDDING = 64, 32


class Normed(Net):  # perceptrons with norms at both of their ends, as Gemma 2 has them, or without those at the end
    def __init__(self, hidden: int, embedding: int, last: bool = True) -> None:
        embed, blocks = nn.Linear(5, embedding), [self._block(hidden, embedding, last) for _ in range(3)]
        super().__init__(embed=embed, blocks=nn.ModuleList(blocks), out=nn.Linear(embedding, 1))

    @staticmethod
    def _block(hidden: int, embedding: int, last: bool) -> nn.Sequential:
        read, write = nn.Linear(embedding, hidden), nn.Linear(hidden, embedding, bias=False)
        ends = [nn.RMSNorm(embedding)] if last else []
        return nn.Sequential(nn.RMSNorm(embedding), read, nn.GELU(), write, *ends)


def _plan(module: nn.Module) -> Plan:
    return Plan.from_model(module, (INPUTS,), base=Normed(HIDDEN, EMBEDDING))


def test_numbers_are_those_of_branch_out_but_for_the_std() -> None:
    plan = _plan(Normed(16 * HIDDEN, 4 * EMBEDDING))
    planned = plan.parameters["blocks.0.3.weight"]
    assert (planned.row, planned.ratios) == ("branch_out (before_norm)", Ratios(inputs=16.0, outputs=4.0))
    expected = Scale(std=1 / 4, lr=1 / 16, eps=1 / 4, weight_decay=16.0)
    assert plan.scales("adamw")["blocks.0.3.weight"] == expected
    again = Plan.from_model(Normed(16 * HIDDEN, 4 * EMBEDDING), (INPUTS,), base=plan)
    assert again.scales("adamw") == plan.scales("adamw")


@pytest.mark.parametrize(
    ("name", "normed"),
    [("gemma2", True), ("bottleneck resnet", True), ("llama", False), ("bert", False), ("functional", False)],
)
def test_which_models_have_them(name: str, normed: bool) -> None:
    """BERT's norms come after the addition; those before the last matrix leave its scale alone."""
    architecture = ARCHITECTURES[name]
    module = architecture.build(2, 4, 32)
    plan = Plan.from_model(module, architecture.example, base=architecture.build(1, 4, 32))
    rows = {parameter.row for parameter in plan.parameters.values()}
    assert ("branch_out (before_norm)" in rows, "branch_out" in rows) == (normed, not normed)


@pytest.mark.parametrize(("m", "d"), [(16, 1), (1, 8), (8, 8)])
def test_that_matrix_moves_the_stream_equally_far(m: int, d: int) -> None:
    """Five steps of it alone, by Adam; with the std of other branches, it is another distance where M/D changes."""
    base, ours, others = (
        sum(_moved(*shape, variant, seed) for seed in range(3))
        for shape, variant in (((1, 1), True), ((m, d), True), ((m, d), False))
    )
    assert 1 / 1.5 < ours / base < 1.5
    if m != d:
        assert not 1 / 1.5 < others / base < 1.5


def _moved(m: int, d: int, variant: bool, seed: int) -> float:
    torch.manual_seed(seed)
    module = Normed(m * HIDDEN, d * EMBEDDING)
    plan = _plan(module)
    if not variant:
        parameters = {name: replace(parameter, variant=None) for name, parameter in plan.parameters.items()}
        plan = replace(plan, parameters=parameters)
    trained = [branch[3].weight for branch in module.blocks]
    return distance_moved(module, plan, trained, partial(optim.Adam, lr=1e-3), lambda x: stream(module, x, added))


def test_with_sgd_what_comes_before_the_matrix_does_not_move_equally_far() -> None:
    """A limit of the table: sqrt(m/d) times as far in the first step, 4 and 0.35, and without the norm it is 1."""
    bounds = {True: ((4 / 1.8, 4 * 1.8), (0.35 / 2.5, 0.35 * 2.5)), False: ((1 / 1.6, 1.6), (1 / 1.6, 1.6))}
    for last, (wide, embedded) in bounds.items():
        base = _features_moved(last, 1, 1)
        assert wide[0] < _features_moved(last, 16, 1) / base < wide[1]
        assert embedded[0] < _features_moved(last, 1, 8) / base < embedded[1]


def _features_moved(last: bool, m: int, d: int) -> float:
    """How far the first step of SGD moves pre-activations of the second branch: the geometric mean over seeds."""
    logs = []
    for seed in range(6):
        torch.manual_seed(seed)
        base, module = (Normed(i * HIDDEN, j * EMBEDDING, last) for i, j in ((1, 1), (m, d)))
        plan = Plan.from_model(module, (INPUTS,), base=base)
        initialize(module, plan)
        attach_multipliers(module, plan)
        (module(INPUTS) - TARGETS).square().mean().backward()
        norm, read, *_ = module.blocks[1]
        step = plan.scales("sgd")["blocks.1.1.weight"].lr * read.weight.grad
        stream = module.embed(INPUTS)
        logs.append((norm(stream + module.blocks[0](stream)) @ step.T).square().mean().sqrt().log().item())
    return math.exp(sum(logs) / len(logs))
