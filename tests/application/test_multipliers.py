"""Multipliers as hooks and folded, against a forward pass written by hand with the factors in it."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from helpers.plans import entry
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mlu_lightning.application.multipliers import attach_multipliers, fold, residual_state
from mlu_lightning.discovery.structure import Site
from mlu_lightning.planning.entries import Multiplier
from mlu_lightning.planning.fingerprint import fingerprint
from mlu_lightning.planning.plan import Plan
from mlu_lightning.table import Ratios, Role

D, HIDDEN, VOCAB = 6, 10, 7
FACTORS = (0.5, 1 / 3, 0.7)  # one per branch
READOUT = 0.3
ALPHA = 1.7
EXACT = {"rtol": 1e-12, "atol": 1e-13}  # float64, sums of about ten terms


# --- models that are built and called in different ways, and their forward pass by hand


class Mlp(nn.Module):
    """A branch; subclasses return its value in other forms."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(D, HIDDEN)
        self.out = nn.Linear(HIDDEN, D)

    def forward(self, h: Tensor) -> Any:
        return self.out(torch.tanh(self.inner(h)))


def mlp_by_hand(branch: Mlp, h: Tensor) -> Tensor:
    inner = torch.tanh(h @ branch.inner.weight.T + branch.inner.bias)
    return inner @ branch.out.weight.T + branch.out.bias


class Pair(NamedTuple):
    extra: Tensor
    value: Tensor


class TupleMlp(Mlp):
    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(h), h.sum()


class ListMlp(Mlp):
    def forward(self, h: Tensor) -> list[Tensor]:
        return [h.sum(), super().forward(h)]


class NamedTupleMlp(Mlp):
    def forward(self, h: Tensor) -> Pair:
        return Pair(h.sum(), super().forward(h))


class ModelOutputMlp(Mlp):
    def forward(self, h: Tensor) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(last_hidden_state=h.sum(), pooler_output=super().forward(h))


class NormMlp(Mlp):
    """A branch that ends in a norm: only what follows the norm has an effect."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)
        nn.init.uniform_(self.norm.bias)

    def forward(self, h: Tensor) -> Tensor:
        return self.norm(super().forward(h))


class Network(nn.Module):
    def __init__(self, branch: type[Mlp], index: int | None, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, D)
        self.branches = nn.ModuleList(branch() for _ in FACTORS)
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
        if isinstance(branch, NormMlp):
            value = F.layer_norm(value, (D,)) * branch.norm.weight + branch.norm.bias
        h = h + ALPHA * factor * value
    return READOUT * (h @ network.head.weight.T) + network.head.bias


@dataclass(frozen=True)
class Case:
    """A module with its multipliers, and its function by hand."""

    build: Callable[[], nn.Module]
    multipliers: tuple[Multiplier, ...]
    by_hand: Callable[[Any, Tensor], Tensor]
    folded: frozenset[str]

    def module(self) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.build().double()


def network_case(branch: type[Mlp], index: int | None = None, tied: bool = False, alias: bool = False) -> Case:
    end = "norm" if branch is NormMlp else "out"
    multipliers = []
    for position, factor in enumerate(FACTORS):
        name = "last" if alias and position == len(FACTORS) - 1 else f"branches.{position}"
        folds = (f"{name}.{end}.weight", f"{name}.{end}.bias")
        multipliers.append(Multiplier(name, "branch", factor, Site(name, "output", index), folds))
    head = () if tied else ("head.weight",)
    multipliers.append(Multiplier("head.weight", "readout", READOUT, Site("head", "input"), head))
    folded = frozenset(name for multiplier in multipliers for name in multiplier.folds)
    return Case(lambda: Network(branch, index, tied), tuple(multipliers), by_hand, folded)


class Attention(nn.Module):
    """One head, with a multiplier on its logits besides the branch's."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)
        self.out = nn.Linear(D, D)

    def forward(self, tokens: Tensor) -> Tensor:
        h = F.one_hot(tokens, D).double()
        return h + self.out(torch.softmax(self.query(h) @ self.key(h).mT, -1) @ self.value(h))


