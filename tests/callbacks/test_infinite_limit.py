"""EmbeddingDistance from the infinite model: when it logs, and which runs it refuses."""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.limit_runs import SMALL, Pairs, decayed, measure, resnet, tokens, transformer, with_optimizer
from helpers.watched_runs import SHAPE, Memory, Weights, fit, loader
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from torch import Tensor
from torch.optim import Optimizer

from mlu_lightning import MLUCallback
from mlu_lightning.callbacks import EmbeddingDistance, ReferenceRecorder
from mlu_lightning.callbacks.infinite_limit import Limit
from mlu_lightning.models import ResNet

TINY = Limit(depth=5, units=16, seeds=3)


@pytest.mark.parametrize(("reference", "residual"), [("limit", "hook"), (TINY, "hook"), (TINY, "fold")])
def test_training_is_bit_for_bit_that_without_the_callback(reference: Any, residual: Any, recwarn: Any) -> None:
    runs = []
    for callbacks in ([], [EmbeddingDistance(reference)]):
        seed_everything(3, verbose=False)
        weights, module = Weights(), ResNet(**SHAPE, momentum=0.9)
        trainer = fit(module, MLUCallback(residual=residual), weights, *callbacks, steps=3, validation=loader(seed=1))
        runs.append((weights.at, torch.stack(weights.losses), torch.rand(1), trainer.callback_metrics["train_loss"]))
        # (4 metrics at 5 depths, and the output) and their floors
        assert len(in_trainer(trainer)) == (42 if callbacks else 0)
    plain, watched = runs
    assert len(plain[0]) == 4
    for step, values in plain[0].items():
        assert all(value.equal(watched[0][step][name]) for name, value in values.items())
    assert all(map(torch.equal, plain[1:], watched[1:]))  # type: ignore[arg-type]
    assert not any("self.log" in str(warning.message) for warning in recwarn), "limits have no Trainer to log to"


def in_trainer(trainer: Trainer) -> dict[str, Tensor]:
    return {name: value for name, value in trainer.callback_metrics.items() if "distance" in name}


def saver(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "{step}", every_n_train_steps=6, save_top_k=-1)


def scheduled(configure: Callable[[Any], Optimizer], schedule: Callable[[Optimizer], Any]) -> Callable[[Any], Any]:
    def both(parameters: Any) -> Any:
        optimizer = configure(parameters)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule(optimizer), "interval": "step"}}

    return both


def refused(message: str, limit: Any, *callbacks: Callback, **settings: Any) -> None:
    with pytest.raises(ValueError, match=message):
        measure(limit, *callbacks, **settings)


def test_the_word_stands_for_the_default_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    class BuiltError(Exception): ...

    def build(*arguments: Any) -> Any:
        raise BuiltError(*arguments[2:])

    monkeypatch.setattr("mlu_lightning.callbacks.infinite_limit.infinite_model", build)
    for reference in ("limit", Limit(), Limit(depth=128, units=None, heads=None, sampling="orthogonal")):
        with pytest.raises(BuiltError) as raised:
            measure(reference)
        assert raised.value.args == (128, None, None, "orthogonal", 0)


def test_resumed_run_logs_what_the_uninterrupted_one_does(tmp_path: Path) -> None:
    def optimizer(parameters: Any) -> Optimizer:
        return torch.optim.SGD(parameters, 0.2, momentum=0.9, weight_decay=0.1)

    def go_on(steps: int, *callbacks: Callback, **settings: Any) -> dict[int, dict[str, float]]:
        settings |= {"module": with_optimizer(resnet(), scheduled(optimizer, decayed)), "data": loader(shuffle=False)}
        return measure(replace(SMALL, steps=3), *callbacks, steps=steps, **settings)

    whole, first = go_on(12), go_on(6, saver(tmp_path), enable_checkpointing=True)
    second = go_on(12, ckpt_path=tmp_path / "step=6.ckpt")
    assert list(whole) == [0, 3, 6, 9, 12] and list(second) == [9, 12] and first | second == whole


@pytest.mark.parametrize("how", ["second fit", "checkpoint after the fit"])
def test_run_goes_on_after_its_fit_is_over(how: str, tmp_path: Path) -> None:
    data = loader(shuffle=False)

    def run(epochs: int, **settings: Any) -> tuple[Memory, Trainer]:
        memory, distance = Memory(), EmbeddingDistance(replace(SMALL, steps=3))
        settings |= {"data": data, "logger": memory, "max_epochs": epochs}
        return memory, fit(resnet(), MLUCallback(), distance, steps=-1, **settings)

    whole, _ = run(2)
    memory, trainer = run(1)
    first = memory.distances()
    if how == "second fit":
        trainer.fit_loop.max_epochs = 2
        trainer.fit(trainer.lightning_module, data)
    else:
        trainer.save_checkpoint(tmp_path / "after.ckpt")
        memory, _ = run(2, ckpt_path=tmp_path / "after.ckpt")
    assert list(first) == [0, 3, 6] and first | memory.distances() == whole.distances()


