"""MLUCallback under Lightning's strategies, in two processes (gloo): the run is that of one process."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, Strategy
from strategies_run import BASE, RUNS, WAYS, WIDE, Net, fit
from test_callback import trainer

from mlu_lightning.callbacks import MLUCallback

SCRIPT = Path(__file__).with_name("strategies_run.py")
DIVIDED = [name for name, way in WAYS.items() if way.processes > 1]
Runs = dict[tuple[str, int], dict[str, Any]]


@pytest.fixture(scope="module")
def single() -> Runs:
    return {run: fit(WAYS["single"], *run) for run in RUNS}


@pytest.fixture(scope="module")
def divided(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Runs]]:
    """The runs of both processes by the name of the strategy; they are started once, as that takes longest."""
    folder = tmp_path_factory.mktemp("divided")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(SCRIPT), str(folder), *DIVIDED]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr
    return {name: [torch.load(folder / f"{name}-{rank}.pt") for rank in range(2)] for name in DIVIDED}


@pytest.mark.parametrize("name", DIVIDED)
def test_run_of_two_processes_is_that_of_one(name: str, single: Runs, divided: dict[str, list[Runs]]) -> None:
    for run, expected in single.items():
        both = [of_process[run] for of_process in divided[name]]
        for found in both:
            # also in the second process, which has drawn another base by itself
            assert found["plan"] == expected["plan"]
            assert found["start"].keys() == expected["start"].keys()
            for parameter, value in expected["start"].items():
                assert torch.equal(found["start"][parameter], value), parameter
            for parameter, value in expected["end"].items():
                # sums over two halves, in float32, for 12 batches
                torch.testing.assert_close(found["end"][parameter], value, rtol=1e-4, atol=1e-5)
        losses = torch.stack([found["losses"] for found in both])
        torch.testing.assert_close(losses.mean(0), expected["losses"], rtol=1e-5, atol=1e-6)
        same_batches = WAYS[name].parts == 1
        assert torch.allclose(losses[0], losses[1]) == same_batches


def test_runs_differ_by_what_they_are_run_with(single: Runs) -> None:
    """Else the comparison above would show nothing."""
    assert len({tuple(run["losses"].tolist()) for (residual, _), run in single.items() if residual == "hook"}) == 2
    hook, fold = single["hook", 1], single["fold", 1]
    torch.testing.assert_close(hook["losses"], fold["losses"], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(hook["start"]["blocks.0.write.weight"], fold["start"]["blocks.0.write.weight"])


# What FSDP1 and DeepSpeed do with parameters


class Uninstalled(DeepSpeedStrategy):
    """DeepSpeed's own strategy needs its package to be constructed, and nothing here gets as far as that."""

    def __init__(self) -> None: ...


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (
            Uninstalled(),
            r"DeepSpeed joins parameters.*learning rates of their own\. Use ModelParallelStrategy \(FSDP2\)",
        ),
        (FSDPStrategy(use_orig_params=False), r"FSDPStrategy\(use_orig_params=False\) joins.*use_orig_params=True"),
    ],
    ids=["deepspeed", "fsdp1-flat"],
)
def test_strategy_that_joins_parameters_is_refused(strategy: Strategy, message: str) -> None:
    callback, module = MLUCallback(Net(**BASE)), Net(**WIDE)
    run = trainer(callback)
    vars(run)["_accelerator_connector"].strategy = strategy  # which Lightning gives to machines with GPUs only
    with pytest.raises(ValueError, match=message):
        callback.setup(run, module, "fit")
    assert callback.plan is None
    assert "configure_optimizers" not in vars(module)
    callback.setup(run, module, "validate")  # which needs no optimizer


def wrapped(module: Net) -> None:
    module.blocks[1]._fsdp_wrapped_module = module.blocks[0]
    module.blocks[0] = module.blocks[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (wrapped, r"wrapped by FSDP already.*build a module anew.*auto_wrap_policy.*ModelParallelStrategy"),
        (lambda module: module.to("meta"), r"on the meta device, and would be flattened.*build a module anew"),
    ],
    ids=["wrapped", "meta"],
)
def test_module_that_fsdp1_leaves_no_values_is_refused(change: Callable[[Net], Any], message: str) -> None:
    callback, module = MLUCallback(Net(**BASE)), Net(**WIDE)
    run = trainer(callback)
    vars(run)["_accelerator_connector"].strategy = FSDPStrategy()
    change(module)
    with pytest.raises(ValueError, match=message):
        callback.setup(run, module, "fit")
