"""The infinite model against theory.md, section 5, in NumPy, and finite networks against the infinite model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from recipe_modules import load
from torch import Tensor, nn

from mlu_lightning import Plan, attach_multipliers, fold, initialize, scale_optimizer
from mlu_lightning.horizon import Horizon
from mlu_lightning.limit import (
    InfiniteModel,
    check_gradient_descent,
    check_initialization,
    embedding_weights,
    infinite_model,
)
from mlu_lightning.models import CausalTransformer, ResNet
from mlu_lightning.rules import Parameterization
from mlu_lightning.units import Sampling

recipe = load("gradient_descent")

Array = NDArray[np.float64]

INPUTS, OUTPUTS, SAMPLES = 3, 2, 4
STDS = {"embed.weight": 0.7, "readout.weight": 1.9}
"""Far from each other, so that S is far from a multiple of the identity."""
S = np.repeat(np.square([*STDS.values()]), [INPUTS, OUTPUTS])


def data() -> tuple[Array, Array]:
    rng = np.random.default_rng(0)
    return rng.normal(size=(INPUTS, SAMPLES)), rng.normal(size=(OUTPUTS, SAMPLES))


def tensors() -> tuple[Tensor, Tensor]:
    x, y = data()
    return torch.from_numpy(x.T.copy()), torch.from_numpy(y.T.copy())


def planned(activation: str = "tanh", trained: bool = True, alpha: float = 1.0, **shape: int) -> tuple[ResNet, Plan]:
    """A network in float64 and its plan in the absolute form, with the variances of S."""
    shape = {"depth": 2, "hidden": 8, "embedding": 6} | shape
    module = ResNet(**shape, inputs=INPUTS, outputs=OUTPUTS, activation=activation, train_embedding=trained).double()
    plan = Plan.from_model(module, alpha=alpha)
    parameters = {
        name: replace(parameter, base_std=STDS.get(name, parameter.base_std))
        for name, parameter in plan.parameters.items()
    }
    return module, replace(plan, parameters=parameters)


SIGMA: dict[str, tuple[Callable[[Array], Array], Callable[[Array], Array]]] = {
    "tanh": (np.tanh, lambda p: 1 - np.tanh(p) ** 2),
    "relu": (lambda p: np.maximum(p, 0), lambda p: (p > 0).astype(float)),
    "positive": (lambda p: p, np.ones_like),
}


@dataclass
class Theory:
    """theory.md, section 5, in its own coordinates a, c [r, samples] and u, v [depth, r, units].

    Relative to a base of depth L0, hidden width M0 and embedding D0 the network is that of the absolute form up to
    constants: h' = α L0 E[v σ], f = D0 A_U' S a, and of updates those of u, v and A_E are multiplied by D0/(M0 α),
    M0/(D0 α) and 1/D0. All of these are one in the absolute form. Embeddings W A_E and readouts W A_U begin as the
    columns of W; momentum and decay, which is added to what the learning rate is multiplied with, are those of SGD.
    """

    s: Array
    u: Array
    v: Array
    activation: str
    lr: float
    momentum: float = 0.0
    decay: float = 0.0
    trained: bool = True
    alpha: float = 1.0
    base: tuple[int, int, int] = (1, 1, 1)
    moving: dict[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.a_e, self.a_u = np.split(np.eye(len(self.s)), [INPUTS], axis=1)

    def forward(self, x: Array) -> tuple[list[Array], Array]:
        depth, units = len(self.u), self.u.shape[2]
        sigma, _ = SIGMA[self.activation]
        a = [self.a_e @ x]
        for u, v in zip(self.u, self.v, strict=True):
            mean = v @ sigma(u.T @ a[-1]) / units
            a.append(a[-1] + self.alpha * self.base[0] / depth * mean / self.s[:, None])
        return a, self.base[2] * self.a_u.T @ (self.s[:, None] * a[-1])

    def step(self, x: Array, y: Array) -> None:
        """One step on the mean squared error."""
        depth, units = len(self.u), self.u.shape[2]
        l0, m0, d0 = self.base
        sigma, slope = SIGMA[self.activation]
        a, f = self.forward(x)
        error = 2 * (f - y) / f.size
        c = d0 * self.a_u @ error
        g_u, g_v = np.empty_like(self.u), np.empty_like(self.v)
        for i in reversed(range(depth)):
            p, q = self.u[i].T @ a[i], self.v[i].T @ c
            g_u[i] = d0 / (m0 * self.alpha) * (self.s[:, None] * a[i]) @ (slope(p) * q).T
            g_v[i] = m0 / (d0 * self.alpha) * (self.s[:, None] * c) @ sigma(p).T
            c = c + self.alpha * l0 / depth * (self.u[i] @ (slope(p) * q) / units) / self.s[:, None]
        gradients = {"u": g_u, "v": g_v}
        if self.trained:
            gradients |= {"a_e": c @ x.T / d0, "a_u": a[-1] @ error.T}
        for name, gradient in gradients.items():
            value = getattr(self, name)
            moved = self.momentum * self.moving.get(name, 0.0) + gradient + self.decay * value
            self.moving[name] = moved
            setattr(self, name, value - self.lr * moved)


def coordinates(limit: InfiniteModel, s: Array) -> tuple[Array, Array]:
    """u = Wᵀ U/r and v = Wᵀ V/r of the network of dimension r, whose W is sqrt(r) S^(1/2)."""
    r, root = len(s), np.sqrt(s)[:, None]
    blocks: Any = limit.module.blocks
    u = [root * math.sqrt(r) * block.read.weight.detach().numpy().T for block in blocks]
    v = [root / math.sqrt(r) * len(block.read.weight) * block.write.weight.detach().numpy() for block in blocks]
    return np.stack(u), np.stack(v)


def streams_of(module: Any, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        h = [module.embed(x)]
        for block in module.blocks:
            h.append(h[-1] + block(h[-1]))
    return h


def descend(module: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    x, y = tensors()
    for _ in range(steps):
        loss = F.mse_loss(module(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def assert_follows(limit: InfiniteModel, theory: Theory, steps: int = 6) -> None:
    """Train both, and compare streams at all depths and outputs."""
    (x, y), (inputs, _) = data(), tensors()
    optimizer = limit.optimizer(theory.lr, theory.momentum, theory.decay)
    before = theory.forward(x)[1]
    for step in range(steps + 1):
        a, f = theory.forward(x)
        scale = math.sqrt(len(theory.s)) * np.sqrt(theory.s)
        # rounding of float64, which a few steps leave small at this learning rate: 3e-14 over many seeds
        tolerance = {"rtol": 1e-11, "atol": 1e-12}
        for found, expected in zip(streams_of(limit.module, inputs), a, strict=True):
            np.testing.assert_allclose(found.numpy() / scale, expected.T, **tolerance, err_msg=f"step {step}")
        np.testing.assert_allclose(limit.module(inputs).detach().numpy(), f.T, **tolerance)
        if step < steps:
            descend(limit.module, optimizer, 1)
            theory.step(x, y)
    assert np.isfinite(f).all() and np.abs(f - before).max() > 0.1, "it has learned something"


@pytest.mark.parametrize(("momentum", "decay"), [(0.0, 0.0), (0.7, 0.0), (0.0, 0.2), (0.7, 0.2)])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("activation", ["tanh", "relu", "positive"])
def test_infinite_model_is_that_of_theory(activation: str, trained: bool, momentum: float, decay: float) -> None:
    limit = infinite_model(*planned(activation, trained), depth=3, units=16, seed=1)
    np.testing.assert_allclose(limit.spread.numpy() ** 2, S, rtol=1e-14)
    u, v = coordinates(limit, S)
    assert_follows(limit, Theory(S, u, v, activation, 0.2, momentum, decay, trained))


@pytest.mark.parametrize("alpha", [0.5, 3.0])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_infinite_model_of_another_richness(trained: bool, alpha: float) -> None:
    limit = infinite_model(*planned("tanh", trained, alpha), depth=3, units=16, seed=1)
    u, v = coordinates(limit, S)
    assert_follows(limit, Theory(S, u, v, "tanh", 0.2, 0.5, 0.1, trained, alpha))


@pytest.mark.parametrize("alpha", [1.0, 2.0])
@pytest.mark.parametrize("shape", [(2, 8, 5), (7, 40, 12)], ids=["at the base's shape", "larger"])
def test_infinite_model_relative_to_a_base(shape: tuple[int, int, int], alpha: float) -> None:
    """At the base's own shape the finite network has no factors, and trains at the learning rate itself."""
    l0, m0, d0 = 2, 8, 5
    torch.manual_seed(0)
    base = ResNet(l0, m0, d0, INPUTS, OUTPUTS).double()
    module = ResNet(*shape, INPUTS, OUTPUTS).double()
    plan = Plan.from_model(module, base=base, alpha=alpha)
    limit = infinite_model(module, plan, depth=3, units=16, seed=1)

    variances = [weight.detach().square().mean().item() for weight in (base.embed.weight, base.readout.weight)]
    s = np.repeat(variances, [INPUTS, OUTPUTS])
    u, v = coordinates(limit, s)
    # of 3 · 5 · 16 draws, in units of what the base begins with: 4 standard deviations of their variance
    for values, name, factor in ((u, "read", d0), (v, "write", m0**2 / d0)):
        weights = torch.cat([block.get_submodule(name).weight.flatten() for block in base.blocks])  # type: ignore[union-attr]
        wanted = weights.detach().square().mean().item() * factor
        assert (values**2 / s[:, None]).mean() == pytest.approx(wanted, rel=4 * math.sqrt(2 / values.size)), name
    assert_follows(limit, Theory(s, u, v, "tanh", 0.2, 0.5, 0.1, True, alpha, (l0, m0, d0)))


