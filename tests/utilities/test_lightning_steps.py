"""Steps outside of the Trainer's loops: their arguments, and what a muted module leaves undone."""

from typing import Any

from torch import Tensor, nn, optim

from mlu_lightning.models import ResNet
from mlu_lightning.utilities.lightning_steps import call_step, is_lightning_module, mute, muted


class Steps(nn.Module):
    def training_step(self, batch: Any) -> Any:
        return (batch,)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
        return batch, batch_idx, dataloader_idx


def test_steps_have_the_arguments_that_they_take() -> None:
    assert is_lightning_module(Steps())
    assert not is_lightning_module(nn.Linear(1, 1))
    assert call_step(Steps(), "training_step", "batch") == ("batch",)
    assert call_step(Steps(), "validation_step", "batch") == ("batch", 0, 0)


def test_a_muted_module_logs_nothing_and_updates_nothing() -> None:
    model, losses = ResNet(depth=1, hidden=4, embedding=2, inputs=1, outputs=1), list[Tensor]()
    before = model.embed.weight.clone()
    with muted(model):
        model.log("anything", 1.0)
    assert type(model) is ResNet
    mute(model, losses, lambda: [model.configure_optimizers()], lambda: [])
    model.manual_backward(model.embed.weight.sum())
    assert len(losses) == 1
    assert model.optimizers().step(lambda: 3.0) == 3.0
    assert model.optimizers().param_groups[0]["lr"] == 0.1
    assert model.lr_schedulers() is None
    assert model.embed.weight.equal(before)


def test_parts_of_a_step_are_idle_too() -> None:
    """Such as SAM's, of an optimizer, of one inside of it, and through what Lightning's wrapper calls it."""
    model = ResNet(depth=1, hidden=4, embedding=2, inputs=1, outputs=1)
    optimizer = model.configure_optimizers()

    class InTwo(optim.SGD):
        def first_step(self, zero_grad: Any) -> None:
            raise AssertionError

    optimizer.__class__, optimizer.inner = InTwo, optim.SGD(model.parameters())
    mute(model, [], lambda: [optimizer], lambda: [])
    idle = model.optimizers()
    assert idle.first_step(True) is idle.optimizer.first_step(zero_grad=True) is idle.inner.step() is None
    assert idle.first_step(lambda: 3.0) == 3.0
    assert [*idle.state_dict()] == ["state", "param_groups"]
