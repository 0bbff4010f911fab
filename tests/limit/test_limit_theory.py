"""The infinite model against theory.md, section 5, in NumPy."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from helpers.limit_models import INPUTS, OUTPUTS, STDS, Array, S, data, descend, planned, slope, tensors
from torch import Tensor

from mlu_lightning import Plan
from mlu_lightning.limit.infinite_model import InfiniteModel, infinite_model
from mlu_lightning.limit.unit_sampling import Sampling
from mlu_lightning.models import ResNet

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


def assert_follows(limit: InfiniteModel, theory: Theory, steps: int = 6) -> None:
    (x, y), (inputs, _) = data(), tensors()
    optimizer = limit.optimizer(theory.lr, theory.momentum, theory.decay)
    before, scale = theory.forward(x)[1], math.sqrt(len(theory.s)) * np.sqrt(theory.s)
    for step in range(steps + 1):
        if step:
            descend(limit.module, optimizer, 1)
            theory.step(x, y)
        a, f = theory.forward(x)
        # rounding of float64, which a few steps leave small at this learning rate: 3e-14 over many seeds
        close = {"rtol": 1e-11, "atol": 1e-12, "err_msg": f"step {step}"}
        for found, expected in zip(streams_of(limit.module, inputs), a, strict=True):
            np.testing.assert_allclose(found.numpy() / scale, expected.T, **close)
        np.testing.assert_allclose(limit.module(inputs).detach().numpy(), f.T, **close)
    assert np.isfinite(f).all() and np.abs(f - before).max() > 0.1, "it has learned something"


SGD = [(0.0, 0.0), (0.7, 0.0), (0.0, 0.2), (0.7, 0.2)]
SETTINGS = [(activation, 1.0, *sgd) for activation in SIGMA for sgd in SGD]
SETTINGS += [("tanh", alpha, 0.5, 0.1) for alpha in (0.5, 3.0)]


@pytest.mark.parametrize(("activation", "alpha", "momentum", "decay"), SETTINGS)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_it_is_that_of_theory(activation: str, alpha: float, trained: bool, momentum: float, decay: float) -> None:
    limit = infinite_model(*planned(activation, trained, alpha), depth=3, units=16, seed=1)
    np.testing.assert_allclose(limit.spread.numpy() ** 2, S, rtol=1e-14)
    assert_follows(limit, Theory(S, *coordinates(limit, S), activation, 0.2, momentum, decay, trained, alpha))


@pytest.mark.parametrize("alpha", [1.0, 2.0])
@pytest.mark.parametrize("shape", [(2, 8, 5), (7, 40, 12)], ids=["at the base's shape", "larger"])
def test_infinite_model_relative_to_a_base(shape: tuple[int, int, int], alpha: float) -> None:
    """At the base's own shape the finite network has no factors, and trains at the learning rate itself."""
    l0, m0, d0 = 2, 8, 5
    torch.manual_seed(0)
    base, module = (ResNet(*sizes, INPUTS, OUTPUTS).double() for sizes in ((l0, m0, d0), shape))
    limit = infinite_model(module, Plan.from_model(module, base=base, alpha=alpha), depth=3, units=16, seed=1)
    s = np.repeat([w.detach().square().mean().item() for w in (base.embed.weight, base.readout.weight)], (3, 2))
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
    optimizer = limit.optimizer(0.3, momentum, decay)
    expected = moments(4, 0.3, momentum, decay, trained, 8)
    assert np.abs(expected[-1] - expected[0]).max() > 0.3
    for step, output in enumerate(expected):
        found = limit.module(tensors()[0]).detach().numpy()
        np.testing.assert_allclose(found, output.T, rtol=1e-10, atol=1e-11, err_msg=str(step))
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
