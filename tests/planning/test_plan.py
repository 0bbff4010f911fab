import math
from collections.abc import Callable
from dataclasses import astuple
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.architectures import ARCHITECTURES, LANGUAGE, TOKENS, Architecture, Encoder
from helpers.architectures.language import gpt2_with_heads_of
from helpers.attentions import Packed
from helpers.table_by_hand import ADAMW, Shape, wanted
from torch import nn

from mlu_lightning import Plan, Role
from mlu_lightning.models import CausalTransformer, ResNet
from mlu_lightning.table import Scale, Variant

BASE = (2, 4, 32)


def planned(architecture: Architecture, *shape: int, **settings: Any) -> Plan:
    base = architecture.build(*BASE)
    return Plan.from_model(architecture.build(*shape), architecture.example, **{"base": base, **settings})


def by_hand(architecture: Architecture, plan: Plan, depth: float, m: float, d: float) -> dict[str, tuple[float, ...]]:
    """Columns of theory.md, section 3, for AdamW, by parameter: multiplier, std, lr, eps, decay."""
    found = {}
    for name, parameter in plan.parameters.items():
        width = 1 if any(fnmatch(name, pattern) for pattern in architecture.tokens) else d
        # outputs of transforms in heads grow here, so that they are as any other matrix on the stream
        variant = None if parameter.variant is Variant.IN_HEAD else parameter.variant
        multiplier, std, lr, eps, decay = astuple(
            wanted(parameter.role, ADAMW, Shape(depth, m, m, width, width), variant)
        )
        eps *= depth if fnmatch(name, architecture.again) else 1
        # what the model itself multiplies embeddings by is divided out
        own = d ** architecture.powers[0] if parameter.role is Role.EMBEDDING else 1
        found[name] = multiplier, std / own, lr / own, eps * own, decay * own
    return found


def resnet(depth: int = 2, hidden: int = 8, embedding: int = 4, **settings: Any) -> ResNet:
    return ResNet(depth, hidden, embedding, inputs=3, outputs=2, **settings)


@pytest.fixture(params=ARCHITECTURES, scope="module")
def architecture(request: pytest.FixtureRequest) -> Architecture:
    return ARCHITECTURES[request.param]


def test_numbers_of_a_deeper_and_wider_module(architecture: Architecture) -> None:
    plan = planned(architecture, 6, 8, 64)
    expected = by_hand(architecture, plan, depth=3, m=2, d=2)
    for name, scale in plan.scales("adamw").items():
        multiplier, *rest = expected[name]
        if architecture.unfoldable:
            multiplier = 1  # the norm at the end of the branch is multiplied, which no parameter can hold
        elif architecture.ends and plan.roles[name].in_branch:
            multiplier = 1 / 3 if any(fnmatch(name, pattern) for pattern in architecture.ends) else 1
        assert astuple(scale) == pytest.approx((multiplier, *rest)), name
    values = {multiplier.name: multiplier.value for multiplier in plan.multipliers}
    embeddings, logits = (2.0**power for power in architecture.powers)
    assert values.pop(architecture.readout) == pytest.approx(embeddings / 2 / logits)
    assert len(values) == len(plan.branches) and all(value == pytest.approx(1 / 3) for value in values.values())


@pytest.mark.parametrize(
    "name", ["resnet", "causal transformer", "llama", "functional", "mixer", "mixtral", "basic resnet", "t5", "gemma2"]
)
@pytest.mark.parametrize(("heads", "embedding"), [(16, 32), (4, 128), (2, 64), (4, 16)])
def test_numbers_with_hidden_and_embedding_changed_on_their_own(name: str, heads: int, embedding: int) -> None:
    plan = planned(ARCHITECTURES[name], 2, heads, embedding)
    expected = by_hand(ARCHITECTURES[name], plan, depth=1, m=heads / 4, d=embedding / 32)
    for parameter, scale in plan.scales("adamw").items():
        assert astuple(scale) == pytest.approx(expected[parameter]), parameter


def test_at_the_base_shape_everything_is_one(architecture: Architecture) -> None:
    plan = planned(architecture, *BASE)
    for family in ("sgd", "adam", "adamw", "muon"):
        assert set(plan.scales(family).values()) == {Scale(1, 1, 1, 1, 1)}
    assert all(plan.forward_multiplier(multiplier) == 1 for multiplier in plan.multipliers)