def test_units_have_the_covariance_of_the_population() -> None:
    """u and v are N(0, S), independent: with the exact units of a linear activation, without any noise."""
    limit = infinite_model(*planned("positive"), depth=3)
    for u, v in zip(*coordinates(limit, S), strict=True):
        both = np.concatenate((u, v))
        np.testing.assert_allclose(both @ both.T / both.shape[1], np.diag([*S, *S]), rtol=1e-13, atol=1e-13)
    limit = infinite_model(*planned("tanh"), depth=3, units=10000)
    for u, v in zip(*coordinates(limit, S), strict=True):
        both = np.concatenate((u, v)) / np.sqrt([*S, *S])[:, None]
        np.testing.assert_allclose(both @ both.T / both.shape[1], np.eye(10), atol=5 * math.sqrt(2 / 10000))


def moments(depth: int, lr: float, momentum: float, decay: float, trained: bool, steps: int) -> list[Array]:
    """Outputs of the infinite linear model before each step, from C = E[w wᵀ] with w = (u, v) and what SGD adds to them.

    In coordinates rescaled so that S = 1: an update is w ← w - η m with m ← μ m + K w, K = [[λ, A], [Aᵀ, λ]] and
    A = Σ a cᵀ over samples. Without momentum it is theory.md's C ← T C Tᵀ with T = 1 - η K.
    """
    x, y = data()
    r = INPUTS + OUTPUTS
    one, zero = np.eye(2 * r), np.zeros((2 * r, 2 * r))
    c_moments = [np.block([[one, zero], [zero, zero]]) for _ in range(depth)]
    a_e = np.eye(r)[:, :INPUTS] * STDS["embed.weight"]
    a_u = np.eye(r)[:, INPUTS:] * STDS["readout.weight"]
    m_e, m_u = np.zeros_like(a_e), np.zeros_like(a_u)
    outputs = []
    for _ in range(steps + 1):
        a = [a_e @ x]
        for moment in c_moments:
            a.append(a[-1] + moment[r : 2 * r, :r] @ a[-1] / depth)
        outputs.append(a_u.T @ a[-1])
        error = 2 * (outputs[-1] - y) / y.size
        c = a_u @ error
        for i in reversed(range(depth)):
            product = a[i] @ c.T
            k = decay * np.eye(2 * r)
            k[:r, r:], k[r:, :r] = product, product.T
            c = c + c_moments[i][:r, r : 2 * r] @ c / depth
            t = np.block([[one - lr * k, -lr * momentum * one], [k, momentum * one]])
            c_moments[i] = t @ c_moments[i] @ t.T
        if trained:
            # W A_E in rescaled coordinates is S^(1/2) A_E, and inputs enter it as they are
            m_e = momentum * m_e + c @ x.T + decay * a_e
            m_u = momentum * m_u + a[-1] @ error.T + decay * a_u
            a_e, a_u = a_e - lr * m_e, a_u - lr * m_u
    return outputs


