"""Leaving: trained Hugging Face models, baked or exported to Granite, in a process that cannot import this package."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import transformers
from helpers.architectures import ARCHITECTURES, TOKENS, Architecture, Encoder
from helpers.architectures.language import gpt2_with_heads_of
from lightning.pytorch import LightningModule, Trainer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from mlu_lightning import (
    MLUCallback,
    Plan,
    attach_multipliers,
    bake,
    fold,
    restore_multipliers,
    scale_optimizer,
    to_granite,
)
from mlu_lightning.application.multipliers import residual_state
from mlu_lightning.discovery.structure import Site
from mlu_lightning.planning.entries import Multiplier

HUGGING_FACE = {
    name: architecture
    for name, architecture in ARCHITECTURES.items()
    if isinstance(architecture.build(1, 2, 16), transformers.PreTrainedModel)
}
LLAMAS = ["llama", "tied llama"]
BASE, TWICE, THRICE = (1, 2, 16), (2, 4, 32), (3, 6, 48)
# factors are powers of two at twice the base, whose products are exact; at three times the base they are rounded
RUNS: dict[str, tuple[Literal["hook", "fold"], tuple[int, int, int]]] = {
    "hook": ("hook", TWICE),
    "fold": ("fold", TWICE),
    "rounded": ("hook", THRICE),
}
ROUNDED = {"rtol": 0, "atol": 2e-5}  # logits of order one, in float32
# weights that were loaded lie elsewhere in memory, by which torch chooses how to sum in convolutions and over experts
LOADED = {"rtol": 0, "atol": 5e-7}

LOADER = """
import sys
sys.modules["mlu_lightning"] = None  # importing it is an ImportError
import json, pathlib, torch, transformers
torch.set_num_threads(1)
from safetensors.torch import load_file, save_file
for folder in pathlib.Path(sys.argv[1]).iterdir():
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]), (folder, info)
    with torch.no_grad():
        logits = model.eval()(**load_file(folder / "inputs")).logits
    save_file({"logits": logits.contiguous()}, folder / "loaded")
"""


class Lit(LightningModule):
    """A Hugging Face model as an attribute, as most people have it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def predict_step(self, batch: dict[str, Tensor]) -> Tensor:
        output: Tensor = self.model(**batch).logits
        return output

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.02)


def lit(architecture: Architecture, shape: tuple[int, int, int]) -> Lit:
    torch.manual_seed(0)
    return Lit(architecture.build(*shape))


def trained(
    architecture: Architecture, mode: Literal["hook", "fold"], shape: tuple[int, int, int]
) -> tuple[Lit, Plan, Trainer]:
    module, callback = lit(architecture, shape), MLUCallback(lit(architecture, BASE), residual=mode, alpha=0.5)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(max_epochs=3, accelerator="cpu", callbacks=[callback], **quiet)
    trainer.fit(module, DataLoader([architecture.example], batch_size=None))
    assert callback.plan is not None
    assert {m.kind for m in callback.plan.multipliers} == {"branch", "readout"}
    return module, callback.plan, trainer


@torch.no_grad()
def logits(module: Any, architecture: Architecture) -> Tensor:
    output: Tensor = (module.model if isinstance(module, Lit) else module).eval()(**architecture.example).logits
    return output