def test_absolute_form_is_the_papers_resnet() -> None:
    """theory.md, section 2: W_in = U^T/D and W_out = V/M, with lr η L M D for U and V and a readout 1/D."""
    depth, hidden, embedding = 6, 32, 16
    plan = Plan.from_model(resnet(depth, hidden, embedding))
    scales = plan.scales("sgd")
    read, write = scales["blocks.0.read.weight"], scales["blocks.0.write.weight"]
    lr = depth * hidden * embedding
    assert read.std == pytest.approx(math.sqrt(embedding) / embedding)
    # a step of U is D steps of W_in, whose gradient is D times as large
    assert read.lr == pytest.approx(lr / embedding**2)
    assert write.std == pytest.approx(math.sqrt(embedding) / hidden)
    assert write.lr == pytest.approx(lr / hidden**2)
    assert (read.multiplier, write.multiplier) == (1, pytest.approx(1 / depth))
    assert scales["readout.weight"].multiplier == pytest.approx(1 / embedding)
    assert plan.parameters["embed.weight"].base_std == pytest.approx(1 / math.sqrt(3)), "N(0, 1/d_in)"
    assert plan.parameters["readout.weight"].base_std == 1


def test_heads_are_hidden_units_in_the_absolute_form() -> None:
    plan = Plan.from_model(ARCHITECTURES["gpt2"].build(2, 4, 32), LANGUAGE)
    parameters = {name.removeprefix("transformer.h.1."): p for name, p in plan.parameters.items()}
    assert parameters["attn.c_attn.weight"].fans == (32, 4), "queries, keys and values of a head are one unit"
    assert parameters["attn.c_proj.weight"].fans == (4, 32)
    assert parameters["mlp.c_proj.weight"].fans == (128, 32)


def test_saved_edited_and_loaded(tmp_path: Path) -> None:
    plan = planned(ARCHITECTURES["gemma2"], 3, 8, 48, alpha=2.0)
    path = tmp_path / "plan.yaml"
    plan.save(path)
    assert Plan.load(path) == plan
    lines = path.read_text().splitlines()
    edited = [line.replace("role: stream_norm", "role: branch_norm") for line in lines]
    assert sum(a != b for a, b in zip(lines, edited, strict=True)) == 1, "one line for a parameter"
    path.write_text("\n".join(edited))
    assert Plan.load(path).roles["model.norm.weight"] is Role.BRANCH_NORM


def test_a_saved_plan_stands_for_its_base(architecture: Architecture, tmp_path: Path) -> None:
    base, saved = architecture.build(*BASE), tmp_path / "plan.yaml"
    planned(architecture, 3, 2, 16, base=base).save(saved)
    again, direct = (planned(architecture, 4, 6, 48, base=given) for given in (saved, base))
    assert again.roles == direct.roles and again.multipliers == direct.multipliers and again.streams == direct.streams
    for name, parameter in direct.parameters.items():
        assert again.parameters[name].ratios == parameter.ratios
        if "blocks.0" in name or "layers.0" in name:
            assert again.parameters[name].base_std == parameter.base_std


def test_printed_table() -> None:
    base = CausalTransformer(50, 8, depth=1, embedding=32, heads=2)
    plan = Plan.from_model(CausalTransformer(50, 8, depth=3, embedding=64, heads=8), base=base)
    text = str(plan)
    assert "depth 6 (base 2), embedding 64 (base 32)" in text
    rows = {tuple(cell.strip() for cell in line.split("│")[1:-1]) for line in text.splitlines() if "│" in line}
    assert ("branch_out", "6", "123k", "3", "4", "2", "0.333", "0.354", "0.25", "0.167", "4") in rows
    assert ("branches.*", "3", "attention", "8 (base 2)", "16", "0.333") in rows
    assert ("readout.weight", "", "readout", "", "", "0.5") in rows
    assert "factors for sgd" in plan.table("sgd")