@pytest.mark.parametrize(("momentum", "decay"), [(0.0, 0.0), (0.7, 0.1)])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_linear_model_is_the_recursion_of_moments(trained: bool, momentum: float, decay: float) -> None:
    """With 2r units, where sampled ones would be as many as samples allow; over several samples."""
    limit = infinite_model(*planned("positive", trained), depth=4)
    x, _ = tensors()
    optimizer = limit.optimizer(0.3, momentum, decay)
    expected = moments(4, 0.3, momentum, decay, trained, 8)
    assert np.abs(expected[-1] - expected[0]).max() > 0.3
    for step, output in enumerate(expected):
        np.testing.assert_allclose(
            limit.module(x).detach().numpy(), output.T, rtol=1e-10, atol=1e-11, err_msg=str(step)
        )
        descend(limit.module, optimizer, 1)


def test_sampled_units_converge_to_the_exact_ones() -> None:
    """As 1/sqrt(units): root mean square over seeds of the error in the outputs of a trained linear model."""
    x, _ = tensors()
    exact = moments(3, 0.3, 0.0, 0.0, False, 6)[-1].T

    def error(units: int, sampling: Sampling) -> float:
        squares = []
        for seed in range(20):
            limit = infinite_model(*planned("positive", False), 3, units, sampling=sampling, seed=seed)
            descend(limit.module, limit.optimizer(0.3), 6)
            squares.append(np.square(limit.module(x).detach().numpy() - exact).mean())
        return math.sqrt(np.mean(squares))

    independent = [error(units, "independent") for units in (64, 1024)]
    # over other sets of 20 seeds -0.51 ± 0.05
    assert slope([64, 1024], independent) == pytest.approx(-0.5, abs=0.15), independent
    assert error(64, "orthogonal") < 0.75 * independent[0] < 0.1


