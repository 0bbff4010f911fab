from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.architectures import ARCHITECTURES, TOKENS, Architecture
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from mlu_lightning import Plan, attach_multipliers, discover, initialize
from mlu_lightning.discovery.structure import Tap
from mlu_lightning.models import ResNet
from mlu_lightning.observation import locate, observe

DEPTH, HEADS, EMBEDDING = 2, 4, 32
EXACT = {"rtol": 1e-12, "atol": 1e-13}  # double precision; only the order of sums differs


def read(module: nn.Module, taps: tuple[Tap, ...], forward: Callable[[], object]) -> dict[tuple[str, int, int], Tensor]:
    """What is at each tap in a forward pass, in double precision and evaluation mode."""
    found: dict[tuple[str, int, int], Tensor] = {}
    handles = []
    for tap in taps:
        key = (tap.reads, tap.number, tap.position)

        def given(_: nn.Module, args: Any, kwargs: Any, tap: Tap = tap, key: tuple[str, int, int] = key) -> None:
            tensors = [leaf for leaf in (*args, *kwargs.values()) if isinstance(leaf, Tensor)]
            found.setdefault(key, tensors[tap.index or 0].detach().clone())

        def returned(_: nn.Module, args: Any, out: Any, tap: Tap = tap, key: tuple[str, int, int] = key) -> None:
            value = out if tap.index is None else list(out.values() if isinstance(out, dict) else out)[tap.index]
            found.setdefault(key, value.detach().clone())

        target = module.get_submodule(tap.module)
        if tap.where == "input":
            handles.append(target.register_forward_pre_hook(given, prepend=True, with_kwargs=True))
        else:
            handles.append(target.register_forward_hook(returned))
    with torch.no_grad():
        forward()
    for handle in handles:
        handle.remove()
    return found


def streams(found: dict[tuple[str, int, int], Tensor], number: int = 0) -> list[Tensor]:
    return [value for (reads, n, _), value in sorted(found.items()) if (reads, n) == ("stream", number)]


def places(module: nn.Module, example: Any) -> list[str]:
    return [str(tap) for tap in discover(module, example).taps]


def doubles(example: Any) -> Any:
    if isinstance(example, dict):
        return {key: doubles(value) for key, value in example.items()}
    if isinstance(example, tuple):
        return tuple(map(doubles, example))
    return example.double() if example.is_floating_point() else example


def inputs(architecture: Architecture) -> Any:
    """Arguments of forward; the registry has batches for LightningModules."""
    example = architecture.example
    return doubles(example if isinstance(example, (dict, tuple)) else (TOKENS,))


def logits(module: nn.Module, example: Any) -> Tensor:
    if isinstance(module, ResNet):
        example = example[:1]
    output = module(**example) if isinstance(example, dict) else module(*example)
    result: Tensor = getattr(output, "logits", output)
    return result


