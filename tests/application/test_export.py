"""Leaving: trained Hugging Face models, baked or exported to Granite, in a process that cannot import this package."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.architectures import ARCHITECTURES, TOKENS, Architecture
from helpers.bare import Bare
from helpers.leaving import BASE, THRICE, TWICE, assert_refused, hooks, logits, multiplied, tied_llama, trained
from helpers.residual_networks import Block, Net, stream
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from mlu_lightning import Plan, bake, scale_optimizer, to_granite

HUGGING_FACE = {n: a for n, a in ARCHITECTURES.items() if isinstance(a.build(1, 2, 16), transformers.PreTrainedModel)}
LLAMAS = ["llama", "tied llama"]
# factors are powers of two at twice the base, whose products are exact; at three times the base they are rounded
RUNS: dict[str, Any] = {"hook": ("hook", TWICE), "fold": ("fold", TWICE), "rounded": ("hook", THRICE)}
# only these are also rounded: gains stored minus one, own constants, and what is exported
RUNS_OF = {
    n: RUNS if n in (*LLAMAS, "gemma2", "t5", "tied t5") else {"hook": RUNS["hook"], "fold": RUNS["fold"]}
    for n in HUGGING_FACE
}
LEFT = [
    (name, form, run)
    for name, form in [*product(HUGGING_FACE, ["baked"]), *product(LLAMAS, ["granite"])]
    for run in RUNS_OF[name]
]
ROUNDED = {"rtol": 0, "atol": 2e-5}  # logits of order one, in float32
# weights that were loaded lie elsewhere in memory, by which torch chooses how to sum in convolutions and over experts
LOADED = {"rtol": 0, "atol": 5e-7}
LOADER = """
import sys
sys.modules["mlu_lightning"] = None  # importing it is an ImportError
import json, pathlib, torch, transformers
from safetensors.torch import load_file, save_file
for folder in pathlib.Path(root).iterdir():
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]), (folder, info)
    with torch.no_grad():
        logits = model.eval()(**load_file(folder / "inputs")).logits
    save_file({"logits": logits.contiguous()}, folder / "loaded")
