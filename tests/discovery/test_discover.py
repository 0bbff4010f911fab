from __future__ import annotations

import copy
import random
import threading
from collections import Counter
from fnmatch import fnmatch

import numpy as np
import pytest
import torch
from helpers.architectures import ARCHITECTURES, LANGUAGE, TOKENS, Architecture, Encoder
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel

from mlu_lightning import Plan, discover
from mlu_lightning.models import ResNet
from mlu_lightning.utilities.names import name_pattern

DEPTH, HEADS, EMBEDDING = 3, 4, 32


@pytest.fixture(params=ARCHITECTURES, scope="module")
def architecture(request: pytest.FixtureRequest) -> Architecture:
    return ARCHITECTURES[request.param]


def test_roles_are_those_read_off_the_source(architecture: Architecture) -> None:
    module = architecture.build(DEPTH, HEADS, EMBEDDING)
    structure = discover(module, architecture.example)
    assert not structure.unassigned
    assert list(structure.parameters) == [name for name, _ in module.named_parameters()]
    expected = {}
    for name, _ in module.named_parameters():
        matches = [role for pattern, role in architecture.roles.items() if fnmatch(name, pattern)]
        assert len(matches) == 1, f"the registry has {len(matches)} roles for {name}"
        expected[name] = matches[0]
    assert {name: facts.row for name, facts in structure.parameters.items()} == expected
    for name, facts in structure.parameters.items():
        assert facts.active == next((n for p, n in architecture.active.items() if fnmatch(name, p)), 1), name


def test_streams_branches_and_readout(architecture: Architecture) -> None:
    structure = discover(architecture.build(DEPTH, HEADS, EMBEDDING), architecture.example)
    blocks = [architecture.branches, architecture.encoder] if architecture.encoder else [architecture.branches]
    depths = [DEPTH if architecture.parallel else DEPTH * len(branches) for branches in blocks]
    assert [(stream.depth, stream.embedding) for stream in structure.streams] == [(d, EMBEDDING) for d in depths]
    for number, (branches, depth) in enumerate(zip(blocks, depths, strict=True)):
        along = [branch for branch in structure.branches if branch.stream == number]
        found = Counter((name_pattern(b.name), b.kind, b.hidden, b.head_dim) for b in along)
        assert found == {
            (name, kind, hidden * HEADS, 8 if kind == "attention" else None): DEPTH for name, kind, hidden in branches
        }
        assert sorted({branch.position for branch in along}) == list(range(depth))
        members = {name for branch in along for name in branch.parameters}
        assert {structure.parameters[name].stream for name in members} == {number}
    assert [readout.parameter for readout in structure.readouts] == [architecture.readout]
    assert structure.parameters[architecture.readout].tied == architecture.tied
    assert bool(structure.readouts[0].folds) != architecture.tied
    assert all(bool(branch.folds) != architecture.unfoldable for branch in structure.branches)
    assert len(structure.warnings) == bool(architecture.warns)
    assert all(architecture.warns in warning for warning in structure.warnings)


def test_a_branch_that_ends_in_a_norm_is_multiplied_after_it() -> None:
    structure = discover(ARCHITECTURES["gemma2"].build(1, 2, 16), LANGUAGE)
    assert [str(branch.site) for branch in structure.branches] == [
        "model.layers.0.post_attention_layernorm output",
        "model.layers.0.post_feedforward_layernorm output",
    ]


def test_structure_is_the_same_on_meta(architecture: Architecture) -> None:
    expected = discover(architecture.build(DEPTH, HEADS, EMBEDDING), architecture.example)
    with torch.device("meta"):
        module = architecture.build(DEPTH, HEADS, EMBEDDING)
    assert discover(module, architecture.example) == expected