# What a person reads off the source: how the first branch's stream is made, and the output from the last sum.
BEGIN: dict[str, Callable[[Any, Any], Tensor]] = {
    "resnet": lambda m, x: m.embed(x[0]),
    "causal transformer": lambda m, x: m.tokens(x[0]),
    "functional": lambda m, x: m.stem(F.relu(m.patches(x[0]))),
    "pre-norm encoder": lambda m, x: m.tokens(x[0]) + m.positions,
    "post-norm encoder": lambda m, x: m.tokens(x[0]) + m.positions,
    "gpt2": lambda m, x: m.transformer.wte(TOKENS) + m.transformer.wpe.weight[:8],
    "llama": lambda m, x: m.model.embed_tokens.weight[TOKENS],
    "tied llama": lambda m, x: m.model.embed_tokens.weight[TOKENS],
    "gemma2": lambda m, x: m.model.embed_tokens.weight[TOKENS] * float(torch.tensor(EMBEDDING**0.5)),
    "gpt-neox": lambda m, x: m.gpt_neox.embed_in.weight[TOKENS],
    "bert": lambda m, x: m.bert.embeddings(TOKENS),
    "vit": lambda m, x: m.vit.embeddings(x["pixel_values"]),
    "pre-norm decoder": lambda m, x: m.tokens(x[0]),
    "post-norm decoder": lambda m, x: m.tokens(x[0]),
    "average of experts": lambda m, x: m.embed(x[0]),
    "sum of experts": lambda m, x: m.embed(x[0]),
    "mistral": lambda m, x: m.model.embed_tokens.weight[TOKENS],
    "qwen3": lambda m, x: m.model.embed_tokens.weight[TOKENS],
    "mixtral": lambda m, x: m.model.embed_tokens.weight[TOKENS],
    "t5": lambda m, x: m.shared.weight[F.pad(TOKENS, (1, 0))[:, :-1]],
    "tied t5": lambda m, x: m.shared.weight[F.pad(TOKENS, (1, 0))[:, :-1]],
    "mixer": lambda m, x: m.patches(x[0]).flatten(2).transpose(1, 2),
    "basic resnet": lambda m, x: m.pool(F.relu(m.stem(x[0]))),
    "bottleneck resnet": lambda m, x: m.pool(F.relu(m.stem(x[0]))),
    "hugging face resnet": lambda m, x: m.resnet.embedder(x["pixel_values"]),
}
END: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "resnet": lambda m, h: m.readout(h),
    "causal transformer": lambda m, h: m.readout(m.norm(h)),
    "functional": lambda m, h: m.out(torch.tanh(m.transform(h))),
    "pre-norm encoder": lambda m, h: m.readout(m.encoder.norm(h)),
    "post-norm encoder": lambda m, h: m.readout(m.encoder.layers[-1].norm2(h)),
    "gpt2": lambda m, h: m.transformer.ln_f(h) @ m.transformer.wte.weight.T,
    "llama": lambda m, h: m.lm_head(m.model.norm(h)),
    "tied llama": lambda m, h: m.model.norm(h) @ m.model.embed_tokens.weight.T,
    "gemma2": lambda m, h: m.model.norm(h) @ m.model.embed_tokens.weight.T,
    "gpt-neox": lambda m, h: m.lm_head(m.gpt_neox.final_layer_norm(h)),
    "bert": lambda m, h: m.cls(m.bert.encoder.layer[-1].output.LayerNorm(h)),
    "vit": lambda m, h: m.classifier(m.vit.layernorm(h)[:, 0]),
    "pre-norm decoder": lambda m, h: m.readout(m.decoder.norm(h)),
    "post-norm decoder": lambda m, h: m.readout(m.decoder.layers[-1].norm3(h)),
    "average of experts": lambda m, h: m.readout(h),
    "sum of experts": lambda m, h: m.readout(h),
    "mistral": lambda m, h: m.lm_head(m.model.norm(h)),
    "qwen3": lambda m, h: m.lm_head(m.model.norm(h)),
    "mixtral": lambda m, h: m.lm_head(m.model.norm(h)),
    "t5": lambda m, h: m.lm_head(m.decoder.final_layer_norm(h)),
    "tied t5": lambda m, h: m.decoder.final_layer_norm(h) * EMBEDDING**-0.5 @ m.shared.weight.T,
    "mixer": lambda m, h: m.classifier(m.norm(h).mean(1)),
    "basic resnet": lambda m, h: m.fc(h.mean((2, 3))),
    "bottleneck resnet": lambda m, h: m.fc(h.mean((2, 3))),
    "hugging face resnet": lambda m, h: m.classifier(F.relu(h).mean((2, 3))),
}


@pytest.fixture(params=ARCHITECTURES, scope="module")
def name(request: pytest.FixtureRequest) -> str:
    result: str = request.param
    return result


def test_streams_and_outputs_are_those_read_off_the_source(name: str) -> None:
    architecture = ARCHITECTURES[name]
    torch.manual_seed(0)
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
    """What a person reads off the source: the stream after an addition, as the next branch reads it."""
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


def post_norm(module: Any, position: int) -> nn.Module:
    """The norm after an addition."""
    if hasattr(module, "decoder"):
        block, part = divmod(position - 1, 3)
        layer = module.decoder.layers[block]
        norm: nn.Module = (layer.norm1, layer.norm2, layer.norm3)[part]
        return norm
    block, half = divmod(position - 1, 2)
    if hasattr(module, "bert"):
        layer = module.bert.encoder.layer[block]
        norm = layer.output.LayerNorm if half else layer.attention.output.LayerNorm
    else:
        norm = module.encoder.layers[block].norm2 if half else module.encoder.layers[block].norm1
    return norm