"""


def leave(folder: Path, model: Any, architecture: Architecture, expected: Tensor) -> None:
    model.save_pretrained(folder)
    inputs = {key: value.clone() for key, value in architecture.example.items()}
    left = {"logits": logits(model, architecture).contiguous()}
    for name, tensors in {"left": left, "inputs": inputs, "expected": {"logits": expected.contiguous()}}.items():
        save_file(tensors, folder / name)


@pytest.fixture(scope="module")
def folders(bare: Bare, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("left")
    for name, architecture in HUGGING_FACE.items():
        plans: dict[Any, Plan] = {}
        for run, (mode, shape) in RUNS_OF[name].items():
            module, plan, _ = trained(architecture, mode, shape, plans.get(shape))
            plans[shape] = plan
            expected = logits(module, architecture)
            if name in LLAMAS:
                exported = to_granite(module, plan)
                assert isinstance(exported, transformers.GraniteForCausalLM)
                leave(root / f"{name}, {run}, granite", exported, architecture, expected)
            for _ in range(2):  # of which the second changes nothing
                assert bake(module, plan) is module
            assert hooks(module) == hooks(architecture.build(*shape))
            leave(root / f"{name}, {run}, baked", module.model, architecture, expected)
    bare.run(LOADER, root=str(root))
    return root


@pytest.mark.parametrize(("name", "form", "run"), LEFT)
def test_loaded_without_the_package(folders: Path, name: str, form: str, run: str) -> None:
    folder = folders / f"{name}, {run}, {form}"
    expected, left, loaded = (load_file(folder / file)["logits"] for file in ("expected", "left", "loaded"))
    assert expected.std() > 0.01  # and not zero everywhere
    # one plus a gain that is stored minus one is rounded, and so is a multiplier beside T5's own D^(-1/2): a root of two
    exact = run != "rounded" and not HUGGING_FACE[name].unfoldable and name != "tied t5"
    torch.testing.assert_close(left, expected, **({"rtol": 0, "atol": 0} if exact else ROUNDED))
    torch.testing.assert_close(loaded, left, **LOADED)


@pytest.mark.parametrize(("name", "where"), [("llama", "in"), ("gemma2", "baked into")])
def test_a_baked_module_is_not_initialized_or_scaled_again(name: str, where: str) -> None:
    architecture = ARCHITECTURES[name]
    module, plan, trainer = trained(architecture, "hook", TWICE)
    state = copy.deepcopy(bake(module, plan).state_dict())
    with pytest.raises(ValueError, match=f"has its multipliers {where} its weights already"):
        trainer.fit(module, DataLoader([architecture.example], batch_size=None))
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    if name == "gemma2":
        with pytest.raises(ValueError, match=r"was baked.* Go on with a checkpoint that was saved before bake"):
            scale_optimizer(torch.optim.AdamW(module.parameters()), module, plan)


@pytest.mark.usefixtures("fresh_compiler")
def test_baked_in_a_compiled_wrapper() -> None:
    architecture = ARCHITECTURES["causal transformer"]
    module, plan = multiplied(architecture.build, architecture.example, BASE, THRICE)
    compiled = torch.compile(module, backend="eager")
    expected = compiled(TOKENS)
    assert bake(compiled, plan) is compiled
    assert hooks(module) == 0
    torch.testing.assert_close(compiled(TOKENS), expected, rtol=1e-12, atol=1e-13)


def test_untied_readouts_are_written_by_hand() -> None:
    """BERT's bias of the readout is tied too, and the setting unties both; the bias is not multiplied."""
    architecture = ARCHITECTURES["bert"]
    module, plan = multiplied(architecture.build, architecture.example, BASE, THRICE, gains=False)
    words, predictions = module.bert.embeddings.word_embeddings, module.cls.predictions
    nn.init.normal_(predictions.bias)
    weight, bias = words.weight.detach().clone(), predictions.bias.detach().clone()
    bake(module, plan)
    decoder = predictions.decoder
    assert torch.equal(words.weight, weight) and torch.equal(decoder.bias, bias)
    torch.testing.assert_close(decoder.weight.detach(), weight / 3, rtol=1e-15, atol=0)
    module.tie_weights()
    assert decoder.bias is not predictions.bias and decoder.weight is not words.weight
    assert decoder.weight.requires_grad and module.config.tie_word_embeddings is False


def tied(shape: tuple[int, int, int], norm: Any = nn.LayerNorm, tie: str = "head", again: bool = False) -> Net:
    """A model that ties its readout by hand, on either side or in its forward, after a norm, which may be read again."""

    def forward(net: Net, tokens: Tensor) -> Any:
        h = net.embed(tokens)
        for block in net.blocks:
            h = h + block(h)
        h = net.norm(h)
        logits = F.linear(h, net.embed.weight) if tie == "forward" else net.head(h)
        return (logits, net.other(h)) if again else logits

    depth, _, width = shape
    blocks = nn.ModuleList(
        nn.Sequential(nn.Linear(width, 4 * width), nn.Tanh(), nn.Linear(4 * width, width)) for _ in range(depth)
    )
    parts = {"embed": nn.Embedding(50, width), "blocks": blocks, "norm": norm(width)}
    parts |= {} if tie == "forward" else {"head": nn.Linear(width, 50, bias=tie == "head")}
    net = Net(forward, **parts, **({"other": nn.Linear(width, 2)} if again else {}))
    if tie == "head":
        net.head.weight = net.embed.weight
    if tie == "embed":
        net.embed.weight = net.head.weight
    return net


@pytest.mark.parametrize(
    ("norm", "tie"),
    [*product([nn.LayerNorm, nn.RMSNorm], ["head", "embed", "forward"]), (lambda size: nn.Linear(size, size), "head")],
)
def test_readouts_that_are_tied_by_hand_stay_tied(norm: Any, tie: str) -> None:
    """So that the function is that of a module built anew, whose code ties them again."""
    module, plan = multiplied(partial(tied, norm=norm, tie=tie), (TOKENS,), (BASE,), (THRICE,))
    expected = module(TOKENS)
    state = bake(module, plan).state_dict()
    (anew := tied(THRICE, norm, tie).double()).load_state_dict(state)
    for each in (module, anew):
        torch.testing.assert_close(each(TOKENS), expected, rtol=1e-12, atol=1e-13)
    assert [*state] == [*anew.state_dict()]


