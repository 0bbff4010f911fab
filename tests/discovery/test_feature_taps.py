"""Pre-activations of branches: where they are found in all architectures, and that what is read is what enters."""

import math
from typing import Any

import pytest
import torch
from helpers.architectures import ARCHITECTURES, TOKENS
from helpers.attentions import causal_logits
from helpers.feature_models import ATTENTIONS, INPUTS, LENGTH, UNITS, AttentionNet, UnitsNet
from helpers.leaving import hooks
from helpers.residual_networks import Net
from torch import Tensor, nn

from mlu_lightning import Plan, discover
from mlu_lightning.models import CausalTransformer
from mlu_lightning.observation import locate_features, observe, rms_change
from mlu_lightning.observation.features import spread

DEPTH, HEADS, EMBEDDING = 2, 2, 16
OF_EXPERTS = ("average of experts", "sum of experts", "mixtral")  # whose perceptrons cannot be read
CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # single precision


def located(module: nn.Module, example: Any) -> Any:
    structure = discover(module, example)
    return locate_features(structure.features, structure.branches)


def read(module: nn.Module, example: Any) -> dict[str, Tensor]:
    return observe(module, example, located(module, example))


def seen_by_hooks(module: nn.Module, name: str, run: Any) -> Tensor:
    found: list[Tensor] = []
    handle = module.get_submodule(name).register_forward_hook(lambda *args: found.append(args[-1]))
    with torch.no_grad():
        module.eval()
        run()
    handle.remove()
    return found[0]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_branch_but_mixtures_of_experts_can_be_read(name: str) -> None:
    architecture = ARCHITECTURES[name]
    module = architecture.build(DEPTH, HEADS, EMBEDDING)
    branches = discover(module, architecture.example).branches
    expected = {f"{b.kind}/{b.name}" for b in branches if b.kind == "attention" or name not in OF_EXPERTS}
    assert set(read(module, architecture.example)) == expected


@pytest.mark.parametrize(
    ("architecture", "branch", "enters"),
    [
        ("gpt2", "mlp/transformer.h.1.mlp", ".c_fc"),  # a formula of tanh and a cube follows
        ("gemma2", "mlp/model.layers.1.mlp", ".gate_proj"),  # the gate, not what it is multiplied with
        ("llama", "mlp/model.layers.0.mlp", ".gate_proj"),
        ("pre-norm encoder", "mlp/encoder.layers.1", ".linear1"),
        # before the last of its convolutions
        ("hugging face resnet", "convolution/resnet.encoder.stages.0.layers.0.layer", ".1.normalization"),
    ],
)
def test_units_are_what_enters_the_nonlinearity(architecture: str, branch: str, enters: str) -> None:
    module = ARCHITECTURES[architecture].build(DEPTH, HEADS, EMBEDDING)
    example = ARCHITECTURES[architecture].example
    run = (lambda: module(**example)) if isinstance(example, dict) else (lambda: module(*example))
    values = seen_by_hooks(module, branch.partition("/")[2] + enters, run)
    values = values.movedim(1, -1) if branch.startswith("convolution") else values
    rows = values.reshape(-1, values.shape[-1])
    torch.testing.assert_close(read(module, example)[branch], rows[spread(len(rows), 32)], **CLOSE)


def transformer(samples: int = 3) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    model = CausalTransformer(vocabulary=9, context=8, depth=1, embedding=12, heads=2, head_dim=6)
    return model, torch.randint(9, (samples, 9))


def test_logits_of_fused_attention_are_those_of_its_queries_and_keys() -> None:
    model, tokens = transformer(samples=1)
    logits = causal_logits(model.branches[0], model.tokens(tokens[:, :-1]))
    found = read(model, tokens)["attention/branches.0"]
    assert found.isneginf().sum() > 0
    torch.testing.assert_close(found, logits.reshape(16, 8).detach(), **CLOSE)


@pytest.mark.parametrize("form", UNITS)
def test_units_of_every_form(form: str) -> None:
    module, x = UnitsNet(UNITS[form]), torch.randn(4, INPUTS)
    found = read(module, x)
    stream = module.embed(x)
    for number, block in enumerate(module.blocks):
        made = block.read(block.norm(stream)).detach()
        torch.testing.assert_close(found[f"mlp/blocks.{number}"], UNITS[form].entering(block, made), **CLOSE)
        stream = block(stream)