def slope(sizes: list[int], errors: list[float]) -> float:
    return float(np.polyfit(np.log(sizes), np.log(errors), 1)[0])


@pytest.mark.parametrize("shapes", [[(2, 8, 5), (2, 64, 32)], [(2, 8, 5), (6, 16, 12)]])
def test_infinite_model_is_that_of_the_base_not_of_the_shape(shapes: list[tuple[int, int, int]]) -> None:
    torch.manual_seed(0)
    base = ResNet(1, 8, 5, INPUTS, OUTPUTS)
    modules = [ResNet(*shape, INPUTS, OUTPUTS) for shape in shapes]
    limits = [infinite_model(module, Plan.from_model(module, base=base), depth=3, units=16) for module in modules]
    one, other = limits
    assert all(map(torch.equal, one.module.parameters(), other.module.parameters()))
    x, _ = tensors()
    for limit in limits:
        descend(limit.module.double(), limit.optimizer(0.3, 0.5, 0.1), 4)
    assert torch.equal(one.module(x), other.module(x))


def with_exact_covariance(weights: Tensor, spread: Tensor) -> Tensor:
    """W with the same span and WᵀW/D = S exactly: what the law of large numbers makes of it as D grows."""
    q, triangle = torch.linalg.qr(weights)
    return q * triangle.diagonal().sign() * math.sqrt(len(weights)) * spread


class Experiment:
    """The paper's (theory.md, section 6): tanh, five inputs and outputs, ten samples, η = 1."""

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


def test_error_falls_with_the_square_root_of_the_embedding_dimension() -> None:
    """Where M is large: that of W's covariance, 1/sqrt(D), in streams and outputs."""
    found = Experiment(steps=6).slopes([16, 64], [(4, 4096, 16), (4, 4096, 64)], 10, exact=False)
    # over other sets of 10 seeds -0.49 ± 0.06 and -0.52 ± 0.07
    assert found["s=1"] == pytest.approx(-0.5, abs=0.15), found
    assert found["output"] == pytest.approx(-0.5, abs=0.2), found


def test_error_falls_with_the_square_root_of_the_hidden_width() -> None:
    """Where D/(LM) is largest, in networks as they are."""
    sizes = [16, 32, 64, 128]
    found = Experiment(steps=6).slopes(sizes, [(8, hidden, 512) for hidden in sizes], 3, exact=False)
    # over other sets of 3 seeds -0.543 ± 0.005: D/(LM) from 4 to 0.5, where it is not small, adds to the exponent
    assert found["s=1"] == pytest.approx(-0.5, abs=0.1), found