def test_attached_multipliers_do_not_change_what_is_read(name: str) -> None:
    architecture = ARCHITECTURES[name]
    torch.manual_seed(0)
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
    if name in ("gpt2", "tied llama", "gemma2", "tied t5"):
        end = end / 2  # where END takes the tied table by itself, without the readout's hook
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
    (tmp_path / "plan.yaml").write_text("\n".join(line for line in lines if "reads: " not in line).replace("taps:", ""))
    with pytest.raises(ValueError, match="features: '' should be a list"):
        Plan.load(tmp_path / "plan.yaml")


class Block(nn.Module):
    """A residual block, with or without the sum in it."""

    def __init__(self, width: int = 8, adds: bool = True) -> None:
        super().__init__()
        self.adds = adds
        self.read, self.write = nn.Linear(width, 16), nn.Linear(16, width)

    def forward(self, stream: Tensor) -> Tensor:
        branch: Tensor = self.write(torch.tanh(self.read(stream)))
        return stream + branch if self.adds else branch


class Net(nn.Module):
    """Two blocks between an embedding and a readout; subclasses say how they are put together."""

    def __init__(self, adds: bool = True) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(3, 8), nn.Linear(8, 2)
        self.blocks = nn.ModuleList(Block(adds=adds) for _ in range(2))
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = block(h)
        output: Tensor = self.out(h)
        return output


X = torch.ones(4, 3)


class ByKeyword(Net):
    """Blocks are given a mask without a gradient first, and the stream by keyword."""

    class Masked(Block):
        def forward(self, *, mask: Tensor, stream: Tensor) -> Tensor:
            return super().forward(stream) * mask

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self.Masked(adds=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = h + block(mask=torch.ones(4, 1), stream=h)
        output: Tensor = self.out(h)
        return output


def test_tensors_without_gradient_count_among_inputs() -> None:
    assert places(ByKeyword(), X) == [
        "stream 0 after 0 additions: embed output",
        "stream 0 after 1 additions: blocks.1 input[1]",
        "stream 0 after 2 additions: out input[0]",
        "readout 0: out output",
    ]


class InPlace(Net):
    """The sum is made in place, which changes what the block was given while it runs."""

    class Adding(Block):
        def forward(self, stream: Tensor) -> Tensor:
            stream += super().forward(stream)
            return stream

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self.Adding(adds=False) for _ in range(2))


def test_sums_in_place() -> None:
    torch.manual_seed(0)
    module = InPlace()
    structure = discover(module, X)
    assert [str(tap).partition(": ")[2] for tap in structure.taps] == [
        "embed output",
        "blocks.0 output",
        "blocks.1 output",
        "out output",
    ]
    h = streams(read(module, structure.taps, lambda: module(X)))
    with torch.no_grad():
        torch.testing.assert_close(h[1], h[0] + Block.forward(module.blocks[0], h[0]))


class Dropped(Net):
    """Dropout before, between and after the sums; only functions are between the last of them and the readout."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(self.embed(x), 0.5, self.training)
        for block in self.blocks:
            h = self.drop(h + block(h))
        return F.dropout(h, 0.5, self.training) @ self.out.weight.T + self.out.bias


def test_dropout_is_nothing_when_the_stream_is_read() -> None:
    torch.manual_seed(0)
    module = Dropped(adds=False).eval()
    structure = discover(module, X)
    assert [str(tap) for tap in structure.taps] == [
        "stream 0 after 0 additions: embed output",
        "stream 0 after 1 additions: blocks.1 input[0]",
        # only the second call of the dropout module is given the last sum
        "branch 0 after 1 additions: blocks.1 output",
        "readout 0: (module itself) output",
    ]
    h = streams(read(module, structure.taps, lambda: module(X)))
    with torch.no_grad():
        torch.testing.assert_close(h[1], h[0] + module.blocks[0](h[0]))


class Scaled(Net):
    """The embedding is multiplied before it is the stream, and so are sums before they are given to anything."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x) * 3
        mask = torch.ones(4, 1).expand(4, 8)
        for block in self.blocks:
            h = (h + block(h)) * mask
        output: Tensor = self.out(2 * h)
        return output


def test_constant_factors_are_not_passed_over() -> None:
    assert places(Scaled(adds=False), X) == [
        "stream 0 after 0 additions: blocks.0 input[0]",
        "branch 0 after 0 additions: blocks.0 output",
        "readout 0: out output",
    ]


