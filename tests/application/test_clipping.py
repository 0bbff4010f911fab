"""Gradients of folded weights are clipped as those of attached multipliers, whoever clips them."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from helpers.architecture_runs import loader, quiet
from lightning.pytorch.callbacks import ModelPruning
from torch import Tensor, nn, optim
from torch.nn import functional as F

from mlu_lightning import MLUCallback, Plan, attach_multipliers, fold, scale_optimizer, unfolded_gradients
from mlu_lightning.models import ResNet

NORM = 0.5
BASE = {"depth": 1, "hidden": 8, "embedding": 4}
WIDE = {"depth": 3, "hidden": 24, "embedding": 12}  # factors that are not exact


class Net(ResNet):  # in double precision, with its losses
    def __init__(self, **shape: int) -> None:
        super().__init__(**shape, inputs=3, outputs=2)
        torch.manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter)
        self.double()
        self.losses: list[Tensor] = []

    def training_step(self, batch: Any) -> Tensor:
        loss = F.mse_loss(self(batch[0]), batch[1])
        self.losses.append(loss.detach())
        return loss

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class PutsOthers(Net):  # puts other gradients in the place of those that there were, and keeps them: as torch clips
    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        parameters = dict(self.named_parameters())
        norm = nn.utils.get_total_norm(parameter.grad for parameter in parameters.values())
        scaled = {name: p.grad * (NORM / (norm + 1e-6)).clamp(max=1) for name, p in parameters.items()}
        for name, parameter in parameters.items():
            parameter.grad = scaled[name]
        self.kept = scaled, {name: gradient.clone() for name, gradient in scaled.items()}

    def on_train_batch_end(self, *args: Any) -> None:
        torch.testing.assert_close(*self.kept, rtol=0, atol=0)


def clipping(clip: Callable[[Any, Any], object]) -> type[Net]:
    def configure(self: Net, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        clip(self, optimizer)

    return type("Clipping", (Net,), {"configure_gradient_clipping": configure})


ByItself = clipping(lambda module, optimizer: nn.utils.clip_grad_norm_(module.parameters(), NORM))
AsDocumented = clipping(lambda module, optimizer: module.clip_gradients(optimizer, NORM, "norm"))


class Manual(Net):  # under manual optimization
    def __init__(self, **shape: int) -> None:
        super().__init__(**shape)
        self.automatic_optimization = False

    def training_step(self, batch: Any) -> Tensor:
        loss = super().training_step(batch)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(optimizer, gradient_clip_val=NORM, gradient_clip_algorithm="norm")
        optimizer.step()
        return loss


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    draw = [torch.randn(4, size, generator=generator, dtype=torch.float64) for _ in range(4) for size in (3, 2)]
    return list(zip(draw[::2], draw[1::2], strict=True))


def plan(alpha: float = 1.0) -> Plan:
    return Plan.from_model(Net(**WIDE), batches()[0], base=Net(**BASE), alpha=alpha)


def made(put: Callable[[nn.Module, Plan], object]) -> tuple[Net, optim.Optimizer]:
    module = Net(**WIDE)
    put(module, plan())
    optimizer = module.configure_optimizers()
    scale_optimizer(optimizer, module, plan())
    return module, optimizer


def in_a_loop(put: Any, around: Callable[..., Any] = unfolded_gradients, most: float = NORM) -> list[Tensor]:
    """Losses of a loop of one's own, which clips gradients inside of a context."""
    module, optimizer = made(put)
    for batch in batches():
        optimizer.zero_grad()
        module.training_step(batch).backward()
        with around(module, plan()):
            assert nn.utils.clip_grad_norm_(module.parameters(), most) > NORM
        optimizer.step()
    return module.losses


@pytest.fixture(scope="module")
def expected() -> list[Tensor]:
    """With attached multipliers, where clipping is torch's and nothing else."""
    return in_a_loop(attach_multipliers, lambda *_: nullcontext())