def test_error_falls_with_the_square_root_of_the_depth() -> None:
    """Two units in a block, and the limit of the network's own depth: D/(LM), not 1/L, is left."""
    sizes = [8, 16, 32, 64]
    found = Experiment(steps=6).slopes(sizes, [(depth, 2, 64) for depth in sizes], 3, exact=False)
    # over other sets of 3 seeds -0.49 ± 0.05
    assert found["s=1"] == pytest.approx(-0.5, abs=0.15), found


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
    errors = [experiment.errors((depth, 8, 256), 6, exact=True) for depth in sizes]
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
    """Train the infinite model and a network that is its equal, and compare."""
    module, plan = lifted(limit, 3 * limit.module.hparams["embedding"])
    weights = embedding_weights(module, plan)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizers = [torch.optim.SGD(trained, lr, 0.5, weight_decay=0.1), limit.optimizer(lr, 0.5, 0.1)]
    scale_optimizer(optimizers[0], module, plan)
    first = limit.module(batch[0]).detach()
    for _ in range(6):
        looks = []
        for network, optimizer in zip((module, limit.module), optimizers, strict=True):
            stream = network.get_submodule(embed)(batch[0])
            for block in network.get_submodule("blocks" if embed == "embed" else "branches"):  # type: ignore[operator]
                stream = stream + block(stream)
            output = network(batch[0])
            looks.append((stream.detach(), output.detach()))
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


VOCABULARY, CONTEXT = 5, 4


def tokens(samples: int = 4) -> Tensor:
    return torch.randint(VOCABULARY, (samples, CONTEXT + 1), generator=torch.Generator().manual_seed(0))


def transformer(**sizes: Any) -> CausalTransformer:
    usual = {"depth": 2, "embedding": 8, "heads": 2, "head_dim": 4, "mlp_hidden": 8, "norm_gains": False}
    return CausalTransformer(VOCABULARY, CONTEXT, **usual | {"optimizer": "sgd"} | sizes)


def planned_transformer(**sizes: Any) -> tuple[CausalTransformer, Plan]:
    """With norms of 1 and 2 of the entries of W, by which norms and logits differ from those of any other S."""
    module = transformer(**sizes)
    plan = Plan.from_model(module)
    stds = {"tokens.weight": 1.0, "readout.weight": 2.0}
    parameters = {
        name: replace(parameter, base_std=stds.get(name, parameter.base_std))
        for name, parameter in plan.parameters.items()
    }
    return module, replace(plan, parameters=parameters)


@pytest.mark.parametrize("mlp_hidden", [0, 8])
def test_transformer_without_fluctuations_is_the_infinite_model(mlp_hidden: int) -> None:
    """Attention, rotary positions, norms, token table: the recursion of theory.md is not needed for this."""
    module, plan = planned_transformer(mlp_hidden=mlp_hidden)
    limit = infinite_model(module.double(), plan, depth=4, units=16, heads=6)
    assert limit.module.hparams["mlp_hidden"] == (16 if mlp_hidden else 0)
    assert_the_same(limit, (tokens()[:, :-1], tokens()[:, 1:]), "tokens", 0.5)


