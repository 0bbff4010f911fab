"""A checkpoint is the function that was trained, or an error, whoever loads it and where."""

import argparse
import copy
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import loading
from helpers.bare import Bare
from helpers.loading import OURS, PLAIN, Lit, Net, data, load_all, outputs, trainer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.optim.swa_utils import AveragedModel

from mlu_lightning import MLUCallback, Plan, attach_multipliers, bake, fold, restore_multipliers
from mlu_lightning.application.state_mark import MARK

SAID = f'Unexpected key\\(s\\) in state_dict: "(net\\.|lit\\.)?{MARK}"'
RUNS = {"hook": (False, "hook"), "fold": (False, "fold"), "tied": (True, "fold")}


def fitted(name: str, **settings: Any) -> tuple[Lit, Any, MLUCallback]:
    tied, residual = RUNS[name]
    torch.manual_seed(1)
    callback = MLUCallback(Lit(depth=2, width=4, tied=tied), residual=residual)  # type: ignore[arg-type]  # one of two
    run = trainer(callback, **settings)
    run.fit(module := Lit(tied=tied), data())
    return module, run, callback


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """Checkpoints, and what the modules compute that they are of."""
    folder, found = tmp_path_factory.mktemp("trained"), {}
    for name in RUNS:
        module, run, _ = fitted(name)
        run.save_checkpoint(folder / f"{name}.ckpt")
        torch.save({"state_dict": module.net.state_dict()}, folder / f"{name}.part")
        found[name] = outputs(module)
    return folder, found


def test_it_is_the_trained_function_or_an_error(trained: tuple[Path, dict[str, Tensor]], bare: Bare) -> None:
    """Here, and in a process that at first cannot import the package, and then does."""
    folder, expected = trained
    code = "import helpers.loading, pathlib; helpers.loading.load_without_and_with_the_package(pathlib.Path(folder))"
    bare.run(code, folder=str(folder))
    without, another = torch.load(folder / "found.pt", weights_only=True)
    here = load_all(folder, {**PLAIN, **OURS})
    assert len(without) == len(RUNS) * len(PLAIN)
    assert len(another) == len(here) == len(RUNS) * (len(PLAIN) + len(OURS))
    for found in (without, another, here):
        for (name, way), value in found.items():
            if name == "fold" or way in OURS:
                assert torch.equal(value, expected[name]), (name, way, value)
            else:
                assert isinstance(value, str) and MARK in value and "Unexpected key" in value, (name, way, value)


WAYS_ON: dict[str, Callable[[Any], Any]] = {
    "itself": lambda module: module,
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "averaged": lambda module: AveragedModel(module).module,
    "compiled": lambda module: torch.compile(module, backend="eager"),
    "in another": lambda module: nn.Sequential(nn.Identity(), module),
    "a part": lambda module: module.net,
    "a part of a part": lambda module: module.net.blocks,
    "a block": lambda module: module.net.blocks[0],
}


@pytest.mark.parametrize("way", WAYS_ON)
def test_whatever_is_saved_has_the_mark_once_and_loads_it(way: str) -> None:
    module, _, callback = fitted("hook")
    module.trainer = None  # which cannot be pickled
    made = WAYS_ON[way](module)
    state = made.state_dict()
    marks = [name for name in state if name.endswith(MARK)]
    assert len(marks) == 1
    assert made.load_state_dict(state) == made.load_state_dict(dict(state)) == ([], [])
    averaged = {name: (value + value) / 2 for name, value in state.items()}  # as some do with all values
    assert all(torch.equal(value, state[name]) for name, value in averaged.items())
    assert callback.plan is not None
    if way != "compiled":  # whose prefix torch knows of parameters and buffers alone
        distributed = get_model_state_dict(made)
        assert [name for name in distributed if name.endswith(MARK)] == marks
        set_model_state_dict(made, distributed)
    for part in (module.net.embed, module.net.blocks[0].read):
        assert MARK not in part.state_dict()
    bake(module, callback.plan)
    assert module.state_dict().keys() == Lit().state_dict().keys()
    assert not any(p._state_dict_hooks or p._load_state_dict_pre_hooks or MARK in vars(p) for p in module.modules())


def test_safetensors_and_functional_calls(tmp_path: Path) -> None:
    module = fitted("hook")[0]
    save_file(module.net.state_dict(), tmp_path / "weights.safetensors")
    state = load_file(tmp_path / "weights.safetensors")
    assert MARK in state
    with pytest.raises(RuntimeError, match=SAID):
        Net(6, 12, False).load_state_dict(state)
    called = torch.func.functional_call(module.net, state, (loading.TOKENS,))
    assert torch.equal(called, outputs(module))


def test_multipliers_of_a_part_and_a_handle_that_is_removed() -> None:
    """The key is in what was saved around it, too, and goes with the hooks."""
    base, module = Lit(depth=2, width=4), Lit()
    plan = Plan.from_model(module.net, (loading.TOKENS,), base=base.net)
    handle = attach_multipliers(module.net, plan)
    with pytest.raises(RuntimeError, match=SAID):
        Lit().load_state_dict(module.state_dict())
    handle.remove()
    Lit().load_state_dict(module.state_dict())
    Lit().load_state_dict(fold(module, Plan.from_model(module, loading.TOKENS, base=base)).state_dict())