def test_resumed_run_needs_the_limit_that_was_trained(tmp_path: Path) -> None:
    plain, path = tmp_path / "plain", tmp_path / "step=6.ckpt"
    fit(resnet(), MLUCallback(), saver(plain), enable_checkpointing=True)
    with pytest.raises(ValueError, match=r"goes on from step 6, and .*a run with the same EmbeddingDistance, or begin"):
        measure(SMALL, steps=12, ckpt_path=plain / "step=6.ckpt")
    measure(SMALL, saver(tmp_path), enable_checkpointing=True)
    sizes = r"limit of other sizes. Give Limit the depth, units and heads of that run"
    seeds = r"compared with 2 limits, and Limit has seeds=3. Give Limit\(seeds=2\)"
    for changes, message in (({"depth": 7}, sizes), ({"units": 18}, sizes), ({"seeds": 3}, seeds)):
        refused(message, replace(SMALL, **changes), steps=12, ckpt_path=path)
    assert list(measure(replace(SMALL, steps=5), steps=12, ckpt_path=path)) == [10]


def test_floor_is_the_mean_distance_of_the_other_limits_from_the_first() -> None:
    data = loader(shuffle=False)
    one, two, three = (measure(replace(SMALL, seeds=seeds), data=data) for seeds in (1, 2, 3))
    assert not any("floor" in name for values in one.values() for name in values)
    for step, values in one.items():
        assert {name for name in two[step] if "floor" not in name} == set(values)
        assert {name for name in two[step] if "floor" in name} == {f"{name}/floor" for name in values}
        assert set(three[step]) == set(two[step])
        for name, value in values.items():
            assert two[step][name] == three[step][name] == value
        # the embedding is the same for all, outputs of the third are at another distance from the first
        assert two[step]["rms/s=0/floor"] <= 1e-2 and two[step]["output/floor"] > 0
        assert three[step]["output/floor"] != two[step]["output/floor"]


@pytest.mark.parametrize(
    ("steps", "expected"),
    [("log", [0, 1, 2, 4, 7]), (3, [0, 3, 6]), (7, [0, 7]), ([1, 5, 7, 9], [1, 5, 7]), ([2], [2])],
)
def test_steps(steps: Any, expected: list[int]) -> None:
    limit = replace(SMALL, seeds=1, steps=steps, depths=(0.5,))
    logged = measure(limit, steps=7, metrics=["rms", "output"])
    assert list(logged) == expected and all(set(values) == {"rms/s=0.5", "output"} for values in logged.values())
    if steps == "log":  # in a run with accumulation a step is looked at once
        assert list(measure(limit, steps=7, metrics=["rms"], accumulate_grad_batches=3)) == expected


def test_beside_a_callback_with_a_file(tmp_path: Path) -> None:
    path, data = tmp_path / "large.safetensors", loader(shuffle=False)
    torch.manual_seed(5)
    fit(ResNet(**SHAPE | {"hidden": 64}), MLUCallback(), ReferenceRecorder(path), data=data)
    alone = measure(SMALL, metrics=["rms", "output"], data=data)
    file = measure(str(path), metrics=["gram"], data=data)
    both = measure(SMALL, MLUCallback(), EmbeddingDistance(str(path), ["gram"]), metrics=["rms", "output"], data=data)
    assert both == {step: values | file[step] for step, values in alone.items()}
    keys = {EmbeddingDistance(limit).state_key for limit in ("limit", SMALL, replace(SMALL, seeds=1), str(path))}
    assert len(keys) == 2, "the settings of the limit may change when a run is resumed"


def test_callback_can_be_used_for_one_run_after_another() -> None:
    distance, found = EmbeddingDistance(SMALL), []
    for _ in range(2):
        memory = Memory()
        fit(resnet(), MLUCallback(), distance, logger=memory, data=loader(shuffle=False))
        found.append(memory.distances())
    assert list(found[0]) == [0, 1, 2, 4, 6] and found[0] == found[1]


def test_run_that_diverges_logs_nan_and_goes_on() -> None:
    logged = measure(SMALL, module=resnet(lr=1e30))
    assert list(logged) == [0, 1, 2, 4, 6]
    assert math.isnan(logged[6]["rms/s=1"]) and math.isnan(logged[6]["output/floor"])
    assert all(map(math.isfinite, logged[0].values()))


REFUSED: list[tuple[str, Any, str]] = [
    ("depth", 0, r" of a Limit should be 1 or more\."),
    *((name, 0, " of a Limit") for name in ("units", "seeds", "positions")),
    *(("heads", -1, " of a Limit"), ("depths", (0, 1.5), " of a Limit")),
    ("depths", (), " of a Limit should be relative depths between 0 and 1"),
    *(("steps", 0, ' is none of: "log"'), ("steps", "all", " is none of"), ("steps", [1, -1], " is none of")),
]


@pytest.mark.parametrize(("name", "value", "message"), REFUSED)
def test_arguments_of_limits_are_checked(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r}") + message):
        Limit(**{name: value})


def groups(parameters: Any, **first: float) -> Optimizer:
    return torch.optim.SGD([{"params": parameters[:1], **first}, {"params": parameters[1:]}], lr=0.1)