def attention_by_hand(module: Attention, tokens: Tensor) -> Tensor:
    h = torch.eye(D, dtype=torch.float64)[tokens]
    query, key, value = (h @ layer.weight.T + layer.bias for layer in (module.query, module.key, module.value))
    mixed = torch.softmax(0.2 * query @ key.mT, -1) @ value
    return h + ALPHA * 0.5 * (mixed @ module.out.weight.T + module.out.bias)


CASES = {
    "tensor": network_case(Mlp),
    "tuple": network_case(TupleMlp, 0),
    "list": network_case(ListMlp, 1),
    "named tuple": network_case(NamedTupleMlp, 1),
    "model output": network_case(ModelOutputMlp, 1),
    "ends in a norm": network_case(NormMlp),
    "tied readout": network_case(Mlp, tied=True),
    "second name": network_case(Mlp, alias=True),
    "logits": Case(
        Attention,
        (
            Multiplier("attention", "branch", 0.5, Site("out"), ("out.weight", "out.bias")),
            Multiplier("attention", "logits", 0.2, Site("query"), ("query.weight", "query.bias")),
        ),
        attention_by_hand,
        frozenset({"out.weight", "out.bias", "query.weight", "query.bias"}),
    ),
}
MODES: dict[str, Callable[[nn.Module, Plan], Any]] = {"hook": attach_multipliers, "fold": fold}


def plan_of(module: nn.Module, multipliers: tuple[Multiplier, ...], alpha: float = ALPHA) -> Plan:
    parameters = {
        name: entry(Role.BRANCH_OUT, tuple(p.shape), Ratios(depth=2.0), base_shape=tuple(p.shape), base_std=1.0)
        for name, p in module.named_parameters()
    }
    return Plan(parameters, (), (), multipliers, alpha)


def made(name: str) -> tuple[nn.Module, Plan, Tensor]:
    """Module, plan and input of a case."""
    case = CASES[name]
    module = case.module()
    tokens = torch.arange(12).reshape(3, 4) % D
    return module, plan_of(module, case.multipliers), tokens


def snapshot(module: nn.Module) -> tuple[dict[str, Tensor], list[int]]:
    """All that applying multipliers may change."""
    state = {name: value.clone() for name, value in module.state_dict().items()}
    return state, [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules()]


def assert_unchanged(module: nn.Module, before: tuple[dict[str, Tensor], list[int]]) -> None:
    state, hooks = snapshot(module)
    assert list(state) == list(before[0])
    assert all(torch.equal(state[name], before[0][name]) for name in state if not state[name].is_meta)
    assert hooks == before[1]
    assert residual_state(module) is None


# --- the function


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_function_is_the_one_written_by_hand(name: str, mode: str) -> None:
    module, plan, tokens = made(name)
    plain, keys = copy.deepcopy(module), list(module.state_dict())
    expected = CASES[name].by_hand(plain, tokens)
    assert not torch.allclose(module(tokens), expected, rtol=1e-3)  # the factors matter
    MODES[mode](module, plan)
    torch.testing.assert_close(module(tokens), expected, **EXACT)
    assert list(module.state_dict()) == keys
    state = residual_state(module)
    assert state is not None
    assert (state.mode, state.fingerprint) == (mode, fingerprint(plan))
    assert state.folded == (CASES[name].folded if mode == "fold" else frozenset())


@pytest.mark.parametrize("name", CASES)
def test_hooks_leave_the_weights_and_come_off(name: str) -> None:
    module, plan, tokens = made(name)
    before, output = snapshot(module), module(tokens)
    handle = attach_multipliers(module, plan)
    assert all(torch.equal(value, before[0][key]) for key, value in module.state_dict().items())
    handle.remove()
    assert_unchanged(module, before)
    assert torch.equal(module(tokens), output)


def test_a_removed_handle_leaves_the_next_one_alone() -> None:
    module, plan, tokens = made("tensor")
    first = attach_multipliers(module, plan)
    first.remove()
    attach_multipliers(module, plan)
    output = module(tokens)
    first.remove()
    assert residual_state(module) is not None
    assert torch.equal(module(tokens), output)