def hooks(module: nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


def leave(folder: Path, model: Any, architecture: Architecture, expected: Tensor) -> None:
    model.save_pretrained(folder)
    save_file({"logits": logits(model, architecture).contiguous()}, folder / "left")
    save_file({key: value.clone() for key, value in architecture.example.items()}, folder / "inputs")
    save_file({"logits": expected.contiguous()}, folder / "expected")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that was trained, left and loaded again."""
    root = tmp_path_factory.mktemp("left")
    for name, architecture in HUGGING_FACE.items():
        for run, (mode, shape) in RUNS.items():
            module, plan, _ = trained(architecture, mode, shape)
            expected = logits(module, architecture)
            if name in LLAMAS:
                exported = to_granite(module, plan)
                assert isinstance(exported, transformers.GraniteForCausalLM)
                leave(root / f"{name}, {run}, granite", exported, architecture, expected)
            for _ in range(2):  # of which the second changes nothing
                assert bake(module, plan) is module
            assert hooks(module) == hooks(architecture.build(*shape))
            leave(root / f"{name}, {run}, baked", module.model, architecture, expected)
    loaded = subprocess.run([sys.executable, "-c", LOADER, root], capture_output=True, text=True, check=False)
    assert loaded.returncode == 0, loaded.stderr
    return root


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(
    ("name", "form"), [(name, "baked") for name in HUGGING_FACE] + [(name, "granite") for name in LLAMAS]
)
def test_loaded_without_the_package(folders: Path, name: str, form: str, run: str) -> None:
    folder = folders / f"{name}, {run}, {form}"
    expected, left, loaded = (load_file(folder / file)["logits"] for file in ("expected", "left", "loaded"))
    assert expected.std() > 0.01  # and not zero everywhere
    # one plus a gain that is stored minus one is rounded
    exact = run != "rounded" and not HUGGING_FACE[name].unfoldable
    torch.testing.assert_close(left, expected, **({"rtol": 0, "atol": 0} if exact else ROUNDED))
    torch.testing.assert_close(loaded, left, **LOADED)


@pytest.mark.parametrize("name", LLAMAS)
def test_granite_keeps_weights_and_has_multipliers(folders: Path, name: str) -> None:
    module, plan, _ = trained(ARCHITECTURES[name], *RUNS["hook"])
    exported = to_granite(module, plan)
    for key, value in module.model.state_dict().items():
        assert torch.equal(exported.state_dict()[key], value)
        assert exported.state_dict()[key].data_ptr() != value.data_ptr()
    tied = name == "tied llama"
    assert (exported.lm_head.weight is exported.model.embed_tokens.weight) == tied
    config = json.loads((folders / f"{name}, hook, granite" / "config.json").read_text())
    numbers = {"residual_multiplier": 0.25, "embedding_multiplier": 1.0, "logits_scaling": 2.0}
    assert {key: config[key] for key in numbers} == numbers
    assert config["attention_multiplier"] == pytest.approx(8**-0.5, rel=1e-15)
    assert config["tie_word_embeddings"] is tied
    # what a run with folded weights leaves to multiply is a tied readout only
    config = json.loads((folders / f"{name}, fold, granite" / "config.json").read_text())
    assert (config["residual_multiplier"], config["logits_scaling"]) == (1.0, 2.0 if tied else 1.0)


@pytest.mark.parametrize("mode", ["hook", "fold"])
def test_from_a_checkpoint(tmp_path: Path, mode: Literal["hook", "fold"]) -> None:
    architecture = ARCHITECTURES["tied llama"]
    module, plan, trainer = trained(architecture, mode, TWICE)
    expected = logits(module, architecture)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    again = Lit.load_from_checkpoint(tmp_path / "last.ckpt", model=architecture.build(*TWICE))
    assert not torch.allclose(logits(again, architecture), expected, rtol=0.1)
    with pytest.raises(ValueError, match=r"does not have the plan's multipliers, .*restore_multipliers\(module, check"):
        bake(again, plan)
    restored = restore_multipliers(again, torch.load(tmp_path / "last.ckpt", weights_only=True))
    assert restored == plan
    assert torch.equal(logits(again, architecture), expected)
    assert torch.equal(logits(to_granite(again, plan), architecture), expected)
    assert torch.equal(logits(bake(again, plan), architecture), expected)


@pytest.mark.parametrize("mode", ["hook", "fold"])
def test_from_a_checkpoint_of_a_baked_module(tmp_path: Path, mode: Literal["hook", "fold"]) -> None:
    """An untied readout has its multiplier in its own weight; nothing is multiplied again, or silently tied."""
    architecture, path = ARCHITECTURES["tied llama"], tmp_path / "baked.ckpt"
    module, plan, trainer = trained(architecture, mode, TWICE)
    trainer.save_checkpoint(tmp_path / "before.ckpt")
    expected = logits(bake(module, plan), architecture)
    trainer.save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=True)
    plain, again = (Lit(transformers.LlamaForCausalLM(module.model.config)) for _ in range(2))
    plain.load_state_dict(checkpoint["state_dict"])
    assert torch.equal(logits(plain, architecture), expected)
    assert restore_multipliers(plain, checkpoint) == plan
    assert torch.equal(logits(bake(plain, plan), architecture), expected)
    evaluating = Trainer(accelerator="cpu", barebones=True, callbacks=[MLUCallback()])
    data = DataLoader([architecture.example], batch_size=None)
    for _ in range(2):
        evaluating.predict(again, data, ckpt_path=path)
        assert torch.equal(logits(again, architecture), expected)
    hooked = lit(architecture, TWICE)
    attach_multipliers(hooked, plan)
    with pytest.raises(ValueError, match="baked module, a plain one, and this one has multipliers in hooks already"):
        restore_multipliers(hooked, checkpoint)
    with pytest.raises(ValueError, match=r"baked into its weights, and this one has them in hooks.* saved before bake"):
        evaluating.predict(hooked, data, ckpt_path=path)
    with pytest.raises(
        ValueError, match=rf"in {'hooks' if mode == 'hook' else 'its weights'}, and this one .* baked into"
    ):
        evaluating.predict(module, data, ckpt_path=tmp_path / "before.ckpt")
    tied = Lit.load_from_checkpoint(path, model=architecture.build(*TWICE))
    with pytest.raises(ValueError, match=r"model\.lm_head\.weight are different weights.*tie_word_embeddings=False"):
        restore_multipliers(tied, checkpoint)


SAID = "the multiplier of the readout 'model.model.embed_tokens.weight'"


def test_hooks_that_folding_leaves_are_warned_about() -> None:
    tied, untied = ARCHITECTURES["tied llama"], ARCHITECTURES["llama"]
    with pytest.warns(UserWarning, match=rf"Folding leaves {SAID} in hooks.* another function.*bake\(module, callback"):
        trained(tied, "fold", TWICE)
    with pytest.warns(
        UserWarning, match="Folding leaves the multipliers of the branch .*, the branch .* and 2 more in"
    ):
        trained(ARCHITECTURES["gemma2"], "fold", TWICE)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Folding leaves")
        trained(untied, "fold", TWICE)
        trained(tied, "hook", TWICE)
        trained(tied, "fold", BASE)


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        (
            "hook",
            rf"It would be another one with residual=\"fold\", too, because {SAID} can only be in hooks.*without MLUC",
        ),
        ("fold", rf"but the module is another function than they were trained as, because {SAID} can only be in hooks"),
    ],
)
def test_plain_checkpoint_in_a_run_in_which_folding_leaves_hooks(
    mode: Literal["hook", "fold"], message: str, tmp_path: Path
) -> None:
    architecture, data = ARCHITECTURES["tied llama"], DataLoader([ARCHITECTURES["tied llama"].example], batch_size=None)
    settings: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    trainer = Trainer(max_epochs=1, **settings)
    trainer.fit(lit(architecture, TWICE), data)
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    callback = MLUCallback(lit(architecture, BASE), residual=mode)
    with pytest.warns(UserWarning, match=message):
        Trainer(max_epochs=1, callbacks=[callback], **settings).fit(
            lit(architecture, TWICE), data, ckpt_path=tmp_path / "plain.ckpt"
        )


def test_a_baked_module_is_not_initialized_again() -> None:
    architecture = ARCHITECTURES["llama"]
    module, plan, trainer = trained(architecture, "hook", TWICE)
    state = copy.deepcopy(bake(module, plan).state_dict())
    with pytest.raises(ValueError, match="has its multipliers in its weights already"):
        trainer.fit(module, DataLoader([architecture.example], batch_size=None))
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


def test_a_baked_module_has_no_learning_rates() -> None:
    architecture = ARCHITECTURES["gemma2"]
    module, plan, _ = trained(architecture, "hook", TWICE)
    bake(module, plan)
    optimizer = torch.optim.AdamW(module.parameters())
    with pytest.raises(ValueError, match=r"was baked.* Go on with a checkpoint that was saved before bake"):
        scale_optimizer(optimizer, module, plan)


def test_a_checkpoint_without_a_plan() -> None:
    with pytest.raises(ValueError, match=r"no plan, because .* multipliers of MLUCallback.*multiplied=True"):
        restore_multipliers(nn.Linear(1, 1), {"callbacks": {"ModelCheckpoint": {}}})


# --- fold and bake of modules with hooks


def multiplied(
    build: Callable[..., nn.Module], example: Any, *shapes: Any, double: bool = True, alpha: float = 1.5
) -> tuple[nn.Module, Plan]:
    torch.manual_seed(0)
    base, module = (build(*shape) for shape in shapes)
    module = module.double() if double else module
    plan = Plan.from_model(module, example, base=base, alpha=alpha)
    attach_multipliers(module, plan)
    return module.eval(), plan


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_fold_moves_hooks_into_the_weights(name: str) -> None:
    architecture = ARCHITECTURES[name]
    torch.manual_seed(0)
    fresh, base = architecture.build(*THRICE), architecture.build(*BASE)
    plan = Plan.from_model(fresh, architecture.example, base=base, alpha=1.5)
    if any(m.site is None for m in plan.multipliers):
        pytest.skip("not every multiplier can be a hook")
    hooked = copy.deepcopy(fresh)
    handle = attach_multipliers(hooked, plan)
    hooked = copy.deepcopy(hooked)  # the hooks of copies are found as well
    assert fold(hooked, plan) is hooked
    fold(fresh, plan)
    assert hooks(hooked) == hooks(fresh)
    assert residual_state(hooked) == residual_state(fresh)
    assert all(torch.equal(value, fresh.state_dict()[key]) for key, value in hooked.state_dict().items())
    handle.remove()


def test_a_handle_does_nothing_after_its_hooks_were_folded() -> None:
    architecture = ARCHITECTURES["tied llama"]
    module = architecture.build(*TWICE)
    plan = Plan.from_model(module, architecture.example, base=architecture.build(*BASE))
    handle = attach_multipliers(module, plan)
    fold(module, plan)
    state, count = residual_state(module), hooks(module)
    handle.remove()
    assert residual_state(module) == state is not None
    assert hooks(module) == count == 1


def test_baked_in_a_compiled_wrapper() -> None:
    torch.compiler.reset()
    architecture = ARCHITECTURES["causal transformer"]
    module, plan = multiplied(architecture.build, architecture.example, BASE, THRICE)
    compiled = torch.compile(module, backend="eager")
    expected = compiled(TOKENS)
    assert bake(compiled, plan) is compiled
    assert hooks(module) == 0
    torch.testing.assert_close(compiled(TOKENS), expected, rtol=1e-12, atol=1e-13)
    torch.compiler.reset()


def test_untied_readouts_are_written_by_hand() -> None:
    """BERT's bias of the readout is tied too, and the setting unties both; the bias is not multiplied."""
    architecture = ARCHITECTURES["bert"]
    module, plan = multiplied(architecture.build, architecture.example, BASE, THRICE)
    words, predictions = module.bert.embeddings.word_embeddings, module.cls.predictions
    nn.init.normal_(predictions.bias)
    weight, bias = words.weight.detach().clone(), predictions.bias.detach().clone()
    bake(module, plan)
    assert torch.equal(words.weight, weight)
    torch.testing.assert_close(predictions.decoder.weight.detach(), weight / 3, rtol=1e-15, atol=0)
    assert torch.equal(predictions.decoder.bias, bias)
    assert predictions.decoder.bias is not predictions.bias
    assert predictions.decoder.weight.requires_grad
    assert module.config.tie_word_embeddings is False
    module.tie_weights()
    assert predictions.decoder.weight is not words.weight


def _neox(head_dim: int) -> nn.Module:
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.GPTNeoXConfig(vocab_size=50, hidden_size=2 * head_dim, **sizes)
    return transformers.GPTNeoXForCausalLM(config)


QUERIES = range(64)  # of two heads with 32 each, where they come before all keys


@pytest.mark.parametrize(
    ("build", "example", "queries", "rows"),
    [
        (gpt2_with_heads_of, {"input_ids": TOKENS, "labels": TOKENS}, "transformer.h.0.attn.c_attn.weight", QUERIES),
        (
            lambda dim: Encoder(2, 2, 2 * dim, norm_first=True),
            (TOKENS,),
            "encoder.layers.0.self_attn.in_proj_weight",
            QUERIES,
        ),
        (
            _neox,
            {"input_ids": TOKENS, "labels": TOKENS},
            "gpt_neox.layers.0.attention.query_key_value.weight",
            (*range(32), *range(96, 128)),  # before the keys of the same head
        ),
    ],
)
def test_logits_where_head_dim_differs(
    build: Callable[[int], nn.Module], example: Any, queries: str, rows: Sequence[int]
) -> None:
    """The queries of a fused projection are multiplied, in whichever direction it is stored."""
    module, plan = multiplied(build, example, (16,), (32,))
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    before = module.get_parameter(queries).detach().clone()
    arguments = example if isinstance(example, tuple) else (example["input_ids"],)
    output = (lambda: module(*arguments)) if isinstance(example, tuple) else (lambda: module(*arguments).logits)
    expected = output()
    bake(bake(module, plan), plan)
    assert hooks(module) == 0
    torch.testing.assert_close(output(), expected, rtol=1e-10, atol=1e-12)
    ratio = module.get_parameter(queries) / before
    ratio = ratio if "c_attn" in queries else ratio.T
    torch.testing.assert_close(ratio[:, rows], torch.full_like(ratio[:, rows], 0.5**0.5), rtol=1e-14, atol=0)
    assert (ratio[:, [row for row in range(192) if row not in rows]] == 1).all()


def test_logits_go_into_granites_attention_multiplier() -> None:
    def build(head_dim: int) -> nn.Module:
        config = copy.deepcopy(ARCHITECTURES["llama"].build(*TWICE).config)
        config.head_dim, config.rope_parameters = head_dim, {"rope_type": "default", "rope_theta": 100.0}
        model = transformers.LlamaForCausalLM(config)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.5)
        return model

    module, plan = multiplied(build, {"input_ids": TOKENS, "labels": TOKENS}, (8,), (32,), double=False)
    exported = to_granite(module, plan)
    assert exported.config.attention_multiplier == pytest.approx(32**-0.5 * 0.5, rel=1e-15)
    assert exported.config.rope_parameters["rope_theta"] == 100.0
    assert exported.config.residual_multiplier == 1.5
    expected = module(TOKENS).logits
    torch.testing.assert_close(exported(TOKENS).logits, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    torch.testing.assert_close(bake(module, plan)(TOKENS).logits, expected, rtol=1e-5, atol=1e-5)


# --- what cannot leave: each error names what is wrong and what to do, and leaves the module as it was


def assert_refused(
    leave: Callable[[nn.Module, Plan], Any], module: nn.Module, plan: Plan, message: str, error: Any = ValueError
) -> None:
    state, count, mark = copy.deepcopy(module.state_dict()), hooks(module), residual_state(module)
    with pytest.raises(error, match=message):
        leave(module, plan)
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert (hooks(module), residual_state(module)) == (count, mark)


def tied_llama() -> tuple[Any, Plan]:
    architecture = ARCHITECTURES["tied llama"]
    return multiplied(architecture.build, architecture.example, BASE, TWICE, double=False, alpha=1.0)


class Tied(nn.Module):
    """A readout that is tied by the module itself."""

    def __init__(self, depth: int, heads: int, embedding: int) -> None:
        super().__init__()
        self.inner = Encoder(depth, heads, embedding, norm_first=True)
        self.inner.readout.weight = self.inner.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        output: Tensor = self.inner(tokens)
        return output


def test_a_tie_that_no_config_unties() -> None:
    module, plan = multiplied(Tied, (TOKENS,), BASE, TWICE)
    assert_refused(bake, module, plan, r"readout 'inner\.tokens\.weight' is tied .* by 0\.5 in the model's own code")


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
        return F.layer_norm(h, h.shape[-1:]) * torch.exp2(self.gain)


class Normed(nn.Module):
    """Branches that end in a norm."""

    def __init__(self, depth: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)) for _ in range(depth))
        self.norms = nn.ModuleList(norm(8) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.embed(x)
        for block, norm in zip(self.blocks, self.norms, strict=True):
            h = h + norm(block(h))
        return h


@pytest.mark.parametrize("norm", [lambda size: nn.LayerNorm(size, elementwise_affine=False), PowerNorm])
def test_a_branch_that_no_weight_multiplies(norm: Callable[[int], nn.Module]) -> None:
    module, plan = multiplied(Normed, (torch.ones(2, 3),), (1, norm), (2, norm), double=False)
    message = r"branch '.*', at norms\.0 output, cannot be put into weights.*multiply there by 0\.75"
    assert_refused(bake, module, plan, message)


def test_a_gain_minus_one_that_bfloat16_rounds_too_much() -> None:
    architecture = ARCHITECTURES["gemma2"]
    module, plan = multiplied(architecture.build, architecture.example, BASE, THRICE, double=False)
    for name, parameter in module.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, std=0.1)
    assert_refused(
        bake, module.bfloat16(), plan, r"stored minus one, and in bfloat16 .* wrong by up to .*module\.float\("
    )


