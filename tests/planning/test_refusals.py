"""What cannot be planned is refused in plain words, and errors of the user's own code are told from the package's."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.residual_networks import Net, X, in_a_row
from helpers.runs_by_hand import BASE, fit
from helpers.runs_by_hand import Net as Trained
from torch import Tensor, nn

from mlu_lightning import MLUCallback, Plan


class Waves(nn.Module):
    """A block with complex weights."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.write = nn.Linear(8, 8), nn.Linear(8, 8)
        self.modes = nn.Parameter(torch.ones(5, dtype=torch.cfloat))

    def forward(self, stream: Tensor) -> Tensor:
        return self.write(torch.fft.irfft(torch.fft.rfft(self.read(stream)) * self.modes, n=8))


def lazy() -> Net:
    return Net(embed=nn.LazyLinear(8))


def waves() -> Net:
    return Net(blocks=nn.ModuleList(Waves() for _ in range(2)))


def failing(error: Exception) -> Callable[[], Net]:
    def forward(net: Net, x: Tensor) -> Any:
        raise error

    return lambda: Net(forward)


CASES: dict[str, tuple[Any, type[Exception], str]] = {
    "lazy": (
        lazy,
        ValueError,
        r"^Parameters of Net have no shape yet: embed\.weight, embed\.bias\. .*lazy.*base.*setup",
    ),
    "complex": (waves, ValueError, r"^Parameters of Net are complex: blocks\.0\.modes, .*blocks\.\*\.modes.*frozen"),
    "key": (
        failing(KeyError("y")),
        RuntimeError,
        r"^While planning, forward of Net .* KeyError: 'y'\. .*example=.*plan=",
    ),
    "shapes": (
        lambda: Net(lambda net, x: net.embed(net.embed(x))),
        RuntimeError,
        "^While planning, .* raised RuntimeError: mat1",
    ),
    "device": (failing(NotImplementedError("on a CPU")), RuntimeError, "raised NotImplementedError: on a CPU"),
    "attribute": (failing(AttributeError("no scale")), RuntimeError, "raised AttributeError: no scale"),
}


@pytest.mark.parametrize(("make", "error", "message"), CASES.values(), ids=CASES)
def test_what_cannot_be_planned(make: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        Plan.from_model(make(), (X,))


def test_errors_in_a_step_name_it() -> None:
    class Forgetful(Trained):
        def training_step(self, batch: list[Tensor]) -> Tensor:
            return super().training_step(batch) * self.made_later

    with pytest.raises(
        RuntimeError, match=r"training_step of Forgetful was .*AttributeError: .*made_later.*MLUCallback"
    ):
        fit(Forgetful(), MLUCallback(Trained(BASE)))


def test_lazy_bases_that_setup_completes_are_completed() -> None:
    class Warmed(Trained):
        def build(self) -> None:
            super().build()
            self.embed = nn.LazyLinear(self.shape[2], bias=False)

        def setup(self, stage: str) -> None:
            with torch.no_grad():
                self(torch.ones(1, 3))

    mlu = MLUCallback(Warmed(BASE))
    fit(Warmed(), mlu, max_epochs=1, limit_val_batches=0)
    assert mlu.plan is not None and mlu.plan.parameters["embed.weight"].base_shape == (4, 3)


def test_a_network_without_faults_is_planned() -> None:
    assert Plan.from_model(Net(in_a_row), (X,)).branches