@pytest.mark.parametrize("form", ATTENTIONS)
def test_logits_of_every_form(form: str) -> None:
    module, x = AttentionNet(ATTENTIONS[form]), torch.randn(2, LENGTH, INPUTS)
    query, key, _ = module.parts(module.embed(x))
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = ATTENTIONS[form].logits((query @ key.mT / math.sqrt(query.shape[-1])).detach()).reshape(-1, LENGTH)
    torch.testing.assert_close(read(module, x)["attention/self"], logits[spread(len(logits), 32)], **CLOSE)


class WithWeights(nn.MultiheadAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs | {"need_weights": True})


def test_logits_of_multihead_attention_that_returns_its_weights() -> None:
    module = ARCHITECTURES["pre-norm encoder"].build(1, HEADS, EMBEDDING)
    layer: Any = module.get_submodule("encoder.layers.0")
    fused = read(module, (TOKENS,))
    layer.self_attn.__class__ = WithWeights
    torch.testing.assert_close(read(module, (TOKENS,)), fused, **CLOSE)


@pytest.mark.parametrize("how", [lambda a, b: a + b, lambda a, b: torch.cat((a, b))])
def test_of_two_passes_through_a_network_the_first_one_is_read(how: Any) -> None:
    module, x = UnitsNet(UNITS["glu"]), torch.randn(4, INPUTS)
    twice = Net(lambda net, x: how(net.net(x), net.net(2 * x)), net=module, embed=nn.Identity(), out=nn.Identity())
    twice.blocks = nn.Identity()
    once = {name.replace("/", "/net."): values for name, values in read(module, x).items()}
    assert len(once) == 2
    torch.testing.assert_close(read(twice, x), once, rtol=0, atol=0)


def test_logits_that_grow_large_are_not_taken_for_masked() -> None:
    """A weight that underflows is not one of a key that cannot be seen."""
    module, x = AttentionNet(ATTENTIONS["eager, -inf"]), torch.randn(2, LENGTH, INPUTS)
    locations = located(module, x)
    before = observe(module, x, locations)["attention/self"]
    with torch.no_grad():
        module.queries.weight.mul_(400)
        module.queries.bias.mul_(400)
    after = observe(module, x, locations)["attention/self"]
    assert (after.softmax(-1) == 0).sum() > after.isneginf().sum()
    seen = ~before.isneginf()
    assert torch.equal(seen, ~after.isneginf())
    expected = 399 * before[seen].double().square().mean().sqrt().item()
    assert rms_change(before, after) == pytest.approx(expected, rel=1e-4)


def test_logits_of_mixed_precision_are_not_rounded_once_more() -> None:
    module, x = AttentionNet(ATTENTIONS["causal"]), torch.randn(2, LENGTH, INPUTS)
    locations = located(module, x)
    with torch.autocast("cpu", torch.bfloat16):
        found = observe(module, x, locations)["attention/self"]
        query, key, _ = module.parts(module.embed(x))
    assert query.dtype == torch.bfloat16
    logits = ATTENTIONS["causal"].logits((query.float() @ key.float().mT / 2).detach()).reshape(-1, LENGTH)
    torch.testing.assert_close(found, logits[spread(len(logits), 32)], **CLOSE)


def test_features_are_in_the_plan_and_nothing_is_left_in_the_module() -> None:
    model, tokens = transformer()
    plan = Plan.from_model(model, tokens, base=model)
    assert plan.features == discover(model, tokens).features
    assert Plan.from_yaml(plan.to_yaml(), "itself").features == plan.features
    before = hooks(model)
    locations = locate_features(plan.features, plan.branches)
    first, again = (observe(model, tokens, locations) for _ in range(2))
    torch.testing.assert_close(first, again, rtol=0, atol=0, equal_nan=True)
    assert hooks(model) == before


def test_watching_ends_when_the_forward_pass_fails() -> None:
    model, tokens = transformer()
    locations = located(model, tokens)

    def fail(*_: Any) -> None:
        raise RuntimeError("on purpose")

    handle = model.branches[0].out.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        observe(model, tokens, locations)
    handle.remove()
    assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    assert not torch.overrides._get_current_function_mode_stack()
    assert set(observe(model, tokens, locations)) == {"attention/branches.0", "mlp/branches.1"}
