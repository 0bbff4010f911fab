"""Others that fail, and fail again when the Trainer tells them: the next fit is that of a module without it."""

from contextlib import suppress
from itertools import product
from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from helpers.faulty_runs import Storable, own_hooks
from helpers.runs_by_hand import BASE, Net
from helpers.trainers import SILENT
from torch import nn
from torch.optim.optimizer import _global_optimizer_pre_hooks

from mlu_lightning.callbacks import MLUCallback

FIRST = """setup configure_model on_fit_start on_train_start on_train_epoch_start on_train_batch_start on_before_backward
on_after_backward on_before_optimizer_step on_before_zero_grad on_train_batch_end on_train_epoch_end on_train_end
teardown""".split()
SECOND = ["on_exception", "teardown"]
CASES = [
    *product(FIRST, SECOND, ("callback", "module", "logger"), (True, False), (lightning.pytorch, pytorch_lightning))
]
SOME = [case for number, case in enumerate(CASES) if number % 14 == 3]


class Fault(Exception): ...


def fail(*args: Any, **kwargs: Any) -> None:
    raise Fault


def module_of(package: Any) -> Any:
    class Kept(package.LightningModule):  # the network of the helpers, in either package, with one optimizer
        forward, training_step, data = Net.forward, Net.training_step, Net.train_dataloader

        def __init__(self) -> None:
            super().__init__()
            self.branch, self.head, self.batch_size, self.shape = 1.0, 1.0, 6, (4, 8, 8)
            Net.build(self)  # type: ignore[arg-type]  # it has what that needs
            self.kept = torch.optim.SGD(self.parameters(), lr=0.1)

        def configure_optimizers(self) -> Any:
            return self.kept

    return Kept()


def fit(package: Any, module: Any, callbacks: list[Any], logger: Any = False) -> None:
    settings = SILENT | {"logger": logger, "max_steps": 2, "num_sanity_val_steps": 0}
    package.Trainer(callbacks=callbacks, log_every_n_steps=1, **settings).fit(module, Storable.train_dataloader(module))


def disturb(package: Any, module: Any, first: str, second: str, who: str, before: bool) -> None:
    """Fit with something that fails in one hook, and a callback that fails as it is told of it."""
    failing = package.Callback()
    setattr(failing, second, fail)
    logger: Any = False
    if who == "callback":
        setattr(failing, first, fail)
    elif who == "module":
        vars(module)[first] = fail
    else:
        logger = package.loggers.CSVLogger("logs")
        method = {"on_train_end": "finalize", "teardown": "finalize", "setup": "log_hyperparams"}.get(
            first, "log_metrics"
        )
        setattr(logger, method, fail)
        module.training_step = lambda batch: module.log("loss", loss := Net.training_step(module, batch)) or loss
    mlu = MLUCallback(Net(BASE), residual="fold")
    with suppress(Fault):  # there are hooks that this fit does not call
        fit(package, module, [failing, mlu] if before else [mlu, failing], logger)
    vars(module).pop(first, None)
    vars(module).pop("training_step", None)


def weights(module: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def check(case: tuple[str, str, str, bool, Any]) -> None:
    *fault, package = case
    module, others = module_of(package), dict(_global_optimizer_pre_hooks)  # those of other tests
    disturb(package, module, *fault)  # type: ignore[arg-type]  # by their places
    # the same weights in a module that nobody has disturbed
    whole = module_of(package)
    if "_mlu_applied" in vars(module):
        fit_none = package.Trainer(callbacks=[MLUCallback(Net(BASE))], max_steps=0, **SILENT)
        fit_none.fit(whole, Storable.train_dataloader(whole))
        whole.load_state_dict(module.state_dict())
    fit(package, module, [MLUCallback(Net(BASE))])
    fit(package, whole, [MLUCallback(Net(BASE))])
    assert all(torch.equal(one, other) for one, other in zip(weights(module), weights(whole), strict=True))
    left = {name for name in vars(module) if name.startswith("_mlu") or name == "configure_optimizers"}
    assert left == {"_mlu_applied"} and "step" not in vars(module.kept) and own_hooks(module) == 0
    assert not module.kept._optimizer_state_dict_pre_hooks and _global_optimizer_pre_hooks.keys() <= others.keys()


@pytest.mark.parametrize("case", SOME, ids=lambda case: "-".join(map(str, case[:4])) + case[4].__name__)
def test_next_fit_takes_away_what_was_left(case: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check(case)


@pytest.mark.slow
def test_next_fit_after_every_fault(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for case in CASES:
        check(case)
    print(f"\n{len(CASES)} faults, each followed by another as the Trainer told of it")
