"""Multipliers as hooks and folded, also compiled, against a forward pass written by hand with the factors in it."""

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import multiplied_networks as networks
from helpers.multiplied_networks import ALPHA, CASES, EXACT, FACTORS, MODES, READOUT, D, made, plan_of, snapshot
from torch import Tensor, nn
from torch.profiler import profile

from mlu_lightning import Plan, Role, attach_multipliers, fold
from mlu_lightning.application import residual_state
from mlu_lightning.application.state_mark import without_mark
from mlu_lightning.discovery.structure import Site
from mlu_lightning.planning.entries import Multiplier, ParameterPlan
from mlu_lightning.planning.fingerprint import fingerprint


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_function_is_the_one_written_by_hand(name: str, mode: str) -> None:
    module, plan, tokens = made(name)
    plain = copy.deepcopy(module)
    expected = CASES[name].by_hand(plain, tokens)
    assert not torch.allclose(module(tokens), expected, rtol=1e-3)  # the factors matter
    MODES[mode](module, plan)
    torch.testing.assert_close(module(tokens), expected, **EXACT)
    assert list(without_mark(module.state_dict())) == list(plain.state_dict())
    state, folded = residual_state(module), CASES[name].folded if mode == "fold" else frozenset()
    assert state is not None
    assert (state.mode, state.fingerprint, state.folded) == (mode, fingerprint(plan), folded)


@pytest.mark.parametrize("name", CASES)
def test_hooks_leave_the_weights_and_come_off(name: str) -> None:
    module, plan, tokens = made(name)
    before, output = snapshot(module), module(tokens)
    handle = attach_multipliers(module, plan)
    assert all(torch.equal(value, before[0][key]) for key, value in without_mark(module.state_dict()).items())
    handle.remove()
    networks.assert_unchanged(module, before)
    assert torch.equal(module(tokens), output)
    attach_multipliers(module, plan)
    multiplied = module(tokens)
    handle.remove()  # leaves the next one alone
    assert residual_state(module) is not None
    assert torch.equal(module(tokens), multiplied)


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
    torch.save(module, file := io.BytesIO())
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    twins = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded]
    handle.remove()
    for twin in twins:
        assert torch.equal(twin(tokens), expected)
        assert residual_state(twin) == residual_state(twins[0])
        with pytest.raises(ValueError, match="already has this plan's multipliers"):
            attach_multipliers(twin, plan)


@pytest.mark.parametrize(("name", "device"), [*((name, "cpu") for name in CASES), ("tied readout", "meta")])
def test_a_folded_checkpoint_continues_without_being_multiplied_again(name: str, device: str) -> None:
    module, plan, tokens = made(name)
    expected = fold(module, plan)(tokens)
    with torch.device(device):
        fresh = CASES[name].build().double()
    if device == "cpu":
        fresh.load_state_dict(without_mark(module.state_dict()))
    assert fold(fresh, plan, multiplied=True) is fresh
    if device == "meta":
        fresh.load_state_dict(module.state_dict(), assign=True)
    assert torch.equal(fresh(tokens), expected)
    assert residual_state(fresh) == residual_state(module)


def test_hooks_of_others_see_the_multiplier_as_a_part_of_its_module() -> None:
    """Outputs are multiplied for hooks that came before too; inputs are not yet multiplied for those."""
    module, plan, tokens = made("tensor")
    seen: list[Tensor] = []
    for put in (lambda: None, lambda: attach_multipliers(module, plan)):
        put()
        module.branches[0].register_forward_hook(lambda _, args, output: seen.append(output))
        module.head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    module(tokens)
    branch, later_branch, head, later_head = seen
    h = module.embedding.weight[tokens]
    torch.testing.assert_close(branch, ALPHA * FACTORS[0] * networks.mlp_by_hand(module.branches[0], h), **EXACT)
    assert torch.equal(branch, later_branch)
    torch.testing.assert_close(later_head, READOUT * head, **EXACT)


