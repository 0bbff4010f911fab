"""Weights that are drawn anew: their distribution, what they depend on, coordinates that models share, and shards."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers.initial_weights import BASE_STD, MODES, Bag, plan_of, rms, seeded
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from mlu_lightning import Plan, Ratios, Role, initialize
from mlu_lightning.models import CausalTransformer, ResNet


def test_normal_is_normal() -> None:
    module = seeded(lambda: nn.Linear(200, 100))
    initialize(module, plan_of(module), "normal")
    values = np.sort(module.weight.detach().double().numpy().ravel()) / (BASE_STD / 2)
    expected = torch.special.ndtr(torch.from_numpy(values)).numpy()
    distance = np.abs(expected - (np.arange(values.size) + 0.5) / values.size).max()
    assert distance < 1.95 / math.sqrt(values.size)  # Kolmogorov and Smirnov, 0.1 % level


@pytest.mark.parametrize("mode", ["normal", "coupled"])
def test_draws_depend_on_seed_and_name_only(mode: str) -> None:
    def drawn(seed: int, built: int) -> dict[str, Tensor]:
        module = seeded(lambda: nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(2))), built)
        return dict(initialize(module, plan_of(module, role=Role.EMBEDDING), mode, seed).named_parameters())

    first, again, other = drawn(0, built=0), drawn(0, built=1), drawn(1, built=0)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.isclose(first[name], other[name]).any() for name in first)
    assert not torch.isclose(first["0.weight"], first["1.weight"]).any()


@pytest.mark.parametrize("mode", ["normal", "coupled"])
def test_half_precision_is_rounded_from_the_same_draws(mode: str) -> None:
    def drawn(dtype: torch.dtype) -> Tensor:
        module = nn.Linear(7, 9, bias=False, dtype=dtype)
        return initialize(module, plan_of(module, role=Role.EMBEDDING), mode).weight.detach()

    single = drawn(torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(drawn(dtype), single.to(dtype))
    torch.testing.assert_close(drawn(torch.float64).float(), single, rtol=2e-7, atol=0)


DATA = 17  # not D, except where the test says so
# How embeddings and readouts are stored: shape for a D, axis of D, role, fans, transposed
LAYOUTS: dict[str, tuple[Callable[[int], tuple[int, ...]], int, Role, bool]] = {
    "nn.Embedding": (lambda d: (DATA, d), 1, Role.EMBEDDING, True),
    "nn.Linear in": (lambda d: (d, DATA), 0, Role.EMBEDDING, False),
    "patches": (lambda d: (d, 3, 2, 2), 0, Role.EMBEDDING, False),
    "positions": (lambda d: (1, 5, d), 2, Role.EMBEDDING, True),
    "class token": (lambda d: (1, 1, d), 2, Role.EMBEDDING, True),
    "bias": (lambda d: (d,), 0, Role.EMBEDDING, False),
    "nn.Linear out": (lambda d: (DATA, d), 1, Role.READOUT, False),
    "transposed out": (lambda d: (d, DATA), 0, Role.READOUT, True),
    "convolution out": (lambda d: (DATA, d, 1, 1), 1, Role.READOUT, False),
}


def coupled(layout: str, width: int) -> Tensor:
    shape, axis, role, transposed = LAYOUTS[layout]
    module = seeded(lambda: Bag(p=torch.randn(shape(width))), width)
    reads = role is Role.READOUT
    fans = (width, DATA) if reads else (DATA, width)
    ratios = Ratios(inputs=width / 8) if reads else Ratios(outputs=width / 8)
    plan = plan_of(module, role=role, fans=fans, transposed=transposed, ratios=ratios)
    return initialize(module, plan, "coupled").p.detach().movedim(axis, 0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_small_model_has_the_first_coordinates_of_a_bigger_one(layout: str) -> None:
    big = coupled(layout, 64)
    for width in (1, 7, 16, DATA, 33, 63):
        assert torch.equal(coupled(layout, width), big[:width])
    assert rms(big) == pytest.approx(BASE_STD, rel=5 / math.sqrt(4 / 2 * big.numel()))
    assert big.unique().numel() == big.numel()


def test_a_coordinate_that_was_built_as_zero_is_drawn_too() -> None:
    """Else a random zero in a small model would tell it from the bigger one."""
    module = seeded(lambda: nn.Linear(3, 5, bias=False))
    nn.init.zeros_(module.weight[2])
    plan = plan_of(module, role=Role.EMBEDDING)
    assert initialize(module, plan, "coupled").weight.all()


def test_coupled_transformers() -> None:
    """From plans of real modules: tables and readout are coupled, branches are rescaled only."""

    def model(embedding: int, heads: int, depth: int) -> CausalTransformer:
        return seeded(lambda: CausalTransformer(19, 8, depth, embedding, heads), embedding)

    base, wide, small = model(12, 2, 1), model(40, 3, 2), model(20, 1, 1)
    built = {name: value.clone() for name, value in wide.named_parameters()}
    for module in (wide, small, base):
        initialize(module, Plan.from_model(module, base=model(12, 2, 1)), "coupled", seed=5)
    names = [name for name in built if name.startswith(("tokens", "positions", "readout"))]
    assert len(names) > 1
    for module, width in ((small, 20), (base, 12)):
        for name in names:
            assert torch.equal(module.get_parameter(name), wide.get_parameter(name)[:, :width])
    for name in built.keys() - set(names):
        ratios = (wide.get_parameter(name) / built[name])[built[name] != 0]
        torch.testing.assert_close(ratios, ratios.mean().expand_as(ratios))


PLACEMENTS = {"rows": Shard(0), "columns": Shard(1), "whole": Replicate()}


def readouts() -> nn.Module:
    return seeded(lambda: Bag(**{name: torch.randn(7, 5, dtype=torch.float64) + 1 for name in PLACEMENTS}))


def initialize_shards(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for mode in MODES:
        module = readouts()
        for name, placement in PLACEMENTS.items():
            shards = distribute_tensor(module.get_parameter(name).detach(), mesh, [placement])
            module.register_parameter(name, nn.Parameter(shards))
        initialize(module, plan_of(module, role=Role.READOUT), mode)
        full = {name: value.full_tensor().detach() for name, value in module.named_parameters()}
        torch.save(full, f"{folder}/{mode}-{rank}.pt")
    dist.destroy_process_group()


def test_shards_on_two_processes_are_those_of_one(tmp_path: Path) -> None:
    mp.start_processes(initialize_shards, (str(tmp_path),), nprocs=2, start_method="fork")
    for mode in MODES:
        module = readouts()
        whole = dict(initialize(module, plan_of(module, role=Role.READOUT), mode).state_dict())
        for rank in range(2):
            # sums of squares are added in another order
            tolerance = 1e-14 if mode == "rescale" else 0
            full = torch.load(tmp_path / f"{mode}-{rank}.pt")
            torch.testing.assert_close(full, whole, rtol=tolerance, atol=0)


@pytest.mark.parametrize("mode", ["normal", "coupled"])
def test_draws_do_not_depend_on_the_default_dtype(mode: Any) -> None:
    base, built = (ResNet(2, 8, embedding, inputs=3, outputs=2) for embedding in (4, 6))
    plan = Plan.from_model(built, base=base)
    usual = initialize(copy.deepcopy(built), plan, mode)
    try:
        torch.set_default_dtype(torch.float64)
        other = initialize(copy.deepcopy(built), plan, mode)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, usual.parameters(), other.parameters()))