def test_multiplying_at_every_site_is_multiplying_every_branch(architecture: Architecture) -> None:
    """The site's output, times zero, removes the branch: the module then is its stem and head alone."""
    torch.manual_seed(0)
    module = architecture.build(DEPTH, HEADS, EMBEDDING)
    structure = discover(module, architecture.example)
    module = module.double().eval()
    shallow = copy.deepcopy(module)
    if any(branch.site is None for branch in structure.branches):
        assert architecture is ARCHITECTURES["functional"], "only its branches are no module's output"
        return
    for branch in structure.branches:
        site = branch.site
        assert site is not None and site.where == "output"

        def hook(_: nn.Module, args: object, output: object, index: int | None = site.index) -> object:
            if index is None:
                assert isinstance(output, Tensor)
                return output * 0
            assert isinstance(output, tuple)
            return (*output[:index], output[index] * 0, *output[index + 1 :])

        module.get_submodule(site.module).register_forward_hook(hook)
    if architecture.unfoldable:
        return  # nothing in the weights to compare with
    with torch.no_grad():
        for branch in structure.branches:
            for name in branch.folds:
                shallow.get_parameter(name).zero_()
    torch.testing.assert_close(_output(module, architecture), _output(shallow, architecture), rtol=0, atol=0)


def _output(module: nn.Module, architecture: Architecture) -> Tensor:
    example = architecture.example
    if isinstance(module, LightningModule):
        example = {
            "x" if isinstance(module, ResNet) else "tokens": example[0] if isinstance(example, tuple) else example
        }
        example = {key: value[:, :8] for key, value in example.items()}
    example = (
        {k: v.double() if v.is_floating_point() else v for k, v in example.items()}
        if isinstance(example, dict)
        else tuple(v.double() if v.is_floating_point() else v for v in example)
    )
    with torch.no_grad():
        output = module(**example) if isinstance(example, dict) else module(*example)
    result: Tensor = getattr(output, "logits", output)
    return result


class Watchful(LightningModule):
    """Touches everything that a rehearsal must leave alone."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Encoder(2, 2, 16, norm_first=True)
        self.norm = nn.BatchNorm1d(8)
        self.steps = 0
        self.history: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.steps += 1
        self.history.append(random.random() + float(np.random.rand()))
        self.log("loss", 1.0)
        loss = F.cross_entropy(self.norm(self.net(batch)).flatten(0, 1), batch.flatten())
        self.logger.experiment.add_scalar("loss", 1.0)
        return loss


def test_rehearsal_leaves_no_trace() -> None:
    module = Watchful()
    module.net.encoder.requires_grad_(False)
    before = copy.deepcopy(module.state_dict())
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    structure = discover(module, TOKENS)
    assert not structure.unassigned, "frozen parameters are planned too"
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1]
    assert torch.equal(states[0], after[0]) and states[1] == after[1] and np.array_equal(states[2], after[2])
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())
    assert (module.steps, module.history) == (0, [])
    assert not any(m._forward_hooks for m in module.modules())


class Manual(LightningModule):
    """Two optimizers under manual optimization, and control flow that depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = ResNet(2, 8, 4, inputs=3, outputs=2)
        self.critic = nn.Linear(2, 1)

    def training_step(self, batch: Tensor) -> None:
        first, second = self.optimizers()
        self.toggle_optimizer(first)
        output = self.net(batch)
        if output.mean().item() < 1e9:
            self.manual_backward(output.square().mean())
        first.step()
        self.untoggle_optimizer(first)
        self.manual_backward(self.critic(output).mean())
        second.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(self.net.parameters(), 1.0), torch.optim.SGD(self.critic.parameters(), 1.0)]


def test_manual_optimization_and_values_in_control_flow() -> None:
    module = Manual()
    before = copy.deepcopy(module.state_dict())
    structure = discover(module, torch.ones(4, 3))
    assert structure.roles["net.blocks.1.write.weight"] == "branch_out"
    assert structure.roles["critic.weight"] == "readout"
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


