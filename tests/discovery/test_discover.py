"""Roles, streams and branches in all architectures, and what discovery asks of a module and leaves in it."""

import copy
import random
import threading
from collections import Counter
from dataclasses import replace
from fnmatch import fnmatch
from typing import Any

import numpy as np
import pytest
import torch
from helpers.architectures import ARCHITECTURES, TOKENS, Architecture, Encoder
from helpers.residual_networks import Net, X
from helpers.taps import inputs, logits
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

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


def test_structure_is_the_same_on_meta(architecture: Architecture) -> None:
    expected = discover(architecture.build(DEPTH, HEADS, EMBEDDING), architecture.example)
    with torch.device("meta"):
        module = architecture.build(DEPTH, HEADS, EMBEDDING)
    found = discover(module, architecture.example)
    if architecture is ARCHITECTURES["gemma2"]:  # multiplies embeddings by a buffer, which has no value there
        embedding = found.parameters.pop("model.embed_tokens.weight")
        assert embedding == replace(expected.parameters.pop("model.embed_tokens.weight"), constant=None)
        assert found.warnings and all("on the meta device, where they have no value" in w for w in found.warnings)
        found = replace(found, warnings=())
    assert found == expected


def test_multiplying_at_every_site_is_multiplying_every_branch(architecture: Architecture) -> None:
    """The site's output, times zero, removes the branch: the module then is its stem and head alone."""
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

        def hook(_: nn.Module, args: object, output: Any, index: int | None = site.index) -> object:
            if index is None:
                assert isinstance(output, Tensor)
                return output * 0
            assert isinstance(output, tuple)
            return (*output[:index], output[index] * 0, *output[index + 1 :])

        module.get_submodule(site.module).register_forward_hook(hook)
    if architecture.unfoldable:
        return  # nothing in the weights to compare with
    with torch.no_grad():
        for name in (name for branch in structure.branches for name in branch.folds):
            shallow.get_parameter(name).zero_()
        found, expected = (logits(each, inputs(architecture)) for each in (module, shallow))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


class Watchful(LightningModule):  # touches everything that a trace must leave alone
    def __init__(self) -> None:
        super().__init__()
        self.net = Encoder(2, 2, 16, norm_first=True)
        self.norm = nn.BatchNorm1d(8)
        self.steps, self.history = 0, list[float]()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.steps += 1
        self.history.append(random.random() + float(np.random.rand()))
        self.log("loss", 1.0)
        loss = F.cross_entropy(self.norm(self.net(batch)).flatten(0, 1), batch.flatten())
        self.logger.experiment.add_scalar("loss", 1.0)
        return loss


def test_nothing_is_left_in_the_module_or_in_random_states() -> None:
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


class Manual(LightningModule):  # two optimizers under manual optimization, and control flow that depends on values
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
    roles = discover(module, torch.ones(4, 3)).roles
    assert (roles["net.blocks.1.write.weight"], roles["critic.weight"]) == ("branch_out", "readout")
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_parameters_that_cannot_be_placed_are_named_with_the_override_that_would_settle_it() -> None:
    def forward(net: Net, x: Tensor) -> Any:
        h = net.embed(x)
        return net.out(((h + net.blocks[0](h)).unflatten(-1, (2, 4)) * net.mixing).flatten(-2))

    mixing = nn.Parameter(torch.ones(2, 4))  # none of its axes is the stream's
    module = Net(forward, blocks=nn.ModuleList(Net().blocks[:1]), unused=nn.Parameter(torch.ones(5)), mixing=mixing)
    structure = discover(module, X)
    assert set(structure.unassigned) == {"mixing"} and structure.roles["unused"] == "frozen"
    with pytest.raises(ValueError) as error:
        Plan.from_model(module, X)
    message = str(error.value)
    assert "1 of the parameters of Net could not be placed" in message
    assert 'overrides={"mixing": "stream_norm"}' in message
    plan = Plan.from_model(module, X, overrides={"unused": "stream_norm", "mixing": "stream_norm"})
    assert plan.roles["mixing"] == "stream_norm"


SEQUENTIAL = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
LOCKED = ResNet(1, 8, 4, inputs=3, outputs=2)
LOCKED.lock = threading.Lock()


@pytest.mark.parametrize(
    ("module", "example", "message"),
    [
        (SEQUENTIAL, torch.ones(1, 3), "Sequential has no residual branches.*check that the example runs"),
        (LOCKED, None, r"ResNet cannot be copied \(cannot pickle .*Plan it before it holds open files"),
        (Encoder(1, 2, 16, True), None, "To plan Encoder one forward pass.*Give example=.*example_input_array"),
    ],
)
def test_what_cannot_be_discovered(module: nn.Module, example: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        discover(module, example)


def test_strided_shortcuts_without_a_matrix() -> None:
    def block(stride: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(4, 6, 3, stride, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1))

    def forward(net: Net, x: Tensor) -> Any:
        h = F.relu(net.embed(x))
        h = F.relu(h + net.first(h))
        h = F.relu(net.second(h) + F.avg_pool2d(h, 2))
        return net.out(F.gelu(h + net.third(h), approximate="tanh").mean((2, 3)))

    parts = {"first": block(1), "second": block(2), "third": block(1), "blocks": nn.Identity(), "out": nn.Linear(4, 5)}
    structure = discover(Net(forward, embed=nn.Conv2d(3, 4, 3, padding=1), **parts), torch.ones(2, 3, 8, 8))
    assert not structure.unassigned and not structure.warnings
    found = [(branch.name, str(branch.site)) for branch in structure.branches]
    assert found == [(name, f"{name} output") for name in ("first", "second", "third")]
    assert structure.roles["second.0.weight"] == "branch_in" and structure.roles["second.3.weight"] == "branch_out"
