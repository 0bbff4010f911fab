"""MLUCallback under Lightning's strategies, in two processes (gloo): the run is that of one process."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers.faulty_runs import At
from helpers.ranks import on_two_ranks
from helpers.strategies_run import ALL, BASE, INPUTS, RUNS, WAYS, WIDE, Net, fit, loader, run_all
from helpers.trainers import quiet
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins.layer_sync import LayerSync, TorchSyncBatchNorm
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, Strategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mlu_lightning import bake
from mlu_lightning.callbacks import MLUCallback

DIVIDED = [name for name, way in WAYS.items() if way.processes > 1]
Runs = dict[tuple[str, int], dict[str, Any]]


@pytest.fixture(scope="module")
def single() -> Runs:
    return {run: fit(WAYS["single"], *run) for run in ALL}


@pytest.fixture(scope="module", params=["few", pytest.param("all", marks=pytest.mark.slow)])
def divided(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Runs]]:
    """The runs of both processes by the name of the strategy."""
    folder = tmp_path_factory.mktemp("divided")
    on_two_ranks(run_all, folder, RUNS[request.param], DIVIDED)
    return {name: [torch.load(folder / f"{name}-{rank}.pt") for rank in range(2)] for name in DIVIDED}


@pytest.mark.parametrize("name", DIVIDED)
def test_run_of_two_processes_is_that_of_one(name: str, single: Runs, divided: dict[str, list[Runs]]) -> None:
    for run in divided[name][0]:
        expected, both = single[run], [of_process[run] for of_process in divided[name]]
        for found in both:
            # also in the second process, which has drawn another base by itself
            assert found["plan"] == expected["plan"] and found["start"].keys() == expected["start"].keys()
            for parameter, value in expected["start"].items():
                assert torch.equal(found["start"][parameter], value), parameter
            for parameter, value in expected["end"].items():
                # sums over two halves, in float32, for 6 batches
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


class Uninstalled(DeepSpeedStrategy):
    """DeepSpeed's own strategy needs its package to be constructed, and nothing here gets as far as that."""

    def __init__(self) -> None: ...


JOINING = {"deepspeed": Uninstalled(), "flat": FSDPStrategy(use_orig_params=False)}
SAID = {
    "deepspeed": r"DeepSpeed joins parameters.*learning rates of their own\. Use ModelParallelStrategy \(FSDP2\)",
    "flat": r"FSDPStrategy\(use_orig_params=False\) joins.*use_orig_params=True",
    "wrapped": r"wrapped by FSDP already.*build a module anew.*auto_wrap_policy.*ModelParallelStrategy",
    "meta": r"on the meta device, and would be flattened.*build a module anew",
}


def set_up(strategy: Strategy, message: str, change: Callable[[Net], Any]) -> tuple[MLUCallback, Net, Trainer]:
    """With a strategy that Lightning gives to machines with GPUs only, which is refused."""
    callback, module = MLUCallback(Net(**BASE)), Net(**WIDE)
    run = quiet(callback)
    vars(run)["_accelerator_connector"].strategy = strategy
    change(module)
    with pytest.raises(ValueError, match=message):
        callback.setup(run, module, "fit")
    return callback, module, run


@pytest.mark.parametrize("said", JOINING)
def test_strategy_that_joins_parameters_is_refused(said: str) -> None:
    callback, module, run = set_up(JOINING[said], SAID[said], lambda module: None)
    assert callback.plan is None and "configure_optimizers" not in vars(module)
    callback.setup(run, module, "validate")  # which needs no optimizer


def wrapped(module: Net) -> None:
    module.blocks[1]._fsdp_wrapped_module = module.blocks[0]
    module.blocks[0] = module.blocks[1]


@pytest.mark.parametrize(("change", "said"), [(wrapped, "wrapped"), (lambda module: module.to("meta"), "meta")])
def test_module_that_fsdp1_leaves_no_values_is_refused(change: Callable[[Net], Any], said: str) -> None:
    set_up(FSDPStrategy(), SAID[said], change)