def test_another_plan_or_none() -> None:
    module, plan = tied_llama()
    for leave in (bake, to_granite):
        assert_refused(
            leave, module, replace(plan, alpha=3.0), "multipliers of another plan. Give the plan that it was"
        )
    assert_refused(
        to_granite, bake(module, plan), plan, r"plan was not made for this LlamaForCausalLM: lm_head\.weight"
    )


def _branch_factor(plan: Plan, name: str) -> Plan:
    changed = tuple(replace(m, value=0.125) if m.name == name else m for m in plan.multipliers)
    return replace(plan, multipliers=changed)


def _with_window(module: Any) -> None:
    module.config.sliding_window = 4


def _with_softcap(module: Any) -> None:
    module.lm_head.register_forward_hook(lambda _, args, output: 0.1 * torch.tanh(output / 0.1))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gpt2", lambda module: None, r"other weights: transformer\.wte\.weight \[50, 32\] is not in Granite; .* and "),
        ("gemma2", lambda module: None, r"other weights: .*pre_feedforward_layernorm\.weight \[32\] is not in Granite"),
        ("tied llama", _with_window, r"the last 4 tokens of up to 2048, .*config\.sliding_window to None"),
        (
            "tied llama",
            _with_softcap,
            r"computes something else .* differ by \d.* of the largest.*bake\(module, plan",
        ),
        ("causal transformer", lambda module: None, r"no Hugging Face model in this CausalTransformer.*bake"),
    ],
)
def test_not_a_granite(name: str, change: Callable[[Any], None], message: str) -> None:
    architecture = ARCHITECTURES[name]
    module, plan = multiplied(architecture.build, architecture.example, BASE, TWICE, double=False)
    change(module)
    modes = [part.training for part in module.train().modules()]
    random = torch.get_rng_state()
    assert_refused(to_granite, module, plan, message)
    assert modes == [part.training for part in module.modules()]
    assert torch.equal(random, torch.get_rng_state())