class Odd(nn.Module):
    """A residual network with parameters that cannot be placed."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(3, 8), nn.Linear(8, 2)
        self.read, self.write = nn.Linear(8, 16), nn.Linear(16, 8)
        self.unused = nn.Parameter(torch.ones(5))
        self.mixing = nn.Parameter(torch.ones(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        h = h + self.write(torch.tanh(self.read(h)))
        output: Tensor = self.out(h @ (self.mixing * self.mixing.softmax(-1)))
        return output


def test_parameters_that_cannot_be_placed_are_named_with_the_override_that_would_settle_it() -> None:
    module, example = Odd(), torch.ones(4, 3)
    structure = discover(module, example)
    assert set(structure.unassigned) == {"unused", "mixing"}
    with pytest.raises(ValueError) as error:
        Plan.from_model(module, example)
    message = str(error.value)
    assert "2 of the parameters of Odd could not be placed" in message
    assert "unused [5]: it took no part in the forward pass" in message
    assert 'overrides={"unused": "stream_norm", "mixing": "stream_matrix"}' in message
    plan = Plan.from_model(module, example, overrides={"unused": "stream_norm", "mixing": "stream_matrix"})
    assert plan.roles["mixing"] == "stream_matrix"


def test_no_residual_branches() -> None:
    with pytest.raises(ValueError, match=r"Sequential has no residual branches.*check that the example runs"):
        discover(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), torch.ones(1, 3))


def test_a_module_that_cannot_be_copied() -> None:
    module = ResNet(1, 8, 4, inputs=3, outputs=2)
    module.lock = threading.Lock()
    with pytest.raises(
        ValueError, match=r"ResNet cannot be copied \(cannot pickle .*Plan it before it holds open files"
    ):
        discover(module)


def test_no_example() -> None:
    module = Encoder(1, 2, 16, norm_first=True)
    with pytest.raises(ValueError, match=r"To plan Encoder one forward pass.*Give example=.*example_input_array"):
        discover(module)
    assert discover(ResNet(2, 8, 4, inputs=3, outputs=2)).depth == 2, "example_input_array is an example"


class CrossAttention(nn.Module):
    """An encoder stream and a decoder stream that reads it."""

    def __init__(self, embedding: int = 16) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(9, embedding), nn.Embedding(9, embedding)
        self.model = nn.Transformer(embedding, 2, 2, 3, 32, batch_first=True, norm_first=True)
        self.out = nn.Linear(embedding, 9)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        output: Tensor = self.out(self.model(self.source(source), self.target(target)))
        return output


def test_encoder_and_decoder_are_two_streams() -> None:
    tokens = torch.zeros(2, 4, dtype=torch.long)
    structure = discover(CrossAttention(), (tokens, tokens))
    assert not structure.unassigned
    assert [stream.depth for stream in structure.streams] == [9, 4], "decoder first: it makes the output"
    assert structure.roles["model.encoder.norm.weight"] == "stream_norm"
    assert structure.roles["model.decoder.layers.2.multihead_attn.in_proj_weight"] == "branch_in"
    assert structure.parameters["model.encoder.layers.0.linear1.weight"].stream == 1


class Convolutional(nn.Module):
    """Residual convolutions with batch norm and a depthwise kernel."""

    def __init__(self, channels: int = 8, hidden: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(channels),
                nn.Conv2d(channels, hidden, 1),
                nn.BatchNorm2d(hidden),
                nn.ReLU(),
                nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden),
                nn.ReLU(),
                nn.Conv2d(hidden, channels, 1),
            )
            for _ in range(2)
        )
        self.out = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for block in self.blocks:
            h = h + block(h)
        output: Tensor = self.out(h.mean((2, 3)))
        return output


def test_convolutions() -> None:
    structure = discover(Convolutional(), torch.ones(2, 3, 8, 8))
    assert not structure.unassigned
    assert (structure.depth, structure.embedding) == (2, 8)
    roles = {name.removeprefix("blocks.1."): role.value for name, role in structure.roles.items()}
    expected = {"0.weight": "branch_norm", "1.weight": "branch_in", "2.weight": "branch_in_bias"}
    expected |= {"4.weight": "branch_hidden", "4.bias": "branch_in_bias", "6.weight": "branch_out"}
    assert {name: roles[name] for name in expected} == expected
    assert structure.branches[0].kind == "convolution"
    depthwise = structure.parameters["blocks.0.4.weight"]
    assert (depthwise.fan_in, depthwise.fan_out) == (1, 16)


class SharedBlock(nn.Module):
    """One block that is called at every depth."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(3, 8), nn.Linear(8, 2)
        self.branch = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for _ in range(3):
            h = h + self.branch(h)
        output: Tensor = self.out(h)
        return output


