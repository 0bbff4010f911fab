"""EmbeddingDistance from the infinite model: when it logs, and which runs it refuses."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import distributed_run
from helpers.limit_runs import SMALL, Pairs, decayed, measure, resnet, tokens, transformer, with_optimizer
from helpers.watched_runs import (
    SHAPE,
    Memory,
    Weights,
    fit,
    loader,
)
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from torch.optim import Optimizer

from mlu_lightning import MLUCallback
from mlu_lightning.callbacks import EmbeddingDistance, ReferenceRecorder
from mlu_lightning.callbacks.infinite_limit import Limit
from mlu_lightning.models import ResNet


@pytest.mark.parametrize(
    ("reference", "residual"),
    [("limit", "hook"), (Limit(depth=5, units=16, seeds=3), "hook"), (Limit(depth=5, units=16, seeds=3), "fold")],
)
def test_training_is_bit_for_bit_that_without_the_callback(
    reference: Any, residual: Any, recwarn: pytest.WarningsRecorder
) -> None:
    runs = []
    for callbacks in ([], [EmbeddingDistance(reference)]):
        seed_everything(3, verbose=False)
        weights = Weights()
        module = ResNet(**SHAPE, momentum=0.9)
        trainer = fit(module, MLUCallback(residual=residual), weights, *callbacks, steps=3, validation=loader(seed=1))
        runs.append((weights.at, torch.stack(weights.losses), torch.rand(1), trainer.callback_metrics["train_loss"]))
        logged = [name for name in trainer.callback_metrics if name.startswith("mlu/distance")]
        assert len(logged) == (42 if callbacks else 0)  # (4 metrics at 5 depths, and the output) and their floors
    plain, watched = runs
    assert len(plain[0]) == 4
    for step, values in plain[0].items():
        assert all(value.equal(watched[0][step][name]) for name, value in values.items())
    assert all(map(torch.equal, plain[1:], watched[1:]))  # type: ignore[arg-type]
    assert not any("self.log" in str(warning.message) for warning in recwarn), "limits have no Trainer to log to"


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
    def configure(parameters: Any) -> Any:
        optimizer = torch.optim.SGD(parameters, 0.2, momentum=0.9, weight_decay=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decayed(optimizer), "interval": "step"}}

    def go_on(steps: int, *callbacks: Callback, **settings: Any) -> dict[int, dict[str, float]]:
        module = with_optimizer(resnet(), configure)
        limit = Limit(depth=6, units=16, steps=3)
        return measure(limit, *callbacks, module=module, data=loader(shuffle=False), steps=steps, **settings)

    whole = go_on(12)
    checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=6, save_top_k=-1)
    first = go_on(6, checkpoint, enable_checkpointing=True)
    second = go_on(12, ckpt_path=tmp_path / "step=6.ckpt")
    assert list(whole) == [0, 3, 6, 9, 12] and list(second) == [9, 12]
    assert first | second == whole


@pytest.mark.parametrize("how", ["second fit", "checkpoint after the fit"])
def test_run_goes_on_after_its_fit_is_over(how: str, tmp_path: Path) -> None:
    data = loader(shuffle=False)

    def run(epochs: int, **settings: Any) -> tuple[dict[int, dict[str, float]], Trainer]:
        memory = Memory()
        distance = EmbeddingDistance(Limit(depth=6, units=16, steps=3))
        settings = {"data": data, "logger": memory, "max_epochs": epochs, **settings}
        trainer = fit(resnet(), MLUCallback(), distance, steps=-1, **settings)
        return memory.distances(), trainer

    whole, _ = run(2)
    first, trainer = run(1)
    if how == "second fit":
        trainer.fit_loop.max_epochs = 2
        module, logger = trainer.lightning_module, trainer.logger
        assert isinstance(logger, Memory)
        trainer.fit(module, data)
        second = logger.distances()
    else:
        trainer.save_checkpoint(tmp_path / "after.ckpt")
        second, _ = run(2, ckpt_path=tmp_path / "after.ckpt")
    assert list(first) == [0, 3, 6]
    assert first | second == whole


def test_resumed_run_needs_the_limit_that_was_trained(tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=6, save_top_k=-1)
    fit(resnet(), MLUCallback(), checkpoint, enable_checkpointing=True)
    with pytest.raises(ValueError, match=r"goes on from step 6, and .*a run with the same EmbeddingDistance, or begin"):
        measure(SMALL, steps=12, ckpt_path=tmp_path / "step=6.ckpt")
    other = tmp_path / "other"
    checkpoint = ModelCheckpoint(other, "{step}", every_n_train_steps=6, save_top_k=-1)
    measure(SMALL, checkpoint, enable_checkpointing=True)
    for sizes in ({"depth": 7}, {"units": 18}):
        with pytest.raises(
            ValueError, match=r"limit of other sizes. Give Limit the depth, units and heads of that run"
        ):
            measure(replace(SMALL, **sizes), steps=12, ckpt_path=other / "step=6.ckpt")
    with pytest.raises(ValueError, match=r"compared with 2 limits, and Limit has seeds=3. Give Limit\(seeds=2\)"):
        measure(replace(SMALL, seeds=3), steps=12, ckpt_path=other / "step=6.ckpt")
    assert list(measure(replace(SMALL, steps=5), steps=12, ckpt_path=other / "step=6.ckpt")) == [10]


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
    assert list(logged) == expected
    assert all(set(values) == {"rms/s=0.5", "output"} for values in logged.values())
    # in a run with accumulation a step is looked at once
    assert list(measure(limit, steps=7, metrics=["rms"], accumulate_grad_batches=3)) == expected


def test_beside_a_callback_with_a_file(tmp_path: Path) -> None:
    path, data = tmp_path / "large.safetensors", loader(shuffle=False)
    torch.manual_seed(5)
    fit(ResNet(**SHAPE | {"hidden": 64}), MLUCallback(), ReferenceRecorder(path), data=data)
    alone = measure(SMALL, metrics=["rms", "output"], data=data)
    file = measure(str(path), metrics=["gram"], data=data)
    both = measure(
        SMALL,
        MLUCallback(),
        EmbeddingDistance(str(path), ["gram"]),
        metrics=["rms", "output"],
        data=data,
    )
    assert both == {step: values | file[step] for step, values in alone.items()}
    keys = {EmbeddingDistance(limit).state_key for limit in ("limit", SMALL, replace(SMALL, seeds=1), str(path))}
    assert len(keys) == 2, "the settings of the limit may change when a run is resumed"


def test_callback_can_be_used_for_one_run_after_another() -> None:
    distance, found = EmbeddingDistance(SMALL), []
    for _ in range(2):
        memory = Memory()
        fit(resnet(), MLUCallback(), distance, logger=memory, data=loader(shuffle=False))
        found.append(memory.distances())
    assert list(found[0]) == [0, 1, 2, 4, 6]
    assert found[0] == found[1]


def test_logged_values_can_be_monitored(tmp_path: Path) -> None:
    name = "mlu/distance/rms/s=1"
    checkpoint = ModelCheckpoint(tmp_path, monitor=name, every_n_train_steps=2, save_top_k=1)
    logged = measure(SMALL, checkpoint, enable_checkpointing=True)
    best = min(logged[step]["rms/s=1"] for step in (2, 4, 6))
    assert float(checkpoint.best_model_score) == pytest.approx(best, rel=1e-6)  # type: ignore[arg-type]


def test_run_that_diverges_logs_nan_and_goes_on() -> None:
    logged = measure(SMALL, module=resnet(lr=1e30))
    assert list(logged) == [0, 1, 2, 4, 6]
    assert math.isnan(logged[6]["rms/s=1"]) and math.isnan(logged[6]["output/floor"])
    assert all(map(math.isfinite, logged[0].values()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 0}, r"depth=0 of a Limit should be 1 or more\."),
        ({"units": 0}, "units=0 of a Limit"),
        ({"heads": -1}, "heads=-1 of a Limit"),
        ({"seeds": 0}, "seeds=0 of a Limit"),
        ({"positions": 0}, "positions=0 of a Limit"),
        ({"depths": ()}, r"depths=\(\) of a Limit should be relative depths between 0 and 1"),
        ({"depths": (0, 1.5)}, r"depths=\(0, 1.5\) of a Limit"),
        ({"steps": 0}, r'steps=0 is none of: "log"'),
        ({"steps": "all"}, "steps='all' is none of"),
        ({"steps": [1, -1]}, r"steps=\[1, -1\] is none of"),
    ],
)
def test_arguments_of_limits_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Limit(**arguments)


def test_sizes_that_the_limit_cannot_have_are_refused_at_the_start() -> None:
    with pytest.raises(ValueError, match=r'7 hidden units or heads cannot be "orthogonal"'):
        measure(Limit(units=7))
    with pytest.raises(ValueError, match=r"sampling='random' is none of: orthogonal, independent"):
        measure(Limit(sampling="random"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"depth=7 of the infinite model is no even number"):
        measure(Limit(depth=7), module=transformer(), data=tokens())


def test_runs_without_a_limit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"the Trainer has no MLUCallback. Add one, or compare with a run"):
        fit(resnet(), EmbeddingDistance(SMALL))
    with pytest.raises(
        ValueError, match=r"The run clips gradients \(gradient_clip_val=0.5\), .*Train without, or comp"
    ):
        measure(SMALL, gradient_clip_val=0.5)

    class Other(ResNet): ...

    with pytest.raises(ValueError, match=r"The infinite model of Other is not known"):
        measure(SMALL, module=Other(**SHAPE))
    with pytest.raises(ValueError, match=r"this run has AdamW: .*Train with SGD"):
        measure(SMALL, module=transformer(optimizer="adamw"), data=tokens())
    with pytest.raises(ValueError, match=r"norm.weight is a branch_norm, .*norm_gains=False"):
        measure(SMALL, module=transformer(norm_gains=True), data=tokens())

    def two_groups(parameters: Any) -> Optimizer:
        return torch.optim.SGD([{"params": parameters[:1], "lr": 0.2}, {"params": parameters[1:]}], lr=0.1)

    with pytest.raises(ValueError, match="has 2 groups with different ones"):
        measure(SMALL, module=with_optimizer(resnet(), two_groups))
    with pytest.raises(ValueError, match=r"readout.weight starts at zero, and the infinite model needs"):
        base = resnet()
        torch.nn.init.zeros_(base.readout.weight)
        measure(SMALL, MLUCallback(base), module=resnet(hidden=32))


def test_sharded_parameters_are_refused() -> None:
    class Sharded(Callback):
        """A DTensor is known by its placements."""

        def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            next(pl_module.parameters()).placements = ()  # type: ignore[attr-defined]

    with pytest.raises(ValueError, match=r"are sharded \(DTensor\), and .*one device or strategy=\"ddp\", or compare"):
        measure(SMALL, Sharded())


def test_weights_that_were_trained_before_are_refused() -> None:
    """By another fit, however short, by init=None, or by a callback that changes weights in between."""
    mlu, module = MLUCallback(), resnet()
    fit(module, mlu, steps=1)
    assert mlu.initialized
    with pytest.raises(
        ValueError, match=r"MLUCallback did not initialize this module in this fit.*Build the module anew"
    ):
        measure(SMALL, mlu, module=module)
    assert not mlu.initialized
    with pytest.raises(ValueError, match=r"it has init=None, or the module was trained before"):
        measure(SMALL, MLUCallback(init=None), module=resnet())

    class Loads(Callback):
        def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            with torch.no_grad():
                pl_module.get_parameter("embed.weight").mul_(2)

    with pytest.raises(ValueError, match=r"has entries of root mean square .*Begin with weights that were just built"):
        measure(SMALL, Loads(), module=resnet(embedding=64))


def test_groups_that_a_schedule_parts_are_refused() -> None:
    def parted(optimizer: Optimizer) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 1.0, lambda step: 0.5**step])

    def groups(parameters: Any) -> Optimizer:
        return torch.optim.SGD([{"params": parameters[:1]}, {"params": parameters[1:]}], lr=0.1)

    assert list(measure(SMALL, module=with_optimizer(resnet(), groups), steps=2)) == [0, 1, 2]
    module = resnet()

    def configure(parameters: Any) -> Any:
        optimizer = groups(parameters)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": parted(optimizer), "interval": "step"}}

    with pytest.raises(ValueError, match="has 2 groups with different ones"):
        measure(SMALL, module=with_optimizer(module, configure), steps=4)


def test_command_line(tmp_path: Path) -> None:
    model = [f"--model.{name}={value}" for name, value in SHAPE.items()]
    quiet = ["enable_progress_bar=false", "enable_model_summary=false", "enable_checkpointing=false", "max_steps=2"]
    trainer = [f"--trainer.{setting}" for setting in ("accelerator=cpu", "logger=false", *quiet)]
    callbacks = ["--trainer.callbacks+=MLUCallback", "--trainer.callbacks+=EmbeddingDistance"]
    found = {}
    for reference in ("limit", "{depth: 16, units: 64}"):
        args = [
            "fit",
            "--seed_everything=1",
            *model,
            *trainer,
            *callbacks,
            f"--trainer.callbacks.reference={reference}",
        ]
        cli = LightningCLI(ResNet, Pairs, save_config_callback=None, args=args)
        metrics = cli.trainer.callback_metrics
        found[reference] = {name: value for name, value in metrics.items() if "distance" in name}
    seed_everything(1, verbose=False)
    config = {
        "seed_everything": 1,
        "model": dict(SHAPE),
        "trainer": {
            "accelerator": "cpu",
            "logger": False,
            **{key: yaml.safe_load(value) for key, value in (setting.split("=") for setting in quiet)},
            "callbacks": [
                {"class_path": "mlu_lightning.MLUCallback"},
                {
                    "class_path": "mlu_lightning.EmbeddingDistance",
                    "init_args": {"reference": {"depth": 16, "units": 64, "depths": [0, 1]}, "metrics": ["rms"]},
                },
            ],
        },
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    cli = LightningCLI(ResNet, Pairs, save_config_callback=None, args=["fit", "--config", f"{tmp_path}/config.yaml"])
    configured = {name: value for name, value in cli.trainer.callback_metrics.items() if "distance" in name}
    assert len(found["limit"]) == len(found["{depth: 16, units: 64}"]) == 42
    assert set(configured) == {f"mlu/distance/rms/s={s}{end}" for s in (0, 1) for end in ("", "/floor")}
    for name, value in configured.items():
        assert found["{depth: 16, units: 64}"][name] == value
        assert name.endswith("s=0/floor") or found["limit"][name] != value


def test_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    """Gradients of the limits are means over the processes, whose batches are halves of one."""
    result = distributed_run.start("ddp", tmp_path / "two", "limit")
    assert result.returncode == 0, result.stderr
    distributed_run.fit("single", distributed_run.SMALL, tmp_path / "one", EmbeddingDistance(distributed_run.LIMIT))
    expected, found = (distributed_run.distances(tmp_path / name) for name in ("one", "two"))
    assert list(found) == list(expected) == [0, 1, 2, 4, 8, 12]
    for step in expected:
        assert len(found[step]) == 42
        # a mean over two halves of a batch, and over the batch, in float32, for 12 steps
        assert found[step] == pytest.approx(expected[step], rel=1e-3, abs=1e-5)
