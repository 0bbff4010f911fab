"""Weights that a module computes from parameters: they have the table's std and steps, or are refused by name."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.residual_networks import Net
from lightning.pytorch import LightningModule
from torch import Tensor, nn, optim
from torch.autograd import Function
from torch.nn import functional as F
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from mlu_lightning import Plan, Shape, attach_multipliers, check, fold, initialize, scale_optimizer

X, Y = torch.randn(2, 16, 5, generator=torch.Generator().manual_seed(0)).unbind()
BASE = {"depth": 2, "d": 16, "m": 64}


class Computed(nn.Linear):
    def __init__(self, inputs: int, outputs: int, function: Callable[[Tensor], Tensor], gain: bool = False) -> None:
        super().__init__(inputs, outputs)
        self.gain = nn.Parameter(torch.ones(outputs, 1)) if gain else None
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        weight = self.function(self.weight)
        return F.linear(x, weight if self.gain is None else self.gain * weight, self.bias)


class StraightThrough(Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return weight.sign() * weight.abs().mean()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Product(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(outputs, 4)), nn.Parameter(torch.randn(4, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.a @ self.b)


class Block(nn.Module):
    def __init__(self, d: int, m: int, linear: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(d), linear(d, m), linear(m, d)

    def forward(self, x: Tensor) -> Any:
        return self.down(torch.tanh(self.up(self.norm(x))))


class Network(nn.Module):
    def __init__(self, depth: int, d: int, m: int, linear: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.embed, self.readout, self.norm = nn.Linear(5, d), nn.Linear(d, 5), nn.LayerNorm(d)
        self.blocks = nn.ModuleList(Block(d, m, linear) for _ in range(depth))

    def forward(self, x: Tensor) -> Any:
        stream = self.embed(x)
        for block in self.blocks:
            stream = stream + block(stream)
        return self.readout(self.norm(stream))


def ternary(weight: Tensor) -> Tensor:
    """BitNet's, whose gradient goes straight through."""
    size = weight.abs().mean()
    rounded = (weight / size).round().clamp(-1, 1) * size
    return weight + (rounded - weight).detach()


def binary(weight: Tensor) -> Tensor:
    return weight + (weight.sign() / weight.shape[1] ** 0.5 - weight).detach()


def standardized(weight: Tensor) -> Tensor:
    return (weight - weight.mean(1, keepdim=True)) / weight.std(1, keepdim=True)


def computed(function: Callable[[Tensor], Tensor], gain: bool = False) -> Callable[[int, int], nn.Module]:
    return lambda inputs, outputs: Computed(inputs, outputs, function, gain)


def wrapped(wrap: Callable[..., nn.Module], **settings: Any) -> Callable[[int, int], nn.Module]:
    return lambda inputs, outputs: wrap(nn.Linear(inputs, outputs), **settings)


def built(linear: Callable[[int, int], nn.Module], depth: int, d: int, m: int, seed: int = 0) -> Network:
    torch.manual_seed(seed)
    return Network(depth, d, m, linear)


def effective(linear: Any) -> Tensor:
    with torch.no_grad():
        made: Tensor = linear(torch.eye(linear.in_features)) - linear.bias
    return made.T


def rms(values: Tensor) -> float:
    return float(values.detach().double().square().mean().sqrt())


