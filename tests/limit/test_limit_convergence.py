"""Finite networks against the infinite model: exactly without fluctuations, and how errors fall with size."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.limit_models import VOCABULARY, planned, planned_transformer, slope, tensors, tokens
from helpers.recipe_modules import load
from torch import Tensor, nn

from mlu_lightning import Plan, attach_multipliers, initialize, scale_optimizer
from mlu_lightning.limit.infinite_model import InfiniteModel, embedding_weights, infinite_model
from mlu_lightning.models import ResNet

recipe = load("recipes.common.gradient_descent")


def with_exact_covariance(weights: Tensor, spread: Tensor) -> Tensor:
    """W with the same span and WᵀW/D = S exactly: what the law of large numbers makes of it as D grows."""
    q, triangle = torch.linalg.qr(weights)
    return q * triangle.diagonal().sign() * math.sqrt(len(weights)) * spread


class Experiment:  # the paper's (theory.md, section 6): tanh, five inputs and outputs, ten samples, η = 1
    def __init__(self, steps: int) -> None:
        draws = torch.Generator().manual_seed(0)
        inputs, targets = torch.randn(10, 5, generator=draws), torch.randn(10, 5, generator=draws)
        self.problem = recipe.Problem(inputs, targets, 5**-0.5, 5**0.5, lr=1.0, loss_scale=1 / 100, steps=steps)
        self.limits: dict[int, tuple[InfiniteModel, dict[str, Tensor]]] = {}

    def limit(self, depth: int) -> tuple[InfiniteModel, dict[str, Tensor]]:
        """Of the same depth as the network, so that Euler steps are no part of the distance; noise is below 0.004."""
        if depth not in self.limits:
            limit = self.problem.limit(depth, 32768 // depth)
            recipe.descend(limit.module, limit.plan, self.problem)
            self.limits[depth] = limit, recipe.look(limit.module, limit.plan, self.problem)
        return self.limits[depth]

    def errors(self, shape: tuple[int, int, int], seeds: int, exact: bool = False) -> dict[str, float]:
        """Root mean square over seeds of the distance of networks from the limit, in the stream and in the output.

        With ``exact`` the networks have W of the exact covariance: there is no term 1/sqrt(D) then.
        """
        limit, expected = self.limit(shape[0])
        squares: dict[str, list[float]] = {"s=1": [], "output": []}
        for seed in range(seeds):
            module, plan, weights = recipe.finite_model(self.problem, *shape, seed, embedding_seed=seed)
            if exact:
                weights = with_exact_covariance(weights, limit.spread)
                with torch.no_grad():
                    module.embed.weight.copy_(weights[:, :5])
                    module.readout.weight.copy_(weights[:, 5:].T)
            recipe.descend(module, plan, self.problem)
            found = recipe.look(module, plan, self.problem)
            stream = limit.in_coordinates_of(weights, expected["s=1"])
            squares["s=1"].append((found["s=1"] - stream).square().mean().item())
            squares["output"].append((found["output"] - expected["output"]).square().mean().item())
        return {name: math.sqrt(np.mean(values)) for name, values in squares.items()}

    def slopes(self, sizes: list[int], shapes: list[tuple[int, int, int]], seeds: int, exact: bool) -> dict[str, float]:
        found = [self.errors(shape, seeds, exact) for shape in shapes]
        return {name: slope(sizes, [errors[name] for errors in found]) for name in found[0]}


SIZES = {
    # where M is large: that of W's covariance; over other sets of 10 seeds -0.49 ± 0.06 and, of outputs, -0.52 ± 0.07
    "embedding": ([16, 64], lambda size: (4, 4096, size), 10, {"s=1": 0.15, "output": 0.2}),
    # where D/(LM) is largest, in networks as they are; over other sets of 3 seeds -0.543 ± 0.005: D/(LM) from 4 to 0.5,
    # where it is not small, adds to the exponent
    "hidden": ([16, 32, 64, 128], lambda size: (8, size, 512), 3, {"s=1": 0.1}),
    # two units in a block, and the limit of the network's own depth: D/(LM), not 1/L, is left; -0.49 ± 0.05
    "depth": ([8, 16, 32, 64], lambda size: (size, 2, 64), 3, {"s=1": 0.15}),
}


@pytest.mark.parametrize("size", SIZES)
def test_error_falls_with_the_square_root_of_each_size(size: str) -> None:
    sizes, shape, seeds, margins = SIZES[size]
    found = Experiment(steps=6).slopes(sizes, [shape(number) for number in sizes], seeds, exact=False)
    for name, margin in margins.items():
        assert found[name] == pytest.approx(-0.5, abs=margin), found


def test_output_error_falls_with_the_hidden_width_itself() -> None:
    """D/(LM) on outputs, where streams have its square root (theory.md, section 2): what large D adds to the error.

    W has the exact covariance, so that there is no 1/sqrt(D). What is left at small D is the noise of the network as
    a sum over LM units, 1/sqrt(LM), and is subtracted.
    """
    experiment, sizes = Experiment(steps=15), [64, 128, 256]
    large = [experiment.errors((8, hidden, 512), 4, exact=True) for hidden in sizes]
    small = [experiment.errors((8, hidden, 16), 4, exact=True) for hidden in sizes]
    excess = [math.sqrt(a["output"] ** 2 - b["output"] ** 2) for a, b in zip(large, small, strict=True)]
    # over other sets of 4 seeds: -0.99 ± 0.07, -0.91 ± 0.06 without the subtraction, -0.513 ± 0.005 and -0.49 ± 0.06
    assert slope(sizes, excess) == pytest.approx(-1, abs=0.2), excess
    assert slope(sizes, [errors["output"] for errors in large]) < -0.75
    assert slope(sizes, [errors["s=1"] for errors in large]) == pytest.approx(-0.5, abs=0.05)
    assert slope(sizes, [errors["output"] for errors in small]) == pytest.approx(-0.5, abs=0.2)


def test_output_error_falls_faster_with_depth_than_that_of_the_stream() -> None:
    """The same along the depth, at sizes that take seconds; W has the exact covariance."""
    experiment, sizes = Experiment(steps=15), [16, 64]
    errors = [experiment.errors((depth, 8, 256), 4, exact=True) for depth in sizes]
    # over other sets of 6 seeds -0.81 ± 0.07 (D/(LM) from 2 to 0.5, and the noise 1/sqrt(LM)) and -0.515 ± 0.006
    assert -1.05 < slope(sizes, [error["output"] for error in errors]) < -0.6, errors
    assert slope(sizes, [error["s=1"] for error in errors]) == pytest.approx(-0.5, abs=0.05), errors


def lifted(limit: InfiniteModel, dimension: int, seed: int = 0) -> tuple[Any, Plan]:
    """A network of any embedding dimension D that is the infinite model exactly, by the argument of theory.md, section 5.

    W' of the infinite model is turned into D dimensions, W = sqrt(D/r) Q W' with orthonormal columns of Q, and every
    unit becomes four, whose u and v have the parts of the infinite model's in the span of Q, and outside of it ±ũ and ±ṽ,
    the same for all four but for their signs. These are what is averaged out in the infinite model; here they cancel.
    """
    own: dict[str, Any] = dict(limit.module.hparams)
    names = ("hidden",) if isinstance(limit.module, ResNet) else ("heads", "mlp_hidden")
    module = type(limit.module)(**own | {"embedding": dimension} | {name: 4 * own[name] for name in names})
    module.double()
    plan = Plan.from_model(module, alpha=limit.plan.alpha)
    draws = torch.Generator().manual_seed(seed)
    r = own["embedding"]
    turn = torch.linalg.qr(torch.randn(dimension, dimension, generator=draws).double())[0]
    q, rest = turn[:, :r], turn[:, r:]
    root = math.sqrt(dimension / r)
    signs = {"branch_in": (1, 1, -1, -1), "branch_out": (1, -1, 1, -1)}
    given = dict(limit.module.named_parameters())
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            role, values = plan.roles[name].value, given[name].detach()
            reads = role != "branch_out" and name != "embed.weight"  # [outputs, D]; a table is [tokens, D]
            values = values if reads else values.T
            inside = values @ q.T * {"branch_in": 1 / root, "branch_out": root / 4}.get(role, root)
            if role in signs:
                # of the size of a usual initialization, so that they would be seen if they did not cancel
                outside = torch.randn(len(values), dimension - r, generator=draws).double() * inside.std() @ rest.T
                inside = torch.cat([inside + sign * outside for sign in signs[role]])
            parameter.copy_(inside if reads else inside.T)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(given[name].requires_grad)
    attach_multipliers(module, plan)
    return module, plan


def assert_the_same(limit: InfiniteModel, batch: tuple[Tensor, Tensor], embed: str, lr: float) -> None:
    module, plan = lifted(limit, 3 * limit.module.hparams["embedding"])
    weights = embedding_weights(module, plan)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizers = [torch.optim.SGD(trained, lr, 0.5, weight_decay=0.1), limit.optimizer(lr, 0.5, 0.1)]
    scale_optimizer(optimizers[0], module, plan)
    first = limit.module(batch[0]).detach()
    for _ in range(6):
        looks = []
        for network, optimizer in zip((module, limit.module), optimizers, strict=True):
            output = network(batch[0])
            looks.append((stream_of(network, embed, batch[0]), output.detach()))
            loss = F.mse_loss(output, batch[1]) if embed == "embed" else F.cross_entropy(output.mT, batch[1])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        (stream, output), (small, limit_output) = looks
        torch.testing.assert_close(output, limit_output, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(stream, limit.in_coordinates_of(weights, small), rtol=1e-9, atol=1e-10)
    assert (limit_output - first).abs().max() > 0.1


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_network_without_fluctuations_is_the_infinite_model(alpha: float, trained: bool) -> None:
    limit = infinite_model(*planned("tanh", trained, alpha), depth=3, units=16)
    assert_the_same(limit, tensors(), "embed", 0.2)


@pytest.mark.parametrize("mlp_hidden", [0, 8])
def test_transformer_without_fluctuations_is_the_infinite_model(mlp_hidden: int) -> None:
    """Attention, rotary positions, norms, token table: the recursion of theory.md is not needed for this."""
    module, plan = planned_transformer(mlp_hidden=mlp_hidden)
    limit = infinite_model(module.double(), plan, depth=4, units=16, heads=6)
    assert limit.module.hparams["mlp_hidden"] == (16 if mlp_hidden else 0)
    assert_the_same(limit, (tokens()[:, :-1], tokens()[:, 1:]), "tokens", 0.5)


@torch.no_grad()
def stream_of(module: nn.Module, embed: str, inputs: Tensor) -> Tensor:
    stream: Tensor = module.get_submodule(embed)(inputs)
    for block in module.get_submodule("blocks" if embed == "embed" else "branches").children():
        stream = stream + block(stream)
    return stream


def train_transformer(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(6):
        optimizer.zero_grad()
        F.cross_entropy(module(tokens()[:, :-1]).mT, tokens()[:, 1:]).backward()
        optimizer.step()


@pytest.mark.parametrize("perceptrons", [False, True], ids=["attention", "attention and perceptrons"])
def test_error_of_transformers_falls_with_the_square_root_of_heads(perceptrons: bool) -> None:
    """D/(L heads) from 0.25 to 0.0625, at a W of the exact covariance, and the limit of the network's depth."""
    sizes = {"depth": 2 if perceptrons else 4, "embedding": 32}
    module, plan = planned_transformer(**sizes, mlp_hidden=8 if perceptrons else 0)
    limit = infinite_model(module, plan, units=1024, heads=512)
    train_transformer(limit.module, limit.optimizer(0.5))
    expected = stream_of(limit.module, "tokens", tokens()[:, :-1])
    errors, heads = [], [32, 128]
    for number in heads:
        squares = []
        for seed in range(4):
            module, plan = planned_transformer(**sizes, heads=number, mlp_hidden=4 * number if perceptrons else 0)
            initialize(module, plan, "normal", seed)
            weights = with_exact_covariance(embedding_weights(module, plan), limit.spread)
            with torch.no_grad():
                module.tokens.weight.copy_(weights[:, :VOCABULARY].T)
                module.readout.weight.copy_(weights[:, VOCABULARY:].T)
            attach_multipliers(module, plan)
            optimizer = torch.optim.SGD(module.parameters(), 0.5)
            scale_optimizer(optimizer, module, plan)
            train_transformer(module, optimizer)
            difference = stream_of(module, "tokens", tokens()[:, :-1]) - limit.in_coordinates_of(weights, expected)
            squares.append(difference.square().mean().item())
        errors.append(math.sqrt(np.mean(squares)))
    # over other sets of 4 seeds -0.54 ± 0.04 and -0.51 ± 0.03
    assert slope(heads, errors) == pytest.approx(-0.5, abs=0.12), errors