@pytest.mark.parametrize("name", ["tuple", "list", "named tuple", "model output"])
def test_the_output_keeps_its_type_and_its_other_elements(name: str) -> None:
    module, plan, _ = made(name)
    h = torch.randn(2, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    branch, index = module.branches[0], module.index
    before = branch(h)
    attach_multipliers(module, plan)
    after = branch(h)
    assert type(after) is type(before)
    as_tuple = (lambda o: o.to_tuple()) if hasattr(after, "to_tuple") else tuple
    for position, (old, new) in enumerate(zip(as_tuple(before), as_tuple(after), strict=True)):
        torch.testing.assert_close(new, old * (FACTORS[0] * ALPHA if position == index else 1.0), rtol=0, atol=0)
    if hasattr(after, "pooler_output"):
        assert after.pooler_output is after["pooler_output"]


@pytest.mark.parametrize("name", CASES)
def test_copies_and_pickles_keep_the_multipliers(name: str) -> None:
    module, plan, tokens = made(name)
    handle = attach_multipliers(module, plan)
    expected = module(tokens)
    twins = [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    twins.append(torch.load(file, weights_only=False))
    handle.remove()
    for twin in twins:
        assert torch.equal(twin(tokens), expected)
        assert residual_state(twin) == residual_state(twins[0])
        with pytest.raises(ValueError, match="already has this plan's multipliers"):
            attach_multipliers(twin, plan)


@pytest.mark.parametrize("name", CASES)
def test_a_folded_checkpoint_continues_without_being_multiplied_again(name: str) -> None:
    module, plan, tokens = made(name)
    expected = fold(module, plan)(tokens)
    fresh = CASES[name].build().double()
    fresh.load_state_dict(module.state_dict())
    assert fold(fresh, plan, multiplied=True) is fresh
    assert torch.equal(fresh(tokens), expected)
    assert residual_state(fresh) == residual_state(module)


def test_a_folded_checkpoint_can_be_announced_before_the_weights_exist() -> None:
    module, plan, tokens = made("tied readout")
    expected = fold(module, plan)(tokens)
    with torch.device("meta"):
        fresh = fold(CASES["tied readout"].build(), plan, multiplied=True)
    fresh.load_state_dict(module.state_dict(), assign=True)
    assert torch.equal(fresh(tokens), expected)


def test_hooks_of_others_see_the_multiplier_as_a_part_of_its_module() -> None:
    """Outputs are multiplied for hooks that came before too; inputs are not yet multiplied for those."""
    module, plan, tokens = made("tensor")
    seen: list[Tensor] = []

    def watch() -> None:
        module.branches[0].register_forward_hook(lambda _, args, output: seen.append(output))
        module.head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))

    watch()
    attach_multipliers(module, plan)
    watch()
    module(tokens)
    branch, later_branch, head, later_head = seen
    h = module.embedding.weight[tokens]
    torch.testing.assert_close(branch, ALPHA * FACTORS[0] * mlp_by_hand(module.branches[0], h), **EXACT)
    assert torch.equal(branch, later_branch)
    torch.testing.assert_close(later_head, READOUT * head, **EXACT)


def test_a_folded_checkpoint_needs_no_plugin() -> None:
    module, plan, tokens = made("tensor")
    expected = fold(module, plan)(tokens)
    plain = CASES["tensor"].build().double()
    plain.load_state_dict(module.state_dict())
    assert torch.equal(plain(tokens), expected)


def test_a_parameter_of_two_multipliers_gets_both() -> None:
    module = nn.Linear(2, 2).double()
    weight, bias = module.weight.detach().clone(), module.bias.detach().clone()
    plan = plan_of(
        module,
        (
            Multiplier("branch", "branch", 0.5, None, ("weight", "bias")),
            Multiplier("logits", "logits", 0.25, None, ("weight",)),
        ),
        alpha=3.0,
    )
    fold(module, plan)
    torch.testing.assert_close(module.weight.detach(), weight * (0.5 * 3.0 * 0.25), rtol=1e-15, atol=0)
    torch.testing.assert_close(module.bias.detach(), bias * (0.5 * 3.0), rtol=1e-15, atol=0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["tensor", "tied readout"])
