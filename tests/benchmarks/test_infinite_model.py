"""What gradient descent and its limit cost. Run with ``pytest tests/benchmarks --benchmark-enable -m slow -k infinite``."""

import time
from collections.abc import Callable
from timeit import repeat, timeit

import numpy as np
import pytest
import torch
from helpers.paper_network import Array, load, numpy_step
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from mlu_lightning import Plan, attach_multipliers, fold, initialize, scale_optimizer
from mlu_lightning.limit.infinite_model import embedding_weights, infinite_model
from mlu_lightning.models import ResNet
from mlu_lightning.observation.distances import output_distance, rms_distance

DEPTH, WIDTH, DATA = 100, 256, 5
ROUNDS, WARM_UP = 25, 3
UNITS = 250, 2000  # of infinite models, whose error is how far two with different units are from each other


def torch_step(dtype: torch.dtype, residual: str, arrays: dict[str, Array]) -> tuple[ResNet, Callable[[], None]]:
    module = ResNet(DEPTH, WIDTH, WIDTH, DATA, DATA, train_embedding=False).to(dtype)
    plan = Plan.from_model(module)
    load(module, *(arrays[name] for name in ("u", "v", "w_e", "w_u")))
    fold(module, plan) if residual == "fold" else attach_multipliers(module, plan)
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=1.0)
    scale_optimizer(optimizer, module, plan)
    x, y = (torch.from_numpy(arrays[name].T.copy()).to(dtype) for name in ("x", "y"))

    def step() -> None:
        optimizer.zero_grad()
        (0.5 * (module(x) - y).square().sum()).backward()
        optimizer.step()

    return module, step


def triad(numel: int, dtype: torch.dtype = torch.float32) -> Callable[[], object]:
    """STREAM's a = b + 3·c, which reads arrays twice and writes one, as a step at least does with its weights."""
    a, b, c = (torch.ones(numel, dtype=dtype) for _ in range(3))
    return lambda: torch.add(b, c, alpha=3, out=a)


@pytest.mark.slow
def test_gradient_step(benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str]) -> None:
    """D = M = 256, L = 100, N = 1, next to NumPy, and to the least that its weights can take: read twice, written once."""
    rng = np.random.default_rng(0)
    root = WIDTH**0.5
    arrays = {name: root * rng.normal(size=(DEPTH, WIDTH, WIDTH)) for name in ("u", "v")}
    arrays |= {name: rng.normal(size=(WIDTH, DATA)) for name in ("w_e", "w_u")}
    arrays |= {name: rng.normal(size=(DATA, 1)) for name in ("x", "y")}
    expected = numpy_step(**arrays)[1]
    steps: dict[str, Callable[[], object]] = {"NumPy": lambda: numpy_step(**arrays)}
    for dtype in (torch.float32, torch.float64):
        for residual in ("hook", "fold"):
            module, step = torch_step(dtype, residual, arrays)
            step()
            found = torch.stack([block.read.weight for block in module.blocks]).mT * WIDTH
            np.testing.assert_allclose(found.detach(), expected, rtol=1e-3, atol=1e-3)
            steps[f"{str(dtype).removeprefix('torch.')}, {residual}"] = step
        steps[f"{str(dtype).removeprefix('torch.')}, triad"] = triad(2 * DEPTH * WIDTH**2, dtype)

    def measure() -> dict[str, Array]:
        rounds = [[timeit(step, number=1) for step in steps.values()] for _ in range(ROUNDS)]
        return dict(zip(steps, np.array(rounds[WARM_UP:]).T, strict=True))

    measured = benchmark.pedantic(measure, rounds=1)
    with capsys.disabled():
        threads, least = torch.get_num_threads(), triad(2**25)
        for number in (1, 2, threads):
            torch.set_num_threads(number)
            print(f"memory, {number} threads: {3e-9 * 2**27 / min(repeat(least, number=1, repeat=10)):.1f} GB/s")
        print(f"NumPy step in float64: {1e3 * np.median(measured['NumPy']):.0f} ms; {threads} threads")
        for name in [name for name in list(steps)[1:] if not name.endswith("triad")]:
            times = np.median(measured[name] / measured[f"{name.partition(',')[0]}, triad"])
            print(f"{name}: {1e3 * np.median(measured[name]):.1f} ms, {times:.1f} times as a triad")
            ratios = measured["NumPy"] / measured[name]
            low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
            benchmark.extra_info[f"NumPy / {name}"] = {"median": middle, "quartiles": [low, high]}
            print(f"NumPy / {name}: {middle:.2f} (quartiles {low:.2f} to {high:.2f}, {ratios.size} steps)")


@pytest.mark.slow
def test_infinite_model_beside_a_network(benchmark: BenchmarkFixture, capsys: pytest.CaptureFixture[str]) -> None:
    """D = M = 2000, L = 50, K = 15 steps, N = 10. The aim is 100 times less for a smaller error."""
    draws = torch.Generator().manual_seed(0)
    x, y = torch.randn(10, DATA, generator=draws), torch.randn(10, DATA, generator=draws)

    def train(module: ResNet, plan: Plan) -> tuple[Tensor, Tensor, float]:
        optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.5)
        scale_optimizer(optimizer, module, plan)
        start = time.perf_counter()
        for _ in range(15):
            (module(x) - y).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        seconds = time.perf_counter() - start
        with torch.no_grad():
            stream = module.embed(x)
            for block in module.blocks:
                stream = stream + block(stream)
            return stream, module(x), seconds

    def measure() -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
        finite = ResNet(50, 2000, 2000, DATA, DATA, train_embedding=False)
        plan = Plan.from_model(finite)
        initialize(finite, plan, "normal")
        attach_multipliers(finite, plan)
        weights = embedding_weights(finite, plan)
        stream, output, whole = train(finite, plan)
        seconds, errors = {"finite": whole}, {}
        for units in UNITS:
            limits = [infinite_model(finite, plan, depth=50, units=units, seed=seed) for seed in (0, 1)]
            trained = [train(limit.module, limit.plan) for limit in limits]
            streams = [limit.in_coordinates_of(weights, found[0]) for limit, found in zip(limits, trained, strict=True)]
            seconds[f"{units} units"] = min(found[2] for found in trained)
            errors[f"{units} units"] = distances((streams[1], trained[1][1]), (streams[0], trained[0][1]))
        errors["finite"] = distances((stream, output), (streams[0], trained[0][1]))
        return seconds, errors

    seconds, errors = benchmark.pedantic(measure, rounds=1)
    with capsys.disabled():
        error = "{:.4f} and {:.4f}".format(*errors["finite"])
        print(f"\nD = M = 2000: {seconds['finite']:.1f} s, error of the stream and the output {error}")
        for name in list(seconds)[1:]:
            ratio = seconds["finite"] / seconds[name]
            benchmark.extra_info[name] = {"ratio": ratio, "errors": errors[name]}
            print(
                "infinite model of {}: {:.0f} times faster, error {:.4f} and {:.4f}".format(name, ratio, *errors[name])
            )
            assert all(own < other for own, other in zip(errors[name], errors["finite"], strict=True))


def distances(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> tuple[float, float]:
    return float(rms_distance(found[0], expected[0])), float(output_distance(found[1], expected[1]))