def test_weights_shared_across_depth_are_planned_with_a_warning() -> None:
    structure = discover(SharedBlock(), torch.ones(1, 3))
    assert structure.depth == 3 and structure.roles["branch.2.weight"] == "branch_out"
    assert any("shared across depth" in warning for warning in structure.warnings)
    (branch,) = structure.branches
    assert str(branch.site) == "branch output" and set(branch.folds) == {"branch.2.weight", "branch.2.bias"}


class Twice(LightningModule):
    """Two forward passes in one step, and a look at the trainer."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.net = ResNet(depth, 8, 4, inputs=3, outputs=2)

    def training_step(self, batch: Tensor) -> Tensor:
        first, second = self.net(batch), self.net(batch.flip(0))
        return (first - second).square().mean() * (1 + self.trainer.current_epoch)


def test_two_forward_passes_are_one_network() -> None:
    module = Twice()
    module.trainer = Trainer(barebones=True, accelerator="cpu")
    structure = discover(module, torch.ones(4, 3))
    assert [stream.depth for stream in structure.streams] == [2]
    assert [(str(branch.site), branch.folds) for branch in structure.branches] == [
        (f"net.blocks.{i} output", (f"net.blocks.{i}.write.weight",)) for i in (0, 1)
    ]
    (readout,) = structure.readouts
    assert (str(readout.site), readout.folds) == ("net.readout input", ("net.readout.weight",))
    assert module.trainer is not None


class Blocks(nn.Module):
    """Two residual blocks between an embedding and a readout; subclasses say what a block adds."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Linear(3, 8), nn.Linear(8, 2)
        self.read = nn.ModuleList(nn.Linear(8, 16) for _ in range(2))
        self.write = nn.ModuleList(nn.Linear(16, 8) for _ in range(2))
        self.more = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.norm = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for i in range(2):
            h = self.block(h, i)
        output: Tensor = self.out(h)
        return output

    def block(self, h: Tensor, i: int) -> Tensor:
        return h + self.branch(h, i)

    def branch(self, h: Tensor, i: int) -> Tensor:
        branch: Tensor = self.write[i](torch.tanh(self.read[i](h)))
        return branch


class InTurn(Blocks):
    """Parallel branches that are added one after the other."""

    def block(self, h: Tensor, i: int) -> Tensor:
        return (h + self.branch(h, i)) + torch.tanh(self.more[i](h))


def test_parallel_branches_that_are_added_in_turn_count_once() -> None:
    structure = discover(InTurn(), torch.ones(1, 3))
    assert structure.depth == 2
    assert [branch.position for branch in structure.branches] == [0, 0, 1, 1]


class SharedDropout(Blocks):
    """The only modules that return a whole branch are called for every branch."""

    def branch(self, h: Tensor, i: int) -> Tensor:
        units = torch.tanh(self.read[i](h))
        branch: Tensor = self.drop(F.linear(units, self.write[i].weight, self.write[i].bias))
        return branch


def test_a_module_that_other_branches_call_too_is_no_place_for_a_multiplier() -> None:
    structure = discover(SharedDropout(), torch.ones(1, 3))
    assert len(structure.branches) == 2
    assert [branch.site for branch in structure.branches] == [None, None]
    assert set(structure.branches[0].folds) == {"write.0.weight", "write.0.bias"}


class CalledTwice(Blocks):
    """A block's matrices are used twice in it."""

    def branch(self, h: Tensor, i: int) -> Tensor:
        return super().branch(h, i) + super().branch(-h, i)


def test_a_module_that_is_called_twice_in_one_branch_is_multiplied_in_both() -> None:
    structure = discover(CalledTwice(), torch.ones(1, 3))
    assert structure.depth == 2
    assert [str(branch.site) for branch in structure.branches] == ["write.0 output", "write.1 output"]
    assert set(structure.branches[0].folds) == {"write.0.weight", "write.0.bias"}