def test_factors_of_one_change_nothing(name: str, mode: str) -> None:
    module, plan, tokens = made(name)
    # alpha counts: a factor of 1/alpha on a branch is the identity too, and then it needs no place either
    identity = tuple(replace(m, value=1.0 if m.kind == "readout" else 0.5) for m in plan.multipliers)
    identity = (*identity, Multiplier("elsewhere", "branch", 0.5, None, ()))
    before, output = snapshot(module), module(tokens)
    MODES[mode](module, replace(plan, multipliers=identity, alpha=2.0))
    state, hooks = snapshot(module)
    assert all(torch.equal(state[name], before[0][name]) for name in state)
    assert sum(hooks) == 0
    assert torch.equal(module(tokens), output)
    assert residual_state(module) is not None


def test_frozen_and_half_precision_parameters_are_folded() -> None:
    module, plan, tokens = made("tensor")
    module.bfloat16().requires_grad_(False)
    expected = {name: value.double() for name, value in module.state_dict().items()}
    fold(module, plan)
    for name, value in module.state_dict().items():
        factor = {"branches.0.out.weight": FACTORS[0] * ALPHA, "head.weight": READOUT}.get(name)
        if factor is not None:
            torch.testing.assert_close(value.double(), expected[name] * factor, rtol=2**-8, atol=0)
    assert module(tokens).dtype == torch.bfloat16


def test_inputs_by_keyword_and_integers_before_them() -> None:
    class Head(nn.Module):
        def forward(self, tokens: Tensor, scale: float = 2.0, *, h: Tensor) -> Tensor:
            return tokens + scale * h

    module = nn.ModuleDict({"head": Head(), "linear": nn.Linear(2, 2, bias=False)})
    multipliers = tuple(Multiplier(n, "readout", 0.5, Site(n, "input"), ()) for n in ("head", "linear"))
    attach_multipliers(module, plan_of(module, multipliers))
    h, tokens = torch.tensor([1.0, 3.0]), torch.tensor([1, 2])
    assert torch.equal(module["head"](tokens, h=h), torch.tensor([2.0, 5.0]))
    assert torch.equal(module["linear"](input=h), module["linear"].weight @ h * 0.5)