def test_granite_has_one_multiplier_for_all_branches() -> None:
    architecture = ARCHITECTURES["tied llama"]
    module = architecture.build(*TWICE)
    plan = Plan.from_model(module, architecture.example, base=architecture.build(*BASE))
    plan = _branch_factor(plan, "model.layers.1.mlp")
    attach_multipliers(module, plan)
    assert_refused(to_granite, module, plan, r"branches have different multipliers, 0\.125, 0\.5, and Granite has one")


def test_granite_does_not_hold_what_is_outside_of_the_model() -> None:
    architecture = ARCHITECTURES["tied llama"]
    module = lit(architecture, TWICE)
    module.extra = nn.Identity()
    plan = Plan.from_model(module, architecture.example, base=lit(architecture, BASE))
    plan = replace(plan, multipliers=(*plan.multipliers, Multiplier("extra", "branch", 0.5, Site("extra"), ())))
    attach_multipliers(module, plan)
    assert_refused(to_granite, module, plan, "'extra', which the plan multiplies, is outside of it")


def test_granite_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    module, plan = tied_llama()
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert_refused(to_granite, module, plan, r"pip install 'mlu-lightning\[hf\]'", ImportError)


def test_granite_of_granite_and_of_mistral() -> None:
    numbers = ARCHITECTURES["tied llama"].build(*TWICE).config.to_dict()
    numbers = {key: numbers[key] for key in ("vocab_size", "num_attention_heads", "head_dim", "pad_token_id")}
    numbers |= {"bos_token_id": None, "eos_token_id": None, "num_key_value_heads": 2, "intermediate_size": 64}
    own = {"residual_multiplier": 0.3, "embedding_multiplier": 7.0, "attention_multiplier": 0.2, "logits_scaling": 5.0}

    def granite(depth: int, embedding: int) -> nn.Module:
        config = transformers.GraniteConfig(num_hidden_layers=depth, hidden_size=embedding, **numbers, **own)
        return transformers.GraniteForCausalLM(config)

    def mistral(depth: int, embedding: int) -> nn.Module:
        config = transformers.MistralConfig(
            num_hidden_layers=depth, hidden_size=embedding, sliding_window=None, **numbers
        )
        return transformers.MistralForCausalLM(config)

    for build, residual, scaling in ((granite, 0.3, 5.0), (mistral, 1.0, 1.0)):
        module, plan = multiplied(build, {"input_ids": TOKENS, "labels": TOKENS}, (1, 16), (3, 48), double=False)
        exported = to_granite(module, plan)
        assert exported.config.residual_multiplier == pytest.approx(residual * 0.5, rel=1e-15)
        assert exported.config.logits_scaling == pytest.approx(scaling * 3, rel=1e-15)
        assert exported.config.embedding_multiplier == (7.0 if build is granite else 1.0)
        torch.testing.assert_close(exported(TOKENS).logits, module(TOKENS).logits, rtol=0, atol=1e-6)