def test_a_plan_that_does_not_fit_is_refused_with_the_difference() -> None:
    plan, other = Plan.from_model(resnet(2, 16, 8)), resnet(3, 16, 12)
    other.extra, other.embed = nn.Linear(1, 1, bias=False), nn.Linear(3, 8)
    del other.blocks[0]
    with pytest.raises(ValueError) as error:
        plan.check(other)
    assert "embed.bias is in the module only" in str(error.value)
    assert "extra.weight is in the module only" in str(error.value)
    assert "readout.weight is [2, 12] in the module and [2, 8] in the plan" in str(error.value)
    plan.check(resnet(2, 16, 8))
    with pytest.raises(ValueError, match=r"blocks\.1\.read\.weight is in the plan only"):
        plan.check(resnet(1, 16, 8))


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("tied llama", r"lm_head\.weight has no counterpart in the base"),
        ("gpt2", r"different architecture: model\..* has no counterpart.*and \d+ more"),
    ],
)
def test_base_of_another_architecture(base: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        planned(ARCHITECTURES["llama"], *BASE, base=ARCHITECTURES[base].build(*BASE))
    assert "Give a base that differs from the module in depth, hidden width or embedding only" in str(error.value)


def test_base_of_the_same_names_and_another_architecture() -> None:
    pre, post = (Encoder(2, 2, 16, norm_first=first) for first in (True, False))
    del pre.encoder.norm, post.encoder.norm
    pre.encoder.norm = post.encoder.norm = None
    message = r"norm1\.weight is branch_norm \[16\] and the base's is stream_norm \(post_norm\) \[16\]"
    with pytest.raises(ValueError, match=message):
        Plan.from_model(pre, (TOKENS,), base=post)


def test_base_that_is_bigger_in_one_dimension() -> None:
    base, module = CausalTransformer(50, 8, 4, 64, heads=2), CausalTransformer(50, 8, 8, 32, heads=4)
    plan = Plan.from_model(module, base=base)
    scale = plan.scales("adamw")["branches.0.query.weight"]
    assert (scale.lr, scale.std) == (pytest.approx(2.0), pytest.approx(math.sqrt(2)))
    assert plan.scales("adamw")["readout.weight"].multiplier == 2


def test_base_on_meta_has_no_standard_deviations() -> None:
    with torch.device("meta"):
        base = CausalTransformer(50, 8, 1, 16, heads=1)
    with pytest.raises(
        ValueError, match=r"base CausalTransformer is on the meta device.*Build the base on a real device"
    ):
        Plan.from_model(CausalTransformer(50, 8, 2, 16, heads=1), torch.zeros(1, 8, dtype=torch.long), base=base)


@pytest.mark.parametrize(
    ("build", "example", "where"),
    [
        (lambda dim: CausalTransformer(50, 8, 2, 32, heads=2, head_dim=dim), None, "branches.0.query output"),
        (gpt2_with_heads_of, {"input_ids": TOKENS}, "transformer.h.0.attn.c_attn output, entries 0 to 64"),
        (lambda d: Encoder(2, 2, 2 * d, norm_first=True), TOKENS, "encoder.layers.0.self_attn weight, entries 0 to 64"),
    ],
)
def test_head_dim_that_differs_from_the_base(build: Callable[[int], nn.Module], example: Any, where: str) -> None:
    plan = Plan.from_model(build(32), example, base=build(16))
    logits = [multiplier for multiplier in plan.multipliers if multiplier.kind == "logits"]
    assert [multiplier.value for multiplier in logits] == [pytest.approx(0.5**0.5)] * 2
    assert str(logits[0].site) == where
    assert "head_dim is 32 and the base's is 16" in plan.warnings[0]
    assert "µP's rule is used instead" in plan.warnings[0] and "1/head_dim" in plan.warnings[0]


def packed(heads: int, head_dim: int) -> nn.Module:
    """Queries, keys and values are interleaved in one projection."""
    layer = nn.Linear(16, 3 * heads * head_dim)
    return Packed(heads * head_dim, layer, lambda layer, h: layer(h).unflatten(-1, (heads, 3, head_dim)).unbind(-2))


def test_head_dim_that_differs_where_logits_cannot_be_multiplied() -> None:
    example, base = torch.ones(1, 4, 3), packed(2, 8)
    with pytest.raises(
        ValueError, match=r"head_dim of .* is 16 and the base's is 8.*Keep head_dim at the base's value"
    ):
        Plan.from_model(packed(2, 16), example, base=base)
    assert Plan.from_model(packed(4, 8), example, base=base).branches[0].hidden == 4


def test_frozen_parameters_are_planned() -> None:
    assert Plan.from_model(resnet(train_embedding=False)) == Plan.from_model(resnet())


def test_overrides_that_match_nothing_or_name_no_role() -> None:
    for pattern, role, message in (
        ("block.*", "readout", r"override 'block\.\*': 'readout' matches no parameter.*such as embed\.weight"),
        ("readout.*", "output", "names the role 'output', which does not exist. Roles are: embedding, "),
    ):
        with pytest.raises(ValueError, match=message):
            Plan.from_model(resnet(), overrides={pattern: role})


def test_the_bases_std_is_that_of_the_nearest_place_along_the_depth() -> None:
    base, module = resnet(3), resnet(6)
    with torch.no_grad():
        for i, block in enumerate(base.blocks):
            block.write.weight.fill_(i + 1.0)
    plan = Plan.from_model(module, base=base)
    stds = [plan.parameters[f"blocks.{i}.write.weight"].base_std for i in range(6)]
    assert stds == pytest.approx([1, 2, 3, 3, 3, 3])


def test_an_override_may_name_a_variant_of_a_role() -> None:
    plan = Plan.from_model(resnet(4), base=resnet(2), overrides={"*.write.weight": "branch_out (before_norm)"})
    variants = [plan.parameters[f"blocks.0.{name}.weight"].variant for name in ("write", "read")]
    assert variants == [Variant.BEFORE_NORM, None]