@pytest.mark.parametrize("before", ["nobody", "a hook", "a forward"])
def test_a_linear_layer_is_multiplied_where_its_output_is_unless_somebody_has_it(before: str) -> None:
    layer, kept = nn.Linear(3, 2, bias=False), []
    entry = ParameterPlan(Role.BRANCH_OUT, (2, 3), fans=(3, 2), base_fans=(3, 2), depth=2)
    plan = Plan({"layer.weight": entry}, (), (), (Multiplier("layer", "branch", 0.25, Site("layer"), ()),))
    x = torch.ones(4, 5, 3)
    plain = layer(x)
    attach_multipliers(nn.ModuleDict({"layer": layer}), plan)
    if before == "a hook":
        layer.register_forward_hook(lambda *call: kept.append(call[2]), prepend=True)
    elif before == "a forward":
        layer.forward = lambda x: kept.append(plain) or plain  # type: ignore[method-assign, func-returns-value]
    with profile() as operations:
        output = layer(x)
    assert torch.equal(output, plain * 0.25) and all(torch.equal(each, plain) for each in kept)
    assert ("aten::mul_" in {each.key for each in operations.key_averages()}) == (before == "nobody")


def test_a_parameter_of_two_multipliers_gets_both() -> None:
    module = nn.Linear(2, 2).double()
    before = copy.deepcopy(module.state_dict())
    branch = Multiplier("branch", "branch", 0.5, None, ("weight", "bias"))
    logits = Multiplier("logits", "logits", 0.25, None, ("weight",))
    fold(module, plan_of(module, (branch, logits), alpha=3.0))
    expected = {"weight": before["weight"] * (0.5 * 3.0 * 0.25), "bias": before["bias"] * (0.5 * 3.0)}
    torch.testing.assert_close(dict(module.state_dict()), expected, rtol=1e-15, atol=0)


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
    assert all(torch.equal(state[name], before[0][name]) for name in state) and sum(hooks) == 0
    assert torch.equal(module(tokens), output)
    assert residual_state(module) is not None


def test_frozen_and_half_precision_parameters_are_folded() -> None:
    module, plan, tokens = made("tensor")
    module.bfloat16().requires_grad_(False)
    expected = {name: value.double() for name, value in module.state_dict().items()}
    fold(module, plan)
    for name, factor in {"branches.0.out.weight": FACTORS[0] * ALPHA, "head.weight": READOUT}.items():
        folded = module.get_parameter(name).double()
        torch.testing.assert_close(folded, expected[name] * factor, rtol=2**-8, atol=0)
    assert module(tokens).dtype == torch.bfloat16


def test_inputs_by_keyword_and_integers_before_them() -> None:
    class Head(nn.Module):
        def forward(self, tokens: Tensor, scale: float = 2.0, *, h: Tensor) -> Tensor:
            return tokens + scale * h

    module = nn.ModuleDict({"head": Head(), "linear": nn.Linear(2, 2, bias=False)})
    multipliers = tuple(Multiplier(n, "readout", 0.5, Site(n, "input"), ()) for n in module)
    attach_multipliers(module, plan_of(module, multipliers))
    h, tokens = torch.tensor([1.0, 3.0]), torch.tensor([1, 2])
    assert torch.equal(module["head"](tokens, h=h), torch.tensor([2.0, 5.0]))
    assert torch.equal(module["linear"](input=h), module["linear"].weight @ h * 0.5)