class Bare(Net):
    """Nothing is given the last sum, which the mean over samples follows; branches can be added in several ways."""

    def __init__(self, form: str) -> None:
        super().__init__(adds=False)
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        first, second = self.blocks
        if self.form == "one":
            h = h + first(h)
            h = h + second(h)
        elif self.form == "parallel":
            h = h + (second(h) + first(h))
        elif self.form == "in turn":
            h = h + first(h) + second(h)
        elif self.form == "scaled":
            h = h + 0.5 * first(h)
        elif self.form == "alpha":
            h = torch.add(h, first(h), alpha=2)
        elif self.form == "difference":
            h = h - first(h)
        else:
            h = h + first(h) + self.embed(x)
        output: Tensor = h.mean(0) @ self.out.weight.T + self.out.bias
        return output


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("form", ["one", "parallel", "in turn"])
def test_a_sum_that_is_given_to_nothing_is_read_as_its_summands(form: str, hooked: bool) -> None:
    torch.manual_seed(0)
    module = Bare(form)
    plan = Plan.from_model(module, X)
    if hooked:
        # that of the readout has no place, which is not what this is about
        branches = tuple(multiplier for multiplier in plan.multipliers if multiplier.kind == "branch")
        attach_multipliers(module, replace(plan, multipliers=branches))
    assert discover(module, X).taps == plan.taps
    depth = plan.streams[0].depth
    taps = [(tap.reads, tap.position, tap.module, tap.where) for tap in plan.taps[:-1]]
    before = ("stream", 0, "embed", "output")
    if form == "one":
        assert taps == [before, ("stream", 1, "blocks.1", "input"), ("branch", 1, "blocks.1", "output")]
    else:
        assert sorted(taps) == [("branch", 0, f"blocks.{i}", "output") for i in (0, 1)] + [before]
    found = observe(module, X, locate(plan.taps, [depth], [0, 1]))
    factor = 1 / depth if hooked else 1.0
    with torch.no_grad():
        h = module.embed(X)
        if form == "one":
            h = h + factor * module_alone(module.blocks[0], h)
            h = h + factor * module_alone(module.blocks[1], h)
        else:
            h = h + factor * (module_alone(module.blocks[0], h) + module_alone(module.blocks[1], h))
    torch.testing.assert_close(found["s=1"], h)


def module_alone(block: nn.Module, h: Tensor) -> Tensor:
    """A block without its hooks."""
    return type(block).forward(block, h)


@pytest.mark.parametrize("form", ["scaled", "alpha", "difference", "more"])
def test_a_sum_of_anything_else_is_not_read(form: str) -> None:
    structure = discover(Bare(form), X)
    assert [tap.reads for tap in structure.taps if tap.position == 0] == ["stream", "readout"][: len(structure.taps)]


class Between(Net):
    """A matrix without a module between the sums: what the next block is given is not what was summed."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = F.linear(h + block(h), block.read.weight[:8])
        output: Tensor = self.out(h)
        return output


def test_what_a_matrix_makes_of_a_sum_does_not_stand_for_it() -> None:
    assert places(Between(adds=False), X) == [
        "stream 0 after 0 additions: embed output",
        "branch 0 after 0 additions: blocks.0 output",
        "readout 0: out output",
    ]


class InTurn(Net):
    """Two branches that read the same stream are added one after the other."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        first, second = self.blocks
        output: Tensor = self.out(self.drop(h + first(h)) + second(h))
        return output


def test_branches_that_are_added_in_turn_make_one_position() -> None:
    assert places(InTurn(adds=False), X) == [
        "stream 0 after 0 additions: embed output",
        "stream 0 after 1 additions: out input[0]",
        "readout 0: out output",
    ]


class Shared(Net):
    """One block that is called at every depth."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for _ in range(3):
            h = h + self.blocks[0](h)
        output: Tensor = self.out(h)
        return output


def test_only_first_calls_are_read() -> None:
    assert places(Shared(adds=False), X) == [
        "stream 0 after 0 additions: embed output",
        "branch 0 after 0 additions: blocks.0 output",
        "stream 0 after 3 additions: out input[0]",
        "readout 0: out output",
    ]


class Twice(Net):
    """Two forward passes, the second on something else, before which nothing, or another without gradients runs."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        if self.first:
            with torch.no_grad():
                super().forward(-x)
        return super().forward(2 * x) - super().forward(x)