def of_transformer(**changes: Any) -> dict[str, Any]:
    return {"module": transformer(**changes), "data": tokens()}


class Other(ResNet): ...


class Sharded(Callback):  # a DTensor is known by its placements
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        next(pl_module.parameters()).placements = ()  # type: ignore[attr-defined]


class Loads(Callback):
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with torch.no_grad():
            pl_module.get_parameter("embed.weight").mul_(2)


def test_sizes_that_the_limit_cannot_have_are_refused_at_the_start() -> None:
    sizes: dict[str, Any] = {
        r'7 hidden units or heads cannot be "orthogonal"': {"units": 7},
        r"sampling='random' is none of: orthogonal, independent": {"sampling": "random"},
        r"depth=7 of the infinite model is no even number": {"depth": 7},
    }
    for message, of_limit in sizes.items():
        with pytest.raises(ValueError, match=message):
            measure(Limit(**of_limit), **of_transformer())


def test_runs_without_a_limit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"the Trainer has no MLUCallback. Add one, or compare with a run"):
        fit(resnet(), EmbeddingDistance(SMALL))
    settings: dict[str, Any] = {
        r"The run clips gradients \(gradient_clip_val=0.5\), .*Train without, or comp": {"gradient_clip_val": 0.5},
        r"The infinite model of Other is not known": {"module": Other(**SHAPE)},
        r"this run has AdamW: .*Train with SGD": of_transformer(optimizer="adamw"),
        r"norm.weight is a branch_norm, .*norm_gains=False": of_transformer(norm_gains=True),
        "has 2 groups with different ones": {"module": with_optimizer(resnet(), partial(groups, lr=0.2))},
    }
    for message, of_run in settings.items():
        refused(message, SMALL, **of_run)
    base = resnet()
    torch.nn.init.zeros_(base.readout.weight)
    with pytest.raises(ValueError, match=r"readout.weight starts at zero, and the infinite model needs"):
        measure(SMALL, MLUCallback(base), module=resnet(hidden=32))


def test_sharded_parameters_are_refused() -> None:
    refused(r"are sharded \(DTensor\), and .*one device or strategy=\"ddp\", or compare", SMALL, Sharded())


def test_weights_that_were_trained_before_are_refused() -> None:
    """By another fit, however short, by init=None, or by a callback that changes weights in between."""
    mlu, module = MLUCallback(), resnet()
    fit(module, mlu, steps=1)
    assert mlu.initialized
    refused("MLUCallback did not initialize this module in this fit.*Build the module anew", SMALL, mlu, module=module)
    assert not mlu.initialized
    refused(r"it has init=None, or the module was trained before", SMALL, MLUCallback(init=None), module=resnet())
    with pytest.raises(ValueError, match=r"has entries of root mean square .*Begin with weights that were just built"):
        measure(SMALL, MLUCallback(verify=False), Loads(), module=resnet(embedding=64))


def test_groups_that_a_schedule_parts_are_refused() -> None:
    def parted(optimizer: Optimizer) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 1.0, lambda step: 0.5**step])

    assert list(measure(SMALL, module=with_optimizer(resnet(), groups), steps=2)) == [0, 1, 2]
    with pytest.raises(ValueError, match="has 2 groups with different ones"):
        measure(SMALL, module=with_optimizer(resnet(), scheduled(groups, parted)), steps=4)


def test_command_line(tmp_path: Path) -> None:
    def run(*args: str) -> dict[str, Tensor]:
        return in_trainer(LightningCLI(ResNet, Pairs, save_config_callback=None, args=["fit", *args]).trainer)

    silent = ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing")
    trainer: dict[str, Any] = {"accelerator": "cpu", "max_steps": 2, **dict.fromkeys(silent, False)}
    options = [f"--model.{name}={value}" for name, value in SHAPE.items()]
    options += [f"--trainer.{name}={yaml.safe_dump(value).split()[0]}" for name, value in trainer.items()]
    options += [f"--trainer.callbacks+={name}" for name in ("MLUCallback", "EmbeddingDistance")]
    limit, small = (
        run("--seed_everything=1", *options, f"--trainer.callbacks.reference={reference}")
        for reference in ("limit", "{depth: 16, units: 64}")
    )
    arguments = {"reference": {"depth": 16, "units": 64, "depths": [0, 1]}, "metrics": ["rms"]}
    callbacks: list[Any] = [
        {"class_path": "mlu_lightning.MLUCallback"},
        {"class_path": "mlu_lightning.EmbeddingDistance", "init_args": arguments},
    ]
    config = {"seed_everything": 1, "model": dict(SHAPE), "trainer": trainer | {"callbacks": callbacks}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    configured = run("--config", f"{tmp_path}/config.yaml")
    assert len(limit) == len(small) == 42
    assert set(configured) == {f"mlu/distance/rms/s={s}/{end}" for s in (0, 1) for end in ("limit", "floor")}
    for name, value in configured.items():
        assert small[name] == value
        assert name.endswith("s=0/floor") or limit[name] != value