PLANNED = {
    "weight norm": wrapped(parametrizations.weight_norm),
    "weight norm, by hook": wrapped(weight_norm),
    "weight norm of all": wrapped(parametrizations.weight_norm, dim=None),
    "weight norm by inputs": wrapped(parametrizations.weight_norm, dim=1),
    "standardized, with a gain": computed(standardized, gain=True),
    "ternary": computed(ternary),
    "straight through": computed(StraightThrough.apply),
    "halved": computed(lambda weight: weight * (torch.arange(weight.shape[1]) % 2)),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize(("name", "d", "m"), [*zip(PLANNED, [16, 64] * 4, [256, 64] * 4, strict=True)])
def test_weights_have_the_std_of_the_table(name: str, d: int, m: int) -> None:
    base, module = built(PLANNED[name], **BASE), built(PLANNED[name], 2, d, m, seed=1)
    initialize(module, Plan.from_model(module, X, base=base))
    first, small = module.blocks[0], base.blocks[0]
    by_d, by_m = d / 16, m / 64
    assert rms(effective(first.up)) == pytest.approx(by_d**-0.5 * rms(effective(small.up)), rel=0.06)
    assert rms(effective(first.down)) == pytest.approx(by_d**0.5 / by_m * rms(effective(small.down)), rel=0.06)


REFUSED = {
    "spectral norm": wrapped(parametrizations.spectral_norm),
    "spectral norm (": wrapped(spectral_norm),
    "orthogonal": wrapped(parametrizations.orthogonal, orthogonal_map="cayley"),
    "softplus": computed(F.softplus),
    "tanh": computed(lambda weight: torch.tanh(100 * weight)),
    "sign": computed(binary),
    "linalg_vector_norm": computed(lambda weight: F.normalize(weight, dim=1)),
    "std": computed(standardized),
    "product": Product,
}


@pytest.mark.parametrize("name", REFUSED)
def test_weights_whose_size_cannot_be_set_are_refused_by_name(name: str) -> None:
    base, module = built(REFUSED[name], **BASE), built(REFUSED[name], 2, 16, 256)
    with pytest.raises(ValueError, match=rf"goes through [^;]*{re.escape(name)}.*learned gain") as found:
        Plan.from_model(module, X, base=base)
    suggested = dict(re.findall(r'"([^"]+)": "(frozen)"', str(found.value)))
    assert suggested and Plan.from_model(module, X, base=base, overrides=suggested)


@pytest.mark.parametrize("linear", [REFUSED[n] for n in ("spectral norm", "sign", "linalg_vector_norm")])
def test_a_size_that_is_what_the_table_asks_for_is_planned(linear: Any) -> None:
    base, module = built(linear, **BASE), built(linear, 4, 64, 256)
    initialize(module, Plan.from_model(module, X, base=base))
    assert rms(effective(module.blocks[0].down)) == pytest.approx(0.5 * rms(effective(base.blocks[0].down)), rel=0.1)


@pytest.mark.parametrize("family", ["adamw", "sgd", "adam"])
def test_numbers_of_weight_norm(family: str) -> None:
    """v takes those of the weight, and g = a·γ those of a bias, where γ = 1 at every shape: a = sqrt(d/m)."""
    linear = PLANNED["weight norm"]
    plan = Plan.from_model(built(linear, 6, 64, 128), X, base=built(linear, **BASE))
    plain = Plan.from_model(built(nn.Linear, 6, 64, 128), X, base=built(nn.Linear, **BASE)).scales(family)
    of, d, m, depth = plan.scales(family), 4, 2, 3
    for part in ("up", "down"):
        found, wanted = of[f"blocks.0.{part}.parametrizations.weight.original1"], plain[f"blocks.0.{part}.weight"]
        assert (found.std, found.lr, found.eps, found.weight_decay) == pytest.approx(
            (wanted.std, wanted.lr, wanted.eps, wanted.weight_decay)
        )
    a = (d / m) ** 0.5
    gain = of["blocks.0.down.parametrizations.weight.original0"]
    lr = {"sgd": depth * d * a * a}.get(family, a)
    decay = {"adamw": 1 / a}.get(family, 1 / (depth * d * a * a))
    assert (gain.std, gain.lr, gain.eps, gain.weight_decay) == pytest.approx((a, lr, 1 / (depth * d * a), decay))
    assert gain.multiplier == pytest.approx(1 / depth)  # which folds into it, and not into v
    assert of["blocks.0.down.parametrizations.weight.original1"].multiplier == 1


@pytest.mark.parametrize("optimizer", [optim.SGD, optim.Adam])
def test_steps_of_weight_norm_are_those_of_plain_weights(optimizer: type[optim.Optimizer]) -> None:
    """One step from the same weights: what v does is what the plain network's plan does, but along the weight itself."""
    shape = {"depth": 4, "d": 64, "m": 512}
    module, plain = built(PLANNED["weight norm"], **shape), built(nn.Linear, **shape)
    plans = [
        Plan.from_model(module, X, base=built(PLANNED["weight norm"], **BASE)),
        Plan.from_model(plain, X, base=built(nn.Linear, **BASE)),
    ]
    initialize(module, plans[0])
    initialize(plain, plans[1])
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            owner = module.get_submodule(name.rpartition(".")[0])
            parameter.copy_(getattr(owner, name.rpartition(".")[2]))
    steps = []
    for network, plan in zip((module, plain), plans, strict=True):
        attach_multipliers(network, plan)
        before = [effective(part) for block in network.blocks for part in (block.up, block.down)]
        if network is module:
            for name, parameter in module.named_parameters():
                parameter.requires_grad_(not name.endswith("original0"))
        trained = optimizer([p for p in network.parameters() if p.requires_grad], lr=1e-4)  # type: ignore[call-arg]
        scale_optimizer(trained, network, plan)
        (network(X) - Y).square().mean().backward()
        trained.step()
        after = [effective(part) for block in network.blocks for part in (block.up, block.down)]
        steps.append([new - old for new, old in zip(after, before, strict=True)])
    for found, wanted in zip(*steps, strict=True):
        # Adam makes steps of one size where gradients are next to zero, too
        assert torch.linalg.norm(found - wanted) < 0.5 * torch.linalg.norm(wanted)
        assert rms(found) == pytest.approx(rms(wanted), rel=0.1)


@pytest.mark.parametrize("name", ["weight norm", "ternary"])
def test_hook_and_fold_are_the_same_run(name: str) -> None:
    base = built(PLANNED[name], **BASE)
    runs = []
    for put in (attach_multipliers, fold):
        module = built(PLANNED[name], 4, 32, 64)
        plan = Plan.from_model(module, X, base=base)
        put(initialize(module, plan), plan)
        optimizer = optim.AdamW(module.parameters(), lr=1e-3, eps=1e-6)
        scale_optimizer(optimizer, module, plan)
        losses = []
        for _ in range(4):
            optimizer.zero_grad()
            loss = (module(X) - Y).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        runs.append(losses)
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)
    assert runs[0][0] > runs[0][-1]