def test_the_first_of_two_passes_is_read() -> None:
    module = Twice(first=False)
    structure = discover(module, X)
    assert [tap.position for tap in structure.taps] == [0, 1, 2, 0]
    found = read(module, structure.taps, lambda: module(X))
    with torch.no_grad():
        torch.testing.assert_close(found["stream", 0, 2], _blocks(module, 2 * X))
        torch.testing.assert_close(found["readout", 0, 0], Net.forward(module, 2 * X))


def test_a_pass_after_one_without_gradients_cannot_be_read() -> None:
    """What is read later is the first call, which is not the one that is trained."""
    assert discover(Twice(first=True), X).taps == ()


class StepTwice(LightningModule):
    """Two passes of a network in a training step."""

    def __init__(self) -> None:
        super().__init__()
        self.net = ResNet(2, 8, 4, inputs=3, outputs=2)

    def training_step(self, batch: Tensor) -> Tensor:
        return (self.net(batch) - self.net(batch.flip(0))).square().mean()


def test_passes_of_a_training_step() -> None:
    assert places(StepTwice(), X) == [
        "stream 0 after 0 additions: net.embed output",
        "stream 0 after 1 additions: net.blocks.1 input[0]",
        "stream 0 after 2 additions: net.readout input[0]",
        "readout 0: net.readout output",
    ]


def _blocks(module: Net, x: Tensor) -> Tensor:
    h: Tensor = module.embed(x)
    for block in module.blocks:
        h = block(h)
    return h


class Halves(nn.Module):
    """Half of the coordinates are the stream of the other half's branch, as in reversible networks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(3, 16), nn.Linear(8, 2)
        self.block = Block(adds=False)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.embed(x).chunk(2, -1)
        output: Tensor = self.out(first + self.block(second))
        return output


def test_outputs_of_one_operation_are_told_apart() -> None:
    assert [str(tap) for tap in discover(Halves(), X).taps] == [
        "stream 0 after 1 additions: out input[0]",  # before it, the block is given the other half
        "readout 0: out output",
    ]


class Tied(Net):
    """The table of tokens is the readout without a module of its own, of a stream that is given to no norm."""

    def __init__(self, adds: bool) -> None:
        super().__init__(adds)
        self.embed = nn.Embedding(50, 8)
        self.out = nn.Sequential(nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = block(h) if block.adds else h + block(h)
        output: Tensor = self.out(h) @ self.embed.weight.T
        return output


@pytest.mark.parametrize(
    ("adds", "site", "expected"),
    [
        (
            True,
            "blocks.1 output",
            ["embed output", "blocks.0 output", "blocks.1.write output", "(module itself) output"],
        ),
        (False, "out.0 output", ["embed output", "blocks.1 input[0]", "out input[0]", "(module itself) output"]),
    ],
)
def test_what_a_multiplier_changes_is_not_read(adds: bool, site: str, expected: list[str]) -> None:
    """The readout's 1/d goes to the first module that returns the last sum; then it is not given to any other."""
    module = Tied(adds)
    plan = Plan.from_model(module, TOKENS)  # in the absolute form: d = 8
    assert [str(m.site) for m in plan.multipliers if m.kind == "readout"] == [site]
    assert [str(tap).partition(": ")[2] for tap in plan.taps] == expected
    attach_multipliers(module, replace(plan, multipliers=plan.multipliers[-1:]))
    assert discover(module, TOKENS).taps == plan.taps


class Biased(Net):
    """The readout's bias is added on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(8, 2, bias=False)
        self.bias = nn.Parameter(torch.randn(2))
        self.flat = nn.Flatten(0)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.flat(super().forward(x) + self.bias)
        return logits


def test_an_output_is_read_with_its_bias() -> None:
    module = Biased()
    structure = discover(module, X[None])
    assert str(structure.taps[-1]) == "readout 0: flat input[0]"
    found = read(module, structure.taps, lambda: module(X[None]))
    expected = Net.forward(module, X[None]) + module.bias
    torch.testing.assert_close(found["readout", 0, 0], expected.detach())


class BasicBlock(nn.Module):
    """The block of image classifiers: one activation for two places, the second on the sum and in place."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        self.downsample = nn.Identity() if inputs == outputs else nn.Sequential(shortcut, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += self.downsample(x)
        result: Tensor = self.relu(out)
        return result