@pytest.mark.parametrize("training", [True, False])
def test_fast_path_of_torch_transformers(training: bool) -> None:
    """In evaluation mode torch skips the submodules of an encoder layer, unless they have hooks."""
    layer = nn.TransformerEncoderLayer(D, 2, HIDDEN, dropout=0.0, batch_first=True, norm_first=True).double()
    sites = (Site("self_attn", "output", 0), Site("linear2"))
    names = (("self_attn.out_proj.weight", "self_attn.out_proj.bias"), ("linear2.weight", "linear2.bias"))
    multipliers = tuple(
        Multiplier(str(site), "branch", 0.5, site, folds) for site, folds in zip(sites, names, strict=True)
    )
    plan = plan_of(layer, multipliers, alpha=1.0)
    h = torch.randn(2, 5, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    mixed = h + 0.5 * layer.self_attn(*[layer.norm1(h)] * 3, need_weights=False)[0]
    expected = mixed + 0.5 * layer.linear2(torch.relu(layer.linear1(layer.norm2(mixed))))
    folded = fold(copy.deepcopy(layer), plan).train(training)
    attach_multipliers(layer, plan)
    layer.train(training)
    with torch.no_grad():
        torch.testing.assert_close(layer(h), expected, **EXACT)
        torch.testing.assert_close(folded(h), expected, **EXACT)


# --- torch.compile


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled_in_place(module: nn.Module) -> Callable[[Tensor], Tensor]:
    module.compile(backend="eager", fullgraph=True)
    return module


def compiled_function(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return torch.compile(lambda tokens: module(tokens), backend="eager", fullgraph=True)


def compiled_wrapper(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return torch.compile(module, backend="eager", fullgraph=True)


COMPILERS = {"wrapper": compiled_wrapper, "in place": compiled_in_place, "function": compiled_function}


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("how", COMPILERS)
@pytest.mark.parametrize("name", ["tensor", "tuple", "model output", "tied readout"])
def test_compiled_after_attaching(name: str, how: str) -> None:
    module, plan, tokens = made(name)
    expected = CASES[name].by_hand(copy.deepcopy(module), tokens)
    attach_multipliers(module, plan)
    torch.testing.assert_close(COMPILERS[how](module)(tokens), expected, **EXACT)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("how", COMPILERS)
def test_attached_and_removed_after_the_first_compiled_call(how: str, mode: str) -> None:
    module, plan, tokens = made("tied readout")
    expected = CASES["tied readout"].by_hand(copy.deepcopy(module), tokens)
    call = COMPILERS[how](module)
    plain = call(tokens)
    handle = MODES[mode](call if isinstance(call, nn.Module) else module, plan)
    torch.testing.assert_close(call(tokens), expected, **EXACT)
    assert residual_state(module) == residual_state(call if isinstance(call, nn.Module) else module) is not None
    if mode == "hook":
        handle.remove()
        assert torch.equal(call(tokens), plain)


# --- fingerprint

PLAN = Plan(
    {"w": entry(Role.BRANCH_OUT, (2, 3), Ratios(2.0, 1.5, 1.0), base_shape=(2, 3), base_std=0.02, fans=(3, 2))},
    (),
    (),
    (Multiplier("m", "branch", 0.5, Site("a", "output", 0), ("w",)),),
)


def with_parameter(**changes: Any) -> Plan:
    return replace(PLAN, parameters={"w": replace(PLAN.parameters["w"], **changes)})


def with_multiplier(**changes: Any) -> Plan:
    return replace(PLAN, multipliers=(replace(PLAN.multipliers[0], **changes),))


def test_fingerprint_does_not_change_between_versions() -> None:
    """It is kept in checkpoints: written down once, it changes with what is hashed and with nothing else."""
    assert fingerprint(PLAN) == "eaba5ce391ff8df656f53de1fa189da5b4b10b2629c53a1ec4d2a106bdf2677b"


@pytest.mark.parametrize(
    "other",
    [
        with_parameter(role=Role.BRANCH_IN),
        with_parameter(shape=(2, 4)),
        with_parameter(base_fans=(1, 2)),
        with_multiplier(value=0.25),
        with_multiplier(site=Site("b")),
        with_multiplier(folds=()),
        replace(PLAN, alpha=2.0),
    ],
)
def test_fingerprint_tells_plans_apart(other: Plan) -> None:
    assert fingerprint(other) != fingerprint(PLAN)


@pytest.mark.parametrize("same", [with_parameter(base_std=1.0), with_parameter(fans=(6, 2), base_fans=(4, 2))])
def test_fingerprint_of_equal_runs_is_equal(same: Plan) -> None:
    assert fingerprint(replace(same, warnings=("read me",), alpha=1)) == fingerprint(PLAN)


# --- errors: each names what is wrong and what to do, and leaves the module as it was


def changed(position: int, **changes: Any) -> Callable[[nn.Module, Plan], tuple[nn.Module, Plan]]:
    """Change one multiplier of the plan; -1 is the readout's."""

    def change(module: nn.Module, plan: Plan) -> tuple[nn.Module, Plan]:
        multipliers = [*plan.multipliers]
        multipliers[position] = replace(multipliers[position], **changes)
        return module, replace(plan, multipliers=tuple(multipliers))

    return change


def on_meta(module: nn.Module, plan: Plan) -> tuple[nn.Module, Plan]:
    return module.to("meta"), plan


def quantized(module: nn.Module, plan: Plan) -> tuple[nn.Module, Plan]:
    weight = module.branches[1].out.weight
    module.branches[1].out.weight = nn.Parameter(weight.detach().to(torch.int8), requires_grad=False)
    return module, plan


@pytest.mark.parametrize(
    ("mode", "change", "message"),
    [
        ("hook", changed(1, site=None), r"branch 'branches\.1' cannot be attached as a hook.*residual=\"fold\""),
        ("fold", changed(-1, site=None, folds=()), r"readout 'head\.weight' can be neither folded.*nn\.Identity"),
        ("hook", changed(-1, site=None, folds=()), r"readout 'head\.weight' can be neither folded.*nn\.Identity"),
        (
            "hook",
            changed(1, site=Site("gone.1")),
            r"multiplies the branch 'branches\.1' at gone\.1 output, .* no submodule 'gone\.1'\. Plan",
        ),
        ("fold", changed(-1, site=Site("gone"), folds=()), r"at gone output, but the module has no submodule 'gone'"),
        ("hook", changed(2, site=Site("branches.0")), r"'branches\.0' and 'branches\.2' have the same place"),
        ("fold", changed(0, folds=("gone.weight",)), r"parameters that the module does not have: gone\.weight"),
        ("fold", on_meta, r"meta device or of an integer type: branches\.0\.out\.bias, .*residual=\"hook\""),
        ("fold", quantized, r"meta device or of an integer type: branches\.1\.out\.weight\. Give them values"),
    ],
)
def test_refused_with_nothing_changed(mode: str, change: Callable[..., Any], message: str) -> None:
    module, plan, _ = made("tensor")
    module, plan = change(module, plan)
    before = snapshot(module)
    with pytest.raises(ValueError, match=message):
        MODES[mode](module, plan)
    assert_unchanged(module, before)


@pytest.mark.parametrize("second", MODES)
@pytest.mark.parametrize(
    ("first", "how", "advice"),
    [
        ("hook", "attached as hooks", r"\.remove\(\) of the handle"),
        ("fold", "folded into its weights", "built anew"),
    ],
)
def test_applied_twice(first: str, second: str, how: str, advice: str) -> None:
    module, plan, tokens = made("tensor")
    MODES[first](module, plan)
    output = module(tokens)
    for again, which in ((plan, "this plan"), (replace(plan, alpha=9.0), "another plan")):
        if (first, second, again) == ("hook", "fold", plan):
            continue  # moves them into the weights
        with pytest.raises(ValueError, match=f"already has {which}'s multipliers, {how}.*multiply twice.*{advice}"):
            MODES[second](module, again)
    with pytest.raises(ValueError, match="already has this plan's multipliers"):
        fold(module, plan, multiplied=True)
    assert torch.equal(module(tokens), output)


@pytest.mark.parametrize("name", CASES)
def test_hooks_move_into_the_weights(name: str) -> None:
    module, plan, tokens = made(name)
    expected = CASES[name].by_hand(copy.deepcopy(module), tokens)
    fresh = fold(copy.deepcopy(module), plan)
    attach_multipliers(module, plan)
    fold(module, plan)
    torch.testing.assert_close(module(tokens), expected, **EXACT)
    assert residual_state(module) == residual_state(fresh)
    assert all(torch.equal(value, fresh.state_dict()[key]) for key, value in module.state_dict().items())
    assert snapshot(module)[1] == snapshot(fresh)[1]


def test_hooks_stay_if_they_cannot_move_into_the_weights() -> None:
    module, plan, tokens = made("tensor")
    attach_multipliers(module, plan)
    expected = module(tokens)
    weight = module.branches[1].out.weight
    module.branches[1].out.weight = nn.Parameter(weight.detach().to(torch.int8), requires_grad=False)
    before = snapshot(module)
    with pytest.raises(ValueError, match="meta device or of an integer type"):
        fold(module, plan)
    assert snapshot(module)[1] == before[1]
    assert residual_state(module) is not None and residual_state(module).mode == "hook"
    module.branches[1].out.weight = weight
    assert torch.equal(module(tokens), expected)


@pytest.mark.parametrize(
    ("name", "site", "message"),
    [
        ("tuple", Site("branches.0"), "on branches.0 output could not be applied: the module returned a tuple where"),
        ("tensor", Site("branches.0", "output", 1), "returned a Tensor, which has no element 1"),
        ("tensor", Site("embedding", "input"), "on embedding input .* called without a floating-point tensor"),
    ],
)
def test_a_place_without_a_tensor_stops_the_run(name: str, site: Site, message: str) -> None:
    module, plan, tokens = made(name)
    module, plan = changed(0, site=site)(module, plan)
    attach_multipliers(module, plan)
    with pytest.raises(TypeError, match=message):
        module(tokens)