@pytest.mark.parametrize("settings", [{"norm": partial(nn.LayerNorm, elementwise_affine=False)}, {"again": True}])
def test_a_tie_with_no_gain_of_its_own(settings: dict[str, Any]) -> None:
    module, plan = multiplied(partial(tied, **settings), (TOKENS,), (BASE,), (TWICE,))
    assert_refused(bake, module, plan, r"readout 'embed\.weight' is tied .* by 0\.5 in that code, and take")


def test_a_config_that_does_not_keep_the_setting_and_old_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    module, plan = tied_llama()
    forced = classmethod(lambda cls, values: cls(**{**values, "tie_word_embeddings": True}))
    monkeypatch.setattr(type(module.config), "from_dict", forced)
    monkeypatch.setattr(type(module), "tie_weights", lambda self: None)
    assert_refused(bake, module, plan, "LlamaForCausalLM cannot be told by its config .*Use transformers 5 or later")
    monkeypatch.undo()
    monkeypatch.setattr(type(module.config), "from_dict", forced)
    expected = module(TOKENS).logits
    assert torch.equal(bake(module, plan)(TOKENS).logits, expected)
    assert module.config.tie_word_embeddings is True


def test_a_forward_that_depends_on_the_setting_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    module, plan = tied_llama()
    plain = type(module).forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = plain(self, *args, **kwargs)
        output.logits = output.logits * (2.0 if self.config.tie_word_embeddings else 1.0)
        return output

    monkeypatch.setattr(type(module), "forward", forward)
    expected = module(TOKENS).logits
    assert torch.equal(bake(module, plan)(TOKENS).logits, expected)


class PowerNorm(nn.Module):
    """A norm that multiplies by two to the power of its gain: by 1 and 2 at gains of 0 and 1, but not by 1 + gain."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(size))

    def forward(self, h: Tensor) -> Tensor:
        return nn.functional.layer_norm(h, h.shape[-1:]) * torch.exp2(self.gain)


def normed(depth: int, norm: Callable[[int], nn.Module]) -> Net:
    blocks = nn.ModuleList(Block() for _ in range(depth))
    for block in blocks:
        block.norm = norm(8)  # at the end of the branch
    parts = {"blocks": blocks, "out": nn.Identity()}
    return Net(lambda net, x: stream(net, x, lambda net, h, block: h + block.norm(block(h))), **parts)


@pytest.mark.parametrize("norm", [lambda size: nn.LayerNorm(size, elementwise_affine=False), PowerNorm])
def test_a_branch_that_no_weight_multiplies(norm: Callable[[int], nn.Module]) -> None:
    module, plan = multiplied(normed, (torch.ones(2, 3),), (1, norm), (2, norm), double=False)
    message = r"branch '.*', at blocks\.0\.norm output, cannot be put into weights.*multiply there by 0\.75"
    assert_refused(bake, module, plan, message)


def test_a_gain_minus_one_that_bfloat16_rounds_too_much() -> None:
    architecture = ARCHITECTURES["gemma2"]
    module, plan = multiplied(architecture.build, architecture.example, BASE, THRICE, double=False)
    for name, parameter in module.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, std=0.1)
    message = r"stored minus one, and in bfloat16 .* wrong by up to .*module\.float\("
    assert_refused(bake, module.bfloat16(), plan, message)


def test_another_plan_or_none() -> None:
    module, plan = tied_llama()
    for leave in (bake, to_granite):
        other = replace(plan, alpha=3.0)
        assert_refused(leave, module, other, "multipliers of another plan. Give the plan that it was")
    message = r"plan was not made for this LlamaForCausalLM: lm_head\.weight"
    assert_refused(to_granite, bake(module, plan), plan, message)