class Images(nn.Module):
    """Two stages of two blocks; the second begins with a strided shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.pool = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.MaxPool2d(2)
        self.layer1 = nn.Sequential(BasicBlock(8, 8, 1), BasicBlock(8, 8, 1))
        self.layer2 = nn.Sequential(BasicBlock(8, 16, 2), BasicBlock(16, 16, 1))
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.pool(F.relu(self.bn(self.conv(x))))
        h = self.layer2(F.avg_pool2d(self.layer1(h), 2))
        output: Tensor = self.fc(h.mean((2, 3)))
        return output


def test_activations_stand_for_sums_that_no_module_is_given_first() -> None:
    torch.manual_seed(0)
    module, x = Images().eval(), torch.randn(8, 3, 16, 16)  # so that channels are as many as samples and pixels
    structure = discover(module, x)
    assert [str(tap).partition(": ")[2] for tap in structure.taps] == [
        "pool output",
        "layer1.0 output",
        "layer1 output",
        "layer2.0 output",
        "layer2 output",
        "fc output",
    ]
    assert [tap.axis for tap in structure.taps] == [1, 1, 1, 1, 1, -1]
    h = streams(read(module, structure.taps, lambda: module(x)))
    assert [value.shape[1] for value in h] == [8, 8, 8, 16, 16]
    with torch.no_grad():
        torch.testing.assert_close(h[1], module.layer1[0](h[0]))
        torch.testing.assert_close(h[2], module.layer1[1](h[1]))
        torch.testing.assert_close(h[3], module.layer2[0](F.avg_pool2d(h[2], 2)))
        torch.testing.assert_close(h[4], module.layer2[1](h[3]))


class Turned(nn.Module):
    """Convolutions whose branches write with a matrix, which makes channels the last axis, and turn it back."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, width, 1), nn.Conv2d(width, 5, 1)
        self.blocks = nn.ModuleList(Block(width, adds=False) for _ in range(2))
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for i, block in enumerate(self.blocks):
            turned = block(h.permute(0, 2, 3, 1))
            h = (turned.permute(0, -1, 1, 2) if i else turned.transpose(-1, 1).transpose(2, 3)) + h
        output: Tensor = self.head(self.pool(h))
        return output


def test_axis_of_the_coordinates_is_followed_through_permutations() -> None:
    module, x = Turned(), torch.randn(8, 3, 8, 8)  # every axis of the stream has 8 entries
    structure = discover(module, x)
    assert [(str(tap).partition(": ")[2], tap.axis) for tap in structure.taps] == [
        ("stem output", 1),
        ("pool input[0]", 1),
        ("head output", 1),
    ], "the second block is given the stream the other way round"


class TimeFirst(nn.Module):
    """An encoder whose first axis is time, of as many steps as there are samples and coordinates."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(3, 16), nn.Linear(16, 2)
        layer = nn.TransformerEncoderLayer(16, 2, 32, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.out(self.encoder(self.embed(x)))
        return output


def test_axis_where_time_comes_first() -> None:
    structure = discover(TimeFirst(), torch.randn(16, 16, 3))
    assert [(str(tap).partition(": ")[2], tap.axis) for tap in structure.taps] == [
        ("embed output", -1),
        ("encoder.layers.0.norm2 input[0]", -1),
        ("encoder output", -1),
        ("out output", -1),
    ]


class FunctionalPostNorm(Net):
    """Norms without modules after the sums, whole or written by hand."""

    def __init__(self, whole: bool) -> None:
        super().__init__(adds=False)
        self.whole = whole
        self.sizes = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = self.norm(h + block(h))
        output: Tensor = self.out(h)
        return output

    def norm(self, h: Tensor) -> Tensor:
        return (
            F.layer_norm(h, (8,))
            if self.whole
            else h * torch.rsqrt(self.sizes(h.square()).mean(-1, keepdim=True) + 1e-5)
        )


class OtherAtTheEnd(Net):
    """What follows the last sum is not what follows the others."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        first, second = self.blocks
        h = torch.relu(h + first(h))
        output: Tensor = self.out(torch.tanh(h + second(h)))
        return output


def test_the_head_does_not_stand_for_the_last_sum() -> None:
    assert [tap.position for tap in discover(OtherAtTheEnd(adds=False), X).taps if tap.reads == "stream"] == [0, 1]