class Shifted(Blocks):
    """A constant that no parameter multiplies is added to the branch."""

    def branch(self, h: Tensor, i: int) -> Tensor:
        return super().branch(h, i) + 1.0


def test_a_branch_with_a_constant_cannot_be_folded() -> None:
    structure = discover(Shifted(), torch.ones(1, 3))
    assert [(branch.site, branch.folds) for branch in structure.branches] == [(None, ()), (None, ())]


class NormedBranch(Blocks):
    """A layer norm ends the branch."""

    def branch(self, h: Tensor, i: int) -> Tensor:
        branch: Tensor = self.norm[i](super().branch(h, i))
        return branch


def test_a_norm_that_ends_a_branch_is_what_is_folded() -> None:
    module = NormedBranch()
    torch.nn.init.normal_(module.norm[1].bias)
    (_, branch) = discover(module, torch.ones(1, 3)).branches
    assert str(branch.site) == "norm.1 output"
    assert set(branch.folds) == {"norm.1.weight", "norm.1.bias"}


def test_a_pooler_after_the_stream_is_a_matrix_on_it() -> None:
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50)
    structure = discover(BertModel(config), {"input_ids": TOKENS})
    assert structure.roles["pooler.dense.weight"] == "stream_matrix"
    assert structure.readouts == ()


class Stages(nn.Module):
    """Two stages of residual convolutions; the second begins with a strided shortcut, by a matrix or by pooling."""

    def __init__(self, pool: bool, channels: int = 4, inner: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.first = self._block(channels, inner, channels, 1)
        wide = channels if pool else 2 * channels
        self.second = self._block(channels, inner, wide, 2)
        self.third = self._block(wide, inner, wide, 1)
        matrix = nn.Sequential(nn.Conv2d(channels, wide, 1, stride=2, bias=False), nn.BatchNorm2d(wide))
        self.shortcut = nn.AvgPool2d(2) if pool else matrix
        self.out = nn.Linear(wide, 5)

    @staticmethod
    def _block(inputs: int, inner: int, outputs: int, stride: int) -> nn.Sequential:
        last = nn.Conv2d(inner, outputs, 1)
        return nn.Sequential(nn.Conv2d(inputs, inner, 3, stride, 1), nn.BatchNorm2d(inner), nn.ReLU(), last)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.stem(x))
        h = F.relu(h + self.first(h))
        h = F.relu(self.second(h) + self.shortcut(h))
        h = F.gelu(h + self.third(h), approximate="tanh")
        output: Tensor = self.out(h.mean((2, 3)))
        return output


@pytest.mark.parametrize("pool", [False, True])
def test_strided_shortcuts(pool: bool) -> None:
    structure = discover(Stages(pool), torch.ones(2, 3, 8, 8))
    assert not structure.unassigned and not structure.warnings
    assert structure.depth == 3
    assert [branch.name for branch in structure.branches] == ["first", "second", "third"]
    assert [str(branch.site) for branch in structure.branches] == ["first output", "second output", "third output"]
    assert structure.roles["second.0.weight"] == "branch_in" and structure.roles["second.3.weight"] == "branch_out"
    if not pool:
        assert structure.roles["shortcut.0.weight"] == "stream_matrix"
        assert structure.roles["shortcut.1.weight"] == "stream_norm"


class HeadWithGelu(Blocks):
    """A GELU written by hand after the stream: x + 0.044715 x³ adds what a matrix made to a power of it."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.more[0](self.block(self.embed(x), 0))
        h = 0.5 * h * (1 + torch.tanh(0.79788456 * (h + 0.044715 * h**3)))
        output: Tensor = self.out(h)
        return output


def test_a_gelu_written_by_hand_is_no_residual_addition() -> None:
    structure = discover(HeadWithGelu(), torch.ones(1, 3))
    assert structure.depth == 1 and not structure.warnings
    assert structure.roles["more.0.weight"] == "stream_matrix"