def streams_of_transformer(module: Any, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        stream = module.tokens(inputs)
        for branch in module.branches:
            stream = stream + branch(stream)
    return stream.flatten(0, 1)  # type: ignore[no-any-return]


def train_transformer(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(6):
        loss = F.cross_entropy(module(tokens()[:, :-1]).mT, tokens()[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("perceptrons", [False, True], ids=["attention", "attention and perceptrons"])
def test_error_of_transformers_falls_with_the_square_root_of_heads(perceptrons: bool) -> None:
    """D/(L heads) from 0.25 to 0.0625, at a W of the exact covariance, and the limit of the network's depth."""
    sizes = {"depth": 2 if perceptrons else 4, "embedding": 32}
    inputs = tokens()[:, :-1]
    module, plan = planned_transformer(**sizes, mlp_hidden=8 if perceptrons else 0)
    limit = infinite_model(module, plan, units=1024, heads=512)
    train_transformer(limit.module, limit.optimizer(0.5))
    expected = streams_of_transformer(limit.module, inputs)
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
            stream = limit.in_coordinates_of(weights, expected)
            squares.append((streams_of_transformer(module, inputs) - stream).square().mean().item())
        errors.append(math.sqrt(np.mean(squares)))
    # over other sets of 4 seeds -0.54 ± 0.04 and -0.51 ± 0.03
    assert slope(heads, errors) == pytest.approx(-0.5, abs=0.12), errors


def test_default_sizes() -> None:
    module, plan = planned("tanh", depth=3)
    limit = infinite_model(module, plan)
    assert (len(limit.module.blocks), limit.module.blocks[0].read.weight.shape) == (3, (1024, 5))  # type: ignore[union-attr]
    module, plan = planned("positive", depth=3)
    assert infinite_model(module, plan, depth=7).module.blocks[6].read.weight.shape == (10, 5)  # type: ignore[union-attr]
    perceptrons = transformer(depth=3)
    limit = infinite_model(perceptrons, Plan.from_model(perceptrons), depth=4, units=80)
    own = limit.module.hparams
    assert (own["depth"], own["heads"], own["mlp_hidden"], own["embedding"]) == (2, 6, 80, 10)  # 80/(4 · 4), made even
    attention = transformer(depth=3, mlp_hidden=0)
    own = infinite_model(attention, Plan.from_model(attention)).module.hparams
    assert (own["depth"], own["heads"], own["mlp_hidden"], own["embedding"]) == (3, 64, 0, 10)


@pytest.mark.parametrize("trained", [False, True])
def test_infinite_model_is_made_as_the_module_is_and_leaves_it_alone(trained: bool) -> None:
    module, plan = planned("tanh", trained)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    torch.manual_seed(3)
    state = torch.get_rng_state()
    limit = infinite_model(module, plan, units=16)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(value.equal(before[name]) for name, value in module.state_dict().items())
    own = dict(limit.module.named_parameters())
    assert own["embed.weight"].requires_grad == own["readout.weight"].requires_grad == trained
    assert own["blocks.0.read.weight"].requires_grad
    assert {parameter.dtype for parameter in own.values()} == {torch.float64}
    assert {p.dtype for p in infinite_model(module.bfloat16(), plan, units=16).module.parameters()} == {torch.float32}


@pytest.mark.parametrize("mlp_hidden", [0, 8, None], ids=["attention", "attention and perceptrons", "ResNet"])
def test_branches_are_zero_at_the_start(mlp_hidden: int | None) -> None:
    """Units read independently of what they write, which is zero on average: exactly, if pairs write the opposite."""
    module, plan = planned() if mlp_hidden is None else planned_transformer(mlp_hidden=mlp_hidden)
    limit = infinite_model(module.double(), plan, depth=4, units=32, heads=8)
    inputs = tensors()[0] if mlp_hidden is None else tokens()[:, :-1]
    for branch in limit.module.get_submodule("blocks" if mlp_hidden is None else "branches").children():
        stream = limit.module.get_submodule("embed" if mlp_hidden is None else "tokens")(inputs)
        assert branch(stream).abs().max() < 1e-14
    independent = infinite_model(module, plan, depth=4, units=32, heads=8, sampling="independent").module
    assert (independent(inputs) - limit.module(inputs)).abs().max() > 0.01


def test_units_depend_on_the_seed_alone() -> None:
    module, plan = planned()
    torch.manual_seed(1)
    one = infinite_model(module, plan, units=16, seed=4).module.state_dict()
    torch.manual_seed(2)
    same = infinite_model(planned()[0], plan, units=16, seed=4).module.state_dict()
    assert all(map(torch.equal, one.values(), same.values()))
    other = infinite_model(module, plan, units=16, seed=5).module.state_dict()
    differ = {name.split(".", 2)[-1] for name in one if not torch.equal(one[name], other[name])}
    assert differ == {"read.weight", "write.weight"}
    assert not torch.equal(one["blocks.0.read.weight"], one["blocks.1.read.weight"])


@pytest.mark.parametrize("base", [False, True])
def test_weights_of_embedding_and_readout_without_multipliers(base: bool) -> None:
    torch.manual_seed(0)
    module = ResNet(4, 8, 6, INPUTS, OUTPUTS)
    plan = Plan.from_model(module, base=ResNet(2, 8, 3, INPUTS, OUTPUTS) if base else None)
    initialize(module, plan)
    expected = torch.cat((module.embed.weight, module.readout.weight.T), 1).detach().clone()
    assert torch.equal(embedding_weights(module, plan), expected)
    assert not embedding_weights(module, plan).requires_grad
    handle = attach_multipliers(module, plan)
    assert torch.equal(embedding_weights(module, plan), expected)
    handle.remove()
    fold(module, plan)
    # of a product with 1/d, undone: one rounding each
    torch.testing.assert_close(embedding_weights(module, plan), expected, rtol=2e-7, atol=0)
    torch.testing.assert_close(module.readout.weight.T * (2 if base else 6), expected[:, INPUTS:], rtol=2e-7, atol=0)
    copied = embedding_weights(module, plan)
    with torch.no_grad():
        module.embed.weight.zero_()
    assert torch.equal(embedding_weights(module, plan)[:, :INPUTS], torch.zeros(6, INPUTS))
    torch.testing.assert_close(copied, expected, rtol=2e-7, atol=0)


def test_streams_in_the_coordinates_of_a_finite_network() -> None:
    limit = infinite_model(*planned(), units=16)
    rng = np.random.default_rng(0)
    w, h = rng.normal(size=(9, 5)), rng.normal(size=(2, 4, 5))
    a = h / np.sqrt(5) / np.sqrt(S)
    found = limit.in_coordinates_of(torch.from_numpy(w), torch.from_numpy(h))
    np.testing.assert_allclose(found.numpy(), a @ w.T, rtol=1e-12)


class Other(ResNet):
    """Might do anything."""


def test_unknown_classes_are_refused() -> None:
    module = Other(2, 8, 6, INPUTS, OUTPUTS)
    with pytest.raises(ValueError, match=r"The infinite model of Other is not known: .*Use one of these, or compare"):
        infinite_model(module, Plan.from_model(module))
    with pytest.raises(ValueError, match=r"The infinite model of Linear is not known"):
        infinite_model(nn.Linear(2, 2), Plan.from_model(module))


@pytest.mark.parametrize("shape", [{"depth": 4}, {"depth": 1}, {"embedding": 7}])
def test_plan_of_another_module_is_refused(shape: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"The plan was not made for this ResNet: .* (is in the|in the module)"):
        infinite_model(planned(**shape)[0], planned()[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"rules": Parameterization.MUP}, "rules='mup'"), ({"horizon": Horizon(batch_ratio=2.0)}, "batch_ratio=2")],
)
def test_limit_of_other_rules_is_refused(changes: dict[str, Any], message: str) -> None:
    module, plan = planned()
    with pytest.raises(ValueError, match=rf"{message}.*is that of the MLU parameterization under gradient descent"):
        infinite_model(module, replace(plan, **changes))


def test_gains_of_norms_are_refused_unless_they_stay_one() -> None:
    module = transformer(norm_gains=True)
    plan = Plan.from_model(module)
    message = (
        r"branches.0.norm.weight is a branch_norm, and .*gains of their own.*CausalTransformer\(norm_gains=False\)"
    )
    with pytest.raises(ValueError, match=message):
        infinite_model(module, plan)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_("norm" not in name)
    limit = infinite_model(module, plan, units=16)
    assert not any(p.requires_grad or bool((p != 1).any()) for n, p in limit.module.named_parameters() if "norm" in n)
    with torch.no_grad():
        module.norm.weight.fill_(2)
    with pytest.raises(ValueError, match=r"norm.weight is a stream_norm, and "):
        infinite_model(module, plan)


def test_partly_frozen_blocks_are_refused() -> None:
    module, plan = planned(depth=3)
    module.blocks[1].write.weight.requires_grad_(False)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"Some of blocks.\*.write.weight are frozen and some are not.*all of them or"):
        infinite_model(module, plan)
    for block in module.blocks:
        block.write.weight.requires_grad_(False)  # type: ignore[union-attr]
    limit = infinite_model(module, plan, depth=5, units=16)
    assert [block.write.weight.requires_grad for block in limit.module.blocks] == [False] * 5  # type: ignore[union-attr]
    assert [block.read.weight.requires_grad for block in limit.module.blocks] == [True] * 5  # type: ignore[union-attr]


def test_readouts_that_start_at_zero_are_refused() -> None:
    base = ResNet(2, 8, 6, INPUTS, OUTPUTS)
    nn.init.zeros_(base.readout.weight)
    module = ResNet(2, 16, 12, INPUTS, OUTPUTS)
    plan = Plan.from_model(module, base=base)
    with pytest.raises(ValueError, match=r"readout.weight starts at zero, and .*or write base_std into the saved plan"):
        infinite_model(module, plan)
    check_initialization(initialize(module, plan), plan)  # that is as planned
    unknown = {"readout.weight": replace(plan.parameters["readout.weight"], base_std=None)}
    with pytest.raises(ValueError, match=r"readout.weight starts at a size that the plan does not know, and "):
        infinite_model(module, replace(plan, parameters=plan.parameters | unknown))
    known = {"readout.weight": replace(plan.parameters["readout.weight"], base_std=0.3)}
    limit = infinite_model(module, replace(plan, parameters=plan.parameters | known))
    torch.testing.assert_close(limit.spread[INPUTS:], torch.full((OUTPUTS,), 0.3))


def test_sizes_that_the_limit_cannot_have_are_refused() -> None:
    module = transformer()
    with pytest.raises(ValueError, match=r"depth=5 of the infinite model is no even number.*Give an even depth"):
        infinite_model(module, Plan.from_model(module), depth=5)
    with pytest.raises(ValueError, match=r'7 hidden units or heads cannot be "orthogonal"'):
        infinite_model(*planned(), units=7)
    assert len(infinite_model(*planned(), units=7, sampling="independent").module.blocks) == 2  # type: ignore[arg-type]
    attention = transformer(mlp_hidden=0)
    assert infinite_model(attention, Plan.from_model(attention), depth=5, heads=2).module.hparams["depth"] == 5


def weights_of(count: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2)) for _ in range(count)]


