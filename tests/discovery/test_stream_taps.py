"""Taps of streams in all architectures: what is read is what a person reads off the source."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.architectures import ARCHITECTURES, TOKENS
from helpers.taps import inputs, logits, read, streams
from torch import Tensor, nn
from torch.nn import functional as F

from mlu_lightning import Plan, attach_multipliers, discover, initialize
from mlu_lightning.discovery.structure import Tap

DEPTH, HEADS, EMBEDDING = 2, 4, 32
EXACT = {"rtol": 1e-12, "atol": 1e-13}  # double precision; only the order of sums differs


# What a person reads off the source: how the first branch's stream is made, and the output from the last sum.
BEGIN: dict[str, Callable[[Any, Any], Tensor]] = {
    **dict.fromkeys(("resnet", "average of experts", "sum of experts"), lambda m, x: m.embed(x[0])),
    **dict.fromkeys(("causal transformer", "pre-norm decoder", "post-norm decoder"), lambda m, x: m.tokens(x[0])),
    "functional": lambda m, x: m.stem(F.relu(m.patches(x[0]))),
    **dict.fromkeys(("pre-norm encoder", "post-norm encoder"), lambda m, x: m.tokens(x[0]) + m.positions),
    "gpt2": lambda m, x: m.transformer.wte(TOKENS) + m.transformer.wpe.weight[:8],
    **dict.fromkeys(
        ("llama", "tied llama", "mistral", "qwen3", "mixtral"), lambda m, x: m.model.embed_tokens.weight[TOKENS]
    ),
    "gemma2": lambda m, x: m.model.embed_tokens.weight[TOKENS] * float(torch.tensor(EMBEDDING**0.5)),
    "gpt-neox": lambda m, x: m.gpt_neox.embed_in.weight[TOKENS],
    "bert": lambda m, x: m.bert.embeddings(TOKENS),
    "vit": lambda m, x: m.vit.embeddings(x["pixel_values"]),
    **dict.fromkeys(("t5", "tied t5"), lambda m, x: m.shared.weight[F.pad(TOKENS, (1, 0))[:, :-1]]),
    "mixer": lambda m, x: m.patches(x[0]).flatten(2).transpose(1, 2),
    **dict.fromkeys(("basic resnet", "bottleneck resnet"), lambda m, x: m.pool(F.relu(m.stem(x[0])))),
    "hugging face resnet": lambda m, x: m.resnet.embedder(x["pixel_values"]),
}
END: dict[str, Callable[[Any, Tensor], Tensor]] = {
    **dict.fromkeys(("resnet", "average of experts", "sum of experts"), lambda m, h: m.readout(h)),
    "causal transformer": lambda m, h: m.readout(m.norm(h)),
    "functional": lambda m, h: m.out(torch.tanh(m.transform(h))),
    "pre-norm encoder": lambda m, h: m.readout(m.encoder.norm(h)),
    "post-norm encoder": lambda m, h: m.readout(m.encoder.layers[-1].norm2(h)),
    "gpt2": lambda m, h: m.transformer.ln_f(h) @ m.transformer.wte.weight.T,
    **dict.fromkeys(("llama", "mistral", "qwen3", "mixtral"), lambda m, h: m.lm_head(m.model.norm(h))),
    **dict.fromkeys(("tied llama", "gemma2"), lambda m, h: m.model.norm(h) @ m.model.embed_tokens.weight.T),
    "gpt-neox": lambda m, h: m.lm_head(m.gpt_neox.final_layer_norm(h)),
    "bert": lambda m, h: m.cls(m.bert.encoder.layer[-1].output.LayerNorm(h)),
    "vit": lambda m, h: m.classifier(m.vit.layernorm(h)[:, 0]),
    "pre-norm decoder": lambda m, h: m.readout(m.decoder.norm(h)),
    "post-norm decoder": lambda m, h: m.readout(m.decoder.layers[-1].norm3(h)),
    "t5": lambda m, h: m.lm_head(m.decoder.final_layer_norm(h)),
    "tied t5": lambda m, h: m.decoder.final_layer_norm(h) * EMBEDDING**-0.5 @ m.shared.weight.T,
    "mixer": lambda m, h: m.classifier(m.norm(h).mean(1)),
    **dict.fromkeys(("basic resnet", "bottleneck resnet"), lambda m, h: m.fc(h.mean((2, 3)))),
    "hugging face resnet": lambda m, h: m.classifier(F.relu(h).mean((2, 3))),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_streams_and_outputs_are_those_read_off_the_source(name: str) -> None:
    architecture = ARCHITECTURES[name]
    module = architecture.build(DEPTH, HEADS, EMBEDDING)
    structure = discover(module, architecture.example)
    module = module.double().eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)  # norms, too, so that a wrong one shows
    blocks = [architecture.branches, architecture.encoder] if architecture.encoder else [architecture.branches]
    depths = [DEPTH if architecture.parallel else DEPTH * len(branches) for branches in blocks]
    keys = [(tap.reads, tap.number, tap.position) for tap in structure.taps]
    expected = [("stream", number, at) for number, depth in enumerate(depths) for at in range(depth + 1)]
    assert keys == [*expected, ("readout", 0, 0)]
    assert [tap.axis for tap in structure.taps] == [architecture.axis] * len(expected) + [-1]

    sites = [(b.stream, b.position, b.site) for b in structure.branches if b.site is not None]
    # a branch is a tap of its own here: read as one, it is numbered by its place among the branches
    written = tuple(Tap("stream", 2, i, site.module, "output", site.index, -1) for i, (_, _, site) in enumerate(sites))
    example = inputs(architecture)
    outputs: list[Tensor] = []
    found = read(module, structure.taps + written, lambda: outputs.append(logits(module, example)))
    branches = streams(found, 2)
    with torch.no_grad():
        for number, depth in enumerate(depths):
            h = streams(found, number)
            if number == 0:
                torch.testing.assert_close(h[0], BEGIN[name](module, example), **EXACT)
                torch.testing.assert_close(found["readout", 0, 0], END[name](module, h[-1]), **EXACT)
            else:
                torch.testing.assert_close(h[0], module.shared.weight[TOKENS], **EXACT)
            for position in range(depth):
                if name == "functional":  # its branches are no module's output
                    torch.testing.assert_close(h[position + 1], module.blocks[position](h[position]), **EXACT)
                    continue
                change = sum(b for (*at, _), b in zip(sites, branches, strict=True) if at == [number, position])
                torch.testing.assert_close(h[position + 1], after(name, module, position, h[position], change), **EXACT)
    made = 30 * torch.tanh(found["readout", 0, 0] / 30) if name == "gemma2" else found["readout", 0, 0]
    torch.testing.assert_close(made, outputs[0], **EXACT)


def after(name: str, module: Any, position: int, before: Tensor, change: Tensor) -> Tensor:
    if name in ("basic resnet", "bottleneck resnet"):
        return F.relu(module.stages[position // DEPTH][position % DEPTH].shortcut(before) + change)
    if name == "hugging face resnet":
        layer = module.resnet.encoder.stages[position // DEPTH].layers[position % DEPTH]
        return layer.shortcut(F.relu(before) if position > 0 else before) + change  # the sum is given to its activation
    if name == "mixer" and position % 2 == 0:
        return before + change.transpose(1, 2)
    if ARCHITECTURES[name].warns == "post-norm" and position > 0:
        before = post_norm(module, position)(before)
    return before + change


def post_norm(module: Any, position: int) -> Any:
    parts = 3 if hasattr(module, "decoder") else 2
    block, part = divmod(position - 1, parts)
    if hasattr(module, "bert"):
        layer = module.bert.encoder.layer[block]
        return layer.output.LayerNorm if part else layer.attention.output.LayerNorm
    layer = (module.decoder if parts == 3 else module.encoder).layers[block]
    return getattr(layer, f"norm{part + 1}")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_attached_multipliers_do_not_change_what_is_read(name: str) -> None:
    architecture = ARCHITECTURES[name]
    module = architecture.build(DEPTH, HEADS, EMBEDDING)
    plan = Plan.from_model(module, architecture.example, base=architecture.build(1, 2, 16), alpha=1.5)
    initialize(module, plan)
    assert plan.taps == discover(module, architecture.example).taps
    if any(multiplier.site is None for multiplier in plan.multipliers):
        assert name == "functional", "only its branches are no module's output"
        return
    attach_multipliers(module, plan)
    assert discover(module, architecture.example).taps == plan.taps
    module = module.double().eval()
    example = inputs(architecture)
    found = read(module, plan.taps, lambda: logits(module, example))
    h = streams(found)
    with torch.no_grad():
        torch.testing.assert_close(h[0], BEGIN[name](module, example), **EXACT)
        end = END[name](module, h[-1])
    # where END takes the tied table by itself, without the readout's hook; sqrt(D) on embeddings and 1/sqrt(D) before
    # the readout are the models' own, of which the multiplier takes the rest
    own = {"gpt2": 1, "tied llama": 1, "gemma2": float(torch.tensor(EMBEDDING**0.5)) / 16**0.5, "tied t5": 2**0.5}
    end = end * own.get(name, 2) / 2
    torch.testing.assert_close(found["readout", 0, 0], end, **EXACT)


def test_taps_are_in_the_plan_and_its_file(tmp_path: Path) -> None:
    for name in ("causal transformer", "bert"):
        architecture = ARCHITECTURES[name]
        plan = Plan.from_model(architecture.build(2, 4, 32), architecture.example)
        assert plan.taps == discover(architecture.build(2, 4, 32), architecture.example).taps
        plan.save(tmp_path / "plan.yaml")
        assert Plan.load(tmp_path / "plan.yaml") == plan
        lines = (tmp_path / "plan.yaml").read_text().splitlines()
        assert sum("reads: " in line for line in lines) == len(plan.taps) + len(plan.features) == 10, "one line each"
    (tmp_path / "plan.yaml").write_text("\n".join(line for line in lines if "reads: " not in line))
    with pytest.raises(ValueError, match="taps: '' should be a list"):
        Plan.load(tmp_path / "plan.yaml")