class PostNormWithoutModules(FunctionalPostNorm):
    """Only the squares are given to a module."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            units = torch.tanh(F.linear(h, block.read.weight))
            h = self.norm(h + F.linear(units, block.write.weight))
        output: Tensor = self.out(h)
        return output


def test_parts_of_a_norm_do_not_stand_for_sums() -> None:
    structure = discover(PostNormWithoutModules(whole=False), X)
    assert [(tap.module, tap.position) for tap in structure.taps if tap.reads == "stream"] == [("embed", 0)]


@pytest.mark.parametrize("whole", [True, False])
def test_norms_stand_for_sums_that_no_module_is_given(whole: bool) -> None:
    torch.manual_seed(0)
    module = FunctionalPostNorm(whole)
    structure = discover(module, X)
    expected = ["embed output", "blocks.1 input[0]", "out input[0]", "out output"]
    if not whole:
        expected[2] = "blocks.1 output"  # what follows the last sum has many parts, and is not known to be a norm
    assert [str(tap).partition(": ")[2] for tap in structure.taps] == expected
    h = streams(read(module, structure.taps, lambda: module(X)))
    with torch.no_grad():
        torch.testing.assert_close(h[1], module.norm(h[0] + module.blocks[0](h[0])))


class Translator(nn.Module):
    """An encoder stream and a decoder stream that reads it."""

    def __init__(self, embedding: int = 16) -> None:
        super().__init__()
        self.tokens, self.out = nn.Embedding(50, embedding), nn.Linear(embedding, 9)
        self.encoder = nn.TransformerEncoderLayer(embedding, 2, 32, batch_first=True, norm_first=True)
        self.decoder = nn.TransformerDecoderLayer(embedding, 2, 32, batch_first=True, norm_first=True)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory = self.encoder(self.tokens(source))
        output: Tensor = self.out(self.decoder(tgt=self.tokens(target), memory=memory))
        return output


def test_encoder_and_decoder() -> None:
    torch.manual_seed(0)
    module, source, target = Translator().eval(), TOKENS, TOKENS.flip(1)
    structure = discover(module, (source, target))
    assert [str(tap) for tap in structure.taps] == [
        "stream 0 after 0 additions: decoder input[0]",
        "stream 0 after 1 additions: decoder.norm2 input[0]",
        "stream 0 after 2 additions: decoder.norm3 input[0]",
        "stream 0 after 3 additions: decoder output",
        "stream 1 after 0 additions: encoder input[0]",
        "stream 1 after 1 additions: encoder.norm2 input[0]",
        "stream 1 after 2 additions: encoder output",
        "readout 0: out output",
    ]
    found = read(module, structure.taps, lambda: module(source, target))
    decoder, encoder = streams(found), streams(found, 1)
    with torch.no_grad():
        torch.testing.assert_close(encoder[0], module.tokens(source))
        torch.testing.assert_close(encoder[2], module.encoder(encoder[0]))
        torch.testing.assert_close(decoder[0], module.tokens(target))
        torch.testing.assert_close(decoder[3], module.decoder(decoder[0], encoder[2]))


def test_encoder_and_decoder_of_hugging_face() -> None:
    torch.manual_seed(0)
    numbers = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.1}
    module = transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=50, **numbers)).eval()
    batch = {"input_ids": TOKENS, "labels": TOKENS, "decoder_input_ids": TOKENS.flip(1)}
    structure = discover(module, batch)
    assert [(tap.number, tap.position) for tap in structure.taps if tap.reads == "stream"] == [
        *((0, position) for position in range(7)),
        *((1, position) for position in range(5)),
    ]
    outputs: list[Any] = []
    found = read(module, structure.taps, lambda: outputs.append(module(**batch)))
    decoder, encoder = streams(found), streams(found, 1)
    with torch.no_grad():
        torch.testing.assert_close(encoder[0], module.shared(TOKENS))
        torch.testing.assert_close(module.encoder.final_layer_norm(encoder[4]), outputs[0].encoder_last_hidden_state)
        torch.testing.assert_close(found["readout", 0, 0], outputs[0].logits)
        # a tied readout of T5 is divided by the square root of the dimension
        end = module.lm_head(module.decoder.final_layer_norm(decoder[6]) / 32**0.5)
        torch.testing.assert_close(found["readout", 0, 0], end)