@pytest.mark.parametrize("training", [True, False])
def test_fast_path_of_torch_transformers(training: bool) -> None:
    """In evaluation mode torch skips the submodules of an encoder layer, unless they have hooks."""
    layer = nn.TransformerEncoderLayer(D, 2, networks.HIDDEN, dropout=0.0, batch_first=True, norm_first=True).double()
    places = {Site("self_attn", "output", 0): "self_attn.out_proj", Site("linear2"): "linear2"}
    folds = {site: (f"{name}.weight", f"{name}.bias") for site, name in places.items()}
    multipliers = tuple(Multiplier(str(site), "branch", 0.5, site, names) for site, names in folds.items())
    plan = plan_of(layer, multipliers, alpha=1.0)
    h = torch.randn(2, 5, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    mixed = h + 0.5 * layer.self_attn(*[layer.norm1(h)] * 3, need_weights=False)[0]
    expected = mixed + 0.5 * layer.linear2(torch.relu(layer.linear1(layer.norm2(mixed))))
    folded = fold(copy.deepcopy(layer), plan).train(training)
    attach_multipliers(layer.train(training), plan)
    with torch.no_grad():
        for each in (layer, folded):
            torch.testing.assert_close(each(h), expected, **EXACT)


def changed(position: int, **changes: Any) -> Callable[[nn.Module, Plan], tuple[nn.Module, Plan]]:
    def change(module: nn.Module, plan: Plan) -> tuple[nn.Module, Plan]:
        multipliers = [*plan.multipliers]
        multipliers[position] = replace(multipliers[position], **changes)
        return module, replace(plan, multipliers=tuple(multipliers))

    return change


def quantized(module: nn.Module, plan: Plan) -> tuple[nn.Module, Plan]:
    layer = module.branches[1].out
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
    return module, plan


GONE = r"multiplies the branch 'branches\.1' at gone\.1 output, .* no submodule 'gone\.1'\. Plan"


@pytest.mark.parametrize(
    ("mode", "change", "message"),
    [
        ("hook", changed(1, site=None), r"branch 'branches\.1' cannot be attached as a hook.*residual=\"fold\""),
        ("fold", changed(-1, site=None, folds=()), r"readout 'head\.weight' can be neither folded.*nn\.Identity"),
        ("hook", changed(-1, site=None, folds=()), r"readout 'head\.weight' can be neither folded.*nn\.Identity"),
        ("hook", changed(1, site=Site("gone.1")), GONE),
        ("fold", changed(-1, site=Site("gone"), folds=()), r"at gone output, but the module has no submodule 'gone'"),
        ("hook", changed(2, site=Site("branches.0")), r"'branches\.0' and 'branches\.2' have the same place"),
        ("fold", changed(0, folds=("gone.weight",)), r"parameters that the module does not have: gone\.weight"),
        (
            "fold",
            lambda m, plan: (m.to("meta"), plan),
            r"meta device or of .*: branches\.0\.out\.bias, .*residual=\"hook\"",
        ),
        ("fold", quantized, r"meta device or of an integer type: branches\.1\.out\.weight\. Give them values"),
    ],
)
def test_refused_with_nothing_changed(mode: str, change: Callable[..., Any], message: str) -> None:
    module, plan = change(*made("tensor")[:2])
    before = snapshot(module)
    with pytest.raises(ValueError, match=message):
        MODES[mode](module, plan)
    networks.assert_unchanged(module, before)


@pytest.mark.parametrize("second", MODES)
@pytest.mark.parametrize(
    ("first", "how", "advice"),
    [("hook", "attached as hooks", r"\.remove\(\) of the handle"), ("fold", "folded into its weights", "built anew")],
)
def test_applied_twice(first: str, second: str, how: str, advice: str) -> None:
    module, plan, tokens = made("tensor")
    MODES[first](module, plan)
    output = module(tokens)
    for again, which in ((plan, "this plan"), (replace(plan, alpha=9.0), "another plan")):
        if (first, second, which) != ("hook", "fold", "this plan"):  # which moves them into the weights
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
    expected, weight = module(tokens), module.branches[1].out.weight
    quantized(module, plan)
    before = snapshot(module)
    with pytest.raises(ValueError, match="meta device or of an integer type"):
        fold(module, plan)
    assert snapshot(module)[1] == before[1]
    assert (state := residual_state(module)) is not None and state.mode == "hook"
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
    attach_multipliers(*changed(0, site=site)(module, plan))
    with pytest.raises(TypeError, match=message):
        module(tokens)


COMPILED: Any = {"backend": "eager", "fullgraph": True}
COMPILERS: dict[str, Callable[[nn.Module], Callable[[Tensor], Tensor]]] = {
    "wrapper": lambda module: torch.compile(module, **COMPILED),
    "in place": lambda module: module.compile(**COMPILED) or module,
    "function": lambda module: torch.compile(lambda tokens: module(tokens), **COMPILED),
}


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("name", "how"),
    [
        *(("tied readout", how) for how in COMPILERS),
        *((name, "wrapper") for name in ("tensor", "tuple", "model output")),
    ],
)
def test_compiled_after_attaching(name: str, how: str) -> None:
    module, plan, tokens = made(name)
    expected = CASES[name].by_hand(copy.deepcopy(module), tokens)
    attach_multipliers(module, plan)
    torch.testing.assert_close(COMPILERS[how](module)(tokens), expected, **EXACT)