def test_other_optimizers_are_refused() -> None:
    sgd, adam = torch.optim.SGD(weights_of(1), 0.1), torch.optim.AdamW(weights_of(1), 0.1)
    for optimizers, names in (
        ([adam], "AdamW"),
        ([sgd, adam], "SGD and AdamW"),
        ([sgd, sgd], "SGD and SGD"),
        ([torch.optim.RMSprop(weights_of(1))], "RMSprop"),
    ):
        with pytest.raises(ValueError, match=rf"this run has {names}: .*Train with SGD, or compare with a large run"):
            check_gradient_descent(optimizers)
    check_gradient_descent([sgd])


@pytest.mark.parametrize(
    "other",
    [{"lr": 0.2}, {"momentum": 0.5}, {"weight_decay": 0.1}, {"dampening": 0.5}, {"momentum": 0.9, "nesterov": True}],
)
def test_groups_with_other_hyperparameters_are_refused(other: dict[str, Any]) -> None:
    one, two = weights_of(2)
    optimizer = torch.optim.SGD([{"params": [one]}, {"params": [two], **other}], lr=0.1)
    with pytest.raises(
        ValueError, match=r"has 2 groups with different ones, or maximizes\. Give all parameters the same"
    ):
        check_gradient_descent([optimizer])
    check_gradient_descent([torch.optim.SGD([{"params": [one], **other}, {"params": [two], **other}], lr=0.1)])