@pytest.mark.parametrize("part", [lambda module: module, lambda module: module.net, lambda module: module.net.blocks])
def test_loads_that_are_not_strict_are_warned_about(part: Any, recwarn: Any) -> None:
    """Into a plain module they are right, or nothing of this package is there to see them."""
    hooked, folded = part(fitted("hook")[0]), part(fitted("fold")[0])
    recwarn.clear()
    for into, state in ((part(Lit()), folded), (hooked, hooked), (folded, folded)):
        into.load_state_dict(state.state_dict(), strict=False)
    assert not recwarn
    with pytest.warns(UserWarning, match="not marked as those of a module with multipliers in hooks, as this one is"):
        hooked.load_state_dict(folded.state_dict())
    if isinstance(folded, Lit):  # parts that hold their multipliers are plain modules
        with pytest.warns(UserWarning, match=r"of a module with multipliers in hooks, and this one .* in its weights"):
            folded.load_state_dict(fitted("hook")[0].state_dict(), strict=False)


class Renames(Lit):
    """Saves a part of its weights under other names, and loads them itself."""

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        return {f"my.{name}": value for name, value in self.named_parameters()}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        own = dict(self.named_parameters())
        with torch.no_grad():
            for name, value in state_dict.items():
                own[name.removeprefix("my.")].copy_(value)


def test_a_module_that_chooses_what_it_saves(tmp_path: Path) -> None:
    run = trainer(callback := MLUCallback(Lit(depth=2, width=4), residual="hook"))
    run.fit(module := Renames(), data())
    run.save_checkpoint(path := tmp_path / "last.ckpt")
    assert MARK in torch.load(path, weights_only=True)["state_dict"]
    with pytest.raises(KeyError, match=MARK):
        Renames.load_from_checkpoint(path)
    trainer(MLUCallback()).validate(loaded := Renames(), data(), ckpt_path=path, verbose=False)
    restore_multipliers(restored := Renames(), path)
    trainer(callback).fit(resumed := Renames(), data(), ckpt_path=path)
    for each in (loaded, restored, resumed):
        assert torch.equal(outputs(each), outputs(module))


class Tuned(Lit):
    """Saves what it trains alone; the rest is known from elsewhere."""

    def __init__(self, depth: int = 6, width: int = 12, tied: bool = False) -> None:
        super().__init__(depth, width, tied)
        self.strict_loading = False
        for name, parameter in self.named_parameters():
            parameter.requires_grad_("write" not in name)
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if "write" not in name}


@pytest.mark.parametrize("residual", ["hook", "fold"])
def test_frozen_weights_that_are_not_saved_get_their_multipliers(residual: Any, tmp_path: Path) -> None:
    callback = partial(MLUCallback, Tuned(depth=2, width=4), residual=residual, init=None)
    run = trainer(callback())
    run.fit(module := Tuned(), data())
    run.save_checkpoint(path := tmp_path / "last.ckpt")
    with pytest.warns(UserWarning, match=f"Found keys that are not in the model .*{MARK}"):
        loaded = Tuned.load_from_checkpoint(path)
    assert not torch.equal(outputs(loaded), outputs(module))
    restore_multipliers(loaded, path)
    trainer(MLUCallback()).validate(validated := Tuned(), data(), ckpt_path=path, verbose=False)
    trainer(callback()).fit(resumed := Tuned(), data(), ckpt_path=path)
    for each in (loaded, validated, resumed):
        assert torch.equal(outputs(each), outputs(module))


@pytest.mark.parametrize("name", ["hook", "fold", "tied"])
def test_hyperparameters_of_other_classes(name: str, tmp_path: Path) -> None:
    """Torch reads no checkpoint safely that has an object in it; the plan and the weights are read apart from it."""
    module, run, callback = fitted(name)
    module.hparams.update(config=argparse.Namespace(depth=6), path=tmp_path, kind=Lit, sizes=Sizes(a=1))
    run.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "last.ckpt", weights_only=True)
    restored = Lit(tied=RUNS[name][0])
    assert restore_multipliers(restored, tmp_path / "last.ckpt") == callback.plan
    assert torch.equal(outputs(restored), outputs(module))


class Sizes(dict[str, int]):
    """A configuration that is a dict of a class of its own."""

    def __reduce__(self) -> Any:
        return run_code, ("",), None, None, iter(self.items())


def run_code(text: str) -> Sizes:
    raise AssertionError("something in the file was run")


def test_a_mark_that_no_plan_explains_is_refused(tmp_path: Path) -> None:
    run = fitted("hook")[1]
    run.save_checkpoint(path := tmp_path / "last.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["callbacks"]["MLUCallback"]
    torch.save(checkpoint, path)
    with pytest.raises(RuntimeError, match=SAID):
        trainer(MLUCallback()).validate(Lit(), data(), ckpt_path=path, verbose=False)


@pytest.mark.parametrize(("saved", "given"), [("hook", "fold"), ("fold", "hook")])
def test_a_run_that_goes_on_in_the_other_mode_is_refused(saved: str, given: Any, tmp_path: Path) -> None:
    run = fitted(saved)[1]
    run.save_checkpoint(path := tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=f"Give residual='{saved}' to MLUCallback, and a module that was built anew"):
        trainer(MLUCallback(Lit(depth=2, width=4), residual=given)).fit(Lit(), data(), ckpt_path=path)