class Synced(nn.BatchNorm1d):
    """In the place of torch's SyncBatchNorm, which runs on GPUs only."""


class Exchanges(LayerSync):  # as torch and Lightning do it: every norm becomes a new one, of the same weights
    def __init__(self) -> None:
        self.exchanged: list[str] = []

    def apply(self, model: nn.Module) -> nn.Module:
        return self.to(Synced, model)

    def revert(self, model: nn.Module) -> nn.Module:
        return self.to(nn.BatchNorm1d, model)

    def to(self, kind: type[nn.BatchNorm1d], model: nn.Module) -> nn.Module:
        for part in [*model.modules()]:
            for name, norm in part.named_children():
                if isinstance(norm, nn.BatchNorm1d):
                    new = kind(norm.num_features)
                    new._parameters, new._buffers = norm._parameters, norm._buffers
                    setattr(part, name, new.train(norm.training))
                    self.exchanged.append(kind.__name__)
        return model


class Normed(Net):  # its branches end in norms
    def build(self) -> None:
        super().build()
        depth, _, embedding = self.shape
        self.norms = nn.ModuleList(nn.BatchNorm1d(embedding) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        stream = self.embed(x)
        for block, norm in zip(self.blocks, self.norms, strict=True):
            stream = stream + norm(block(stream))
        return self.readout(stream)


@pytest.fixture
def exchanging(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Trainer]]:
    # both want a GPU, where the sync of one process changes nothing
    monkeypatch.setattr(nn.SyncBatchNorm, "forward", nn.BatchNorm1d.forward)
    monkeypatch.setattr(DistributedDataParallel, "_passing_sync_batchnorm_handle", lambda *_: None)

    def made(sync: LayerSync, *callbacks: Callback) -> Trainer:
        return quiet(*callbacks, max_epochs=2, strategy=DDPStrategy(process_group_backend="gloo"), plugins=[sync])

    yield made
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("residual", ["hook", "fold"])
@pytest.mark.parametrize("sync", [Exchanges, TorchSyncBatchNorm])
def test_norms_that_the_strategy_exchanges_keep_their_multipliers(sync: Any, residual: Any, exchanging: Any) -> None:
    plain, module = (Normed(**WIDE) for _ in range(2))
    x, callback = torch.ones(2, INPUTS), MLUCallback(Normed(**BASE), residual=residual)
    quiet(callback, max_epochs=2).fit(plain, loader())
    assert "norms.0 output" in {str(multiplier.site) for multiplier in callback.plan.multipliers}
    again = MLUCallback(Normed(**BASE), residual=residual)
    run = exchanging(sync(), again)
    for _ in range(2):
        run.fit(module, loader())
        assert module.losses == plain.losses and torch.equal(module.eval()(x), plain.eval()(x))
        assert not any(isinstance(part, (Synced, nn.SyncBatchNorm)) for part in module.modules())
    bake(module, callback.plan)
    torch.testing.assert_close(module(x), plain(x))


class Stopped(Exception): ...


def stop(*_: Any) -> None:
    raise Stopped


def test_norms_that_are_exchanged_back_after_an_error_keep_them(exchanging: Callable[..., Trainer]) -> None:
    plain, module = (Normed(**WIDE) for _ in range(2))
    quiet(MLUCallback(Normed(**BASE)), max_epochs=2, max_steps=3).fit(plain, loader())
    with pytest.raises(Stopped):
        exchanging(Exchanges(), MLUCallback(Normed(**BASE)), At("on_train_batch_start", stop)).fit(module, loader())
    assert [type(norm) for norm in module.norms] == [nn.BatchNorm1d] * len(module.norms)
    x = torch.ones(2, INPUTS)
    assert torch.equal(module.eval()(x), plain.eval()(x))