def test_maximization_is_refused() -> None:
    with pytest.raises(ValueError, match=r"has 1 groups with different ones, or maximizes"):
        check_gradient_descent([torch.optim.SGD(weights_of(1), 0.1, maximize=True)])


@pytest.mark.parametrize("mode", ["rescale", "normal", "coupled"])
@pytest.mark.parametrize("folded", [False, True])
def test_weights_that_were_just_initialized_are_accepted(mode: Any, folded: bool) -> None:
    for seed in range(30):
        torch.manual_seed(seed)
        module = ResNet(2, 4, 3, INPUTS, OUTPUTS)
        plan = Plan.from_model(module, base=ResNet(1, 2, 2, INPUTS, OUTPUTS))
        initialize(module, plan, mode, seed)
        if folded:
            fold(module, plan)
        check_initialization(module, plan)


def test_other_weights_are_refused() -> None:
    torch.manual_seed(0)
    module = ResNet(2, 64, 32, INPUTS, OUTPUTS)
    plan = Plan.from_model(module)
    message = r"{} has entries of root mean square {}, and the plan's .* has {}, so .*MLUCallback\(init=\"rescale\"\)"
    built = module.readout.weight.square().mean().sqrt().item()
    initialize(module, plan)
    with torch.no_grad():
        module.readout.weight.mul_(built)
    with pytest.raises(ValueError, match=message.format("readout.weight", f"{built:.3g}", "1")):
        check_initialization(module, plan)
    initialize(module, plan)
    with torch.no_grad():
        module.blocks[1].read.weight.mul_(1.25)  # type: ignore[union-attr, operator]
    with pytest.raises(ValueError, match=message.format("blocks.1.read.weight", r"0\.\d+", f"{32**-0.5:.3g}")):
        check_initialization(module, plan)
    initialize(module, plan)
    for value in (0.0, math.nan):
        with torch.no_grad():
            module.embed.weight.fill_(value)
        with pytest.raises(ValueError, match=message.format("embed.weight", f"{value:.3g}", ".*")):
            check_initialization(module, plan)
