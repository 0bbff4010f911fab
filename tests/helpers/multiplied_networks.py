"""Networks whose branches return their value in different ways, with multipliers, and their functions by hand."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from helpers.plans import entry
from mlu_lightning import attach_multipliers, fold
from mlu_lightning.application import residual_state
from mlu_lightning.discovery.structure import Site
from mlu_lightning.planning import Multiplier
from mlu_lightning.planning.plan import Plan
from mlu_lightning.table import Ratios, Role

D, HIDDEN, VOCAB = 6, 10, 7
FACTORS = (0.5, 1 / 3, 0.7)  # one per branch
READOUT = 0.3
ALPHA = 1.7
EXACT = {"rtol": 1e-12, "atol": 1e-13}  # float64, sums of about ten terms


class Pair(NamedTuple):
    extra: Tensor
    value: Tensor


def as_tuple(*parts: Tensor) -> tuple[Tensor, ...]:
    return parts


def as_list(*parts: Tensor) -> list[Tensor]:
    return [*parts]


class Mlp(nn.Module):
    """A branch that returns its value alone or next to a sum; after a norm at its end, only the norm has an effect."""

    def __init__(self, index: int | None, returned: Callable[..., Any] | None = None, norm: bool = False) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(D, HIDDEN), nn.Linear(HIDDEN, D)
        self.index, self.returned, self.norm = index, returned, nn.LayerNorm(D) if norm else None
        if self.norm is not None:
            nn.init.uniform_(self.norm.weight, 0.5, 1.5)
            nn.init.uniform_(self.norm.bias)

    def forward(self, h: Tensor) -> Any:
        value = self.out(torch.tanh(self.inner(h)))
        value = value if self.norm is None else self.norm(value)
        if self.returned is None:
            return value
        return self.returned(value, h.sum()) if self.index == 0 else self.returned(h.sum(), value)


def mlp_by_hand(branch: Mlp, h: Tensor) -> Tensor:
    inner = torch.tanh(h @ branch.inner.weight.T + branch.inner.bias)
    return inner @ branch.out.weight.T + branch.out.bias


class Network(nn.Module):
    def __init__(self, index: int | None, tied: bool, **branch: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, D)
        self.branches = nn.ModuleList(Mlp(index, **branch) for _ in FACTORS)
        self.head = nn.Linear(D, VOCAB)
        self.last = self.branches[-1]  # a second name for a submodule
        self.index = index
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embedding(tokens)
        for branch in self.branches:
            output = branch(h)
            if self.index is not None:
                output = output.to_tuple()[self.index] if hasattr(output, "to_tuple") else output[self.index]
            h = h + output
        return self.head(h)


def by_hand(network: Network, tokens: Tensor) -> Tensor:
    h = network.embedding.weight[tokens]
    for branch, factor in zip(network.branches, FACTORS, strict=True):
        value = mlp_by_hand(branch, h)
        if branch.norm is not None:
            value = nn.functional.layer_norm(value, (D,)) * branch.norm.weight + branch.norm.bias
        h = h + ALPHA * factor * value
    return READOUT * (h @ network.head.weight.T) + network.head.bias


@dataclass(frozen=True)
class Case:  # a module with its multipliers, and its function by hand
    build: Callable[[], nn.Module]
    multipliers: tuple[Multiplier, ...]
    by_hand: Callable[[Any, Tensor], Tensor]

    @property
    def folded(self) -> frozenset[str]:
        return frozenset(name for multiplier in self.multipliers for name in multiplier.folds)


def network_case(index: int | None = None, tied: bool = False, alias: bool = False, **branch: Any) -> Case:
    names = [f"branches.{position}" for position in range(len(FACTORS))]
    if alias:
        names[-1] = "last"
    ends = [f"{name}.{'norm' if branch.get('norm') else 'out'}" for name in names]
    multipliers = [
        Multiplier(name, "branch", factor, Site(name, "output", index), (f"{end}.weight", f"{end}.bias"))
        for name, end, factor in zip(names, ends, FACTORS, strict=True)
    ]
    head = () if tied else ("head.weight",)
    multipliers.append(Multiplier("head.weight", "readout", READOUT, Site("head", "input"), head))
    return Case(lambda: Network(index, tied, **branch), tuple(multipliers), by_hand)


class Attention(nn.Module):  # one head, with a multiplier on its logits besides the branch's
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)
        self.out = nn.Linear(D, D)

    def forward(self, tokens: Tensor) -> Tensor:
        h = nn.functional.one_hot(tokens, D).double()
        return h + self.out(torch.softmax(self.query(h) @ self.key(h).mT, -1) @ self.value(h))


def attention_by_hand(module: Attention, tokens: Tensor) -> Tensor:
    h = torch.eye(D, dtype=torch.float64)[tokens]
    query, key, value = (h @ layer.weight.T + layer.bias for layer in (module.query, module.key, module.value))
    mixed = torch.softmax(0.2 * query @ key.mT, -1) @ value
    return h + ALPHA * 0.5 * (mixed @ module.out.weight.T + module.out.bias)


_ATTENTION = (
    Multiplier("attention", "branch", 0.5, Site("out"), ("out.weight", "out.bias")),
    Multiplier("attention", "logits", 0.2, Site("query"), ("query.weight", "query.bias")),
)
CASES = {
    "tensor": network_case(),
    "tuple": network_case(0, returned=as_tuple),
    "list": network_case(1, returned=as_list),
    "named tuple": network_case(1, returned=Pair),
    "model output": network_case(1, returned=BaseModelOutputWithPooling),
    "ends in a norm": network_case(norm=True),
    "tied readout": network_case(tied=True),
    "second name": network_case(alias=True),
    "logits": Case(Attention, _ATTENTION, attention_by_hand),
}
MODES: dict[str, Callable[[nn.Module, Plan], Any]] = {"hook": attach_multipliers, "fold": fold}


def plan_of(module: nn.Module, multipliers: tuple[Multiplier, ...], alpha: float = ALPHA) -> Plan:
    parameters = {
        name: entry(Role.BRANCH_OUT, tuple(p.shape), Ratios(depth=2.0), base_shape=tuple(p.shape), base_std=1.0)
        for name, p in module.named_parameters()
    }
    return Plan(parameters, (), (), multipliers, alpha)


def made(name: str) -> tuple[nn.Module, Plan, Tensor]:
    torch.manual_seed(0)
    module = CASES[name].build().double()
    return module, plan_of(module, CASES[name].multipliers), torch.arange(12).reshape(3, 4) % D


def snapshot(module: nn.Module) -> tuple[dict[str, Tensor], list[int]]:
    state = {name: value.clone() for name, value in module.state_dict().items()}
    return state, [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules()]


def assert_unchanged(module: nn.Module, before: tuple[dict[str, Tensor], list[int]]) -> None:
    state, hooks = snapshot(module)
    assert list(state) == list(before[0])
    assert all(torch.equal(state[name], before[0][name]) for name in state if not state[name].is_meta)
    assert hooks == before[1]
    assert residual_state(module) is None