def test_at_the_base_nothing_changes_and_a_saved_plan_is_a_base() -> None:
    linear = PLANNED["weight norm"]
    base, module = built(linear, **BASE), built(linear, **BASE, seed=1)
    plan, before = Plan.from_model(module, X, base=base), copy.deepcopy(module.state_dict())
    assert all(scale == type(scale)() for scale in plan.scales("sgd").values())
    assert all(torch.equal(value, before[key]) for key, value in initialize(module, plan).state_dict().items())
    wide = built(linear, 3, 64, 128)
    again = Plan.from_model(wide, X, base=Plan.from_yaml(plan.to_yaml(), "text")).scales("adam")
    found = Plan.from_model(wide, X, base=base).scales("adam")
    assert {n: vars(s) for n, s in again.items()} == {n: pytest.approx(vars(s), rel=1e-5) for n, s in found.items()}


class Trained(LightningModule):
    def __init__(self, depth: int, hidden: int, embedding: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = Network(depth, embedding, hidden, PLANNED["weight norm"])

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return (self.network(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.AdamW(self.parameters(), lr=1e-3)


@pytest.mark.slow
def test_weight_norm_passes_the_check() -> None:
    report = check(Trained, Shape(2, 32, 16), [(X, Y)] * 4, axes=["depth", "hidden", "embedding"], factors=[1, 2, 4])
    assert report.verdict == "pass"


def test_gains_of_a_first_block_that_reads_data_are_not_those_of_others() -> None:
    """All gains are the lengths of rows, which stay: those of Θ(1) data, and of D entries of size D^(-1/2)."""

    def net(width: int) -> nn.Module:
        def forward(net: Any, x: Tensor) -> Any:
            h = net.skip(x) + net.writes[0](torch.tanh(net.reads[0](x)))
            return net.out(h + net.writes[1](torch.tanh(net.reads[1](h))))

        reads = nn.ModuleList(parametrizations.weight_norm(nn.Linear(n, 8)) for n in (3, width))
        writes, skip, out = (
            nn.ModuleList(nn.Linear(8, width) for _ in range(2)),
            nn.Linear(3, width),
            nn.Linear(width, 2),
        )
        return Net(forward, blocks=nn.Identity(), embed=nn.Identity(), reads=reads, writes=writes, skip=skip, out=out)

    plan = Plan.from_model(net(64), torch.ones(4, 3), base=net(8))
    gains = [f"reads.{i}.parametrizations.weight.original0" for i in range(2)]
    assert [plan.scales("adamw")[name].lr for name in gains] == pytest.approx([1, 1], rel=0.3)