def test_loop_with_folded_weights(expected: list[Tensor]) -> None:
    folded = in_a_loop(fold)
    compiled = in_a_loop(fold, lambda net, plan: unfolded_gradients(torch.compile(net, backend="eager"), plan))
    assert in_a_loop(attach_multipliers) == expected and compiled == folded
    torch.testing.assert_close(folded, expected, rtol=1e-12, atol=0)  # rounding of factors
    for losses in (in_a_loop(fold, lambda *_: nullcontext()), in_a_loop(fold, most=math.inf)):
        assert not torch.allclose(torch.stack(losses), torch.stack(expected), rtol=0.01)


@pytest.mark.parametrize("residual", ["hook", "fold"])
@pytest.mark.parametrize("make", [Net, ByItself, PutsOthers, AsDocumented, Manual])
def test_whoever_clips(make: type[Net], residual: Any, expected: list[Tensor]) -> None:
    module = make(**WIDE)
    settings = {"gradient_clip_val": NORM} if make is Net else {}
    trainer = quiet(MLUCallback(plan=plan(), init=None, residual=residual), max_epochs=1, **settings)
    trainer.fit(module, loader(batches()))
    torch.testing.assert_close(module.losses, expected, rtol=1e-12, atol=0)
    assert not {"clip_gradients", "configure_gradient_clipping"} & vars(module).keys()


def test_weights_that_are_pruned_during_the_run() -> None:
    """Pruning gives them other names; with attached multipliers clipping is Lightning's alone."""
    losses = {}
    for residual in ("hook", "fold"):
        module = Net(**WIDE)
        pruning = ModelPruning("l1_unstructured", amount=0.2, use_global_unstructured=False)
        mlu = MLUCallback(plan=plan(), init=None, residual=residual)  # type: ignore[arg-type]  # one of its two
        quiet(mlu, pruning, max_epochs=3, gradient_clip_val=NORM).fit(module, loader(batches()))
        losses[residual] = module.losses
    torch.testing.assert_close(losses["fold"], losses["hook"], rtol=1e-12, atol=0)


@pytest.mark.parametrize("change", ["taken away", "new"])
def test_gradients_that_are_taken_away_or_new(change: str) -> None:
    """The scaled optimizer then gets what the same change makes of them where multipliers are attached."""
    weights = []
    for put in (attach_multipliers, fold):
        module, optimizer = made(put)
        module.training_step(batches()[0]).backward()
        if change == "new":
            module.readout.weight.grad = None
        with unfolded_gradients(module, plan()):
            gradient = torch.ones_like(module.readout.weight)
            module.readout.weight.grad = gradient if change == "new" else None
        optimizer.step()
        weights.append(module(batches()[1][0]))
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-12, atol=0)


def test_a_module_without_the_multipliers_is_refused() -> None:
    module = fold(Net(**WIDE), plan())
    for given, numbers in ((nn.Sequential(module), plan()), (Net(**WIDE), plan()), (module, plan(alpha=2.0))):
        what = rf"not in the {type(given).__name__} that was given to unfolded_gradients. .* of a wrapper, .* what is inside"
        with pytest.raises(ValueError, match=what), unfolded_gradients(given, numbers):
            pass


class Overflows(Net):  # fails while it clips, as clip_grad_norm_ does with error_if_nonfinite
    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        raise OverflowError("not finite")


def test_error_while_clipping_leaves_the_gradients_of_stored_weights() -> None:
    module, plain = Overflows(**WIDE), Net(**WIDE)
    fold(plain, plan())
    plain.training_step(batches()[0]).backward()
    trainer = quiet(MLUCallback(plan=plan(), init=None, residual="fold"), max_epochs=1)
    with pytest.raises(OverflowError, match="not finite"):
        trainer.fit(module, loader(batches()))
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(module.get_parameter(name).grad, parameter.grad, rtol=1e-14, atol=0)
