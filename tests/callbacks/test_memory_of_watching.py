"""What watching callbacks take of memory does not grow with the number of parameters, in one process or in two."""

from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from helpers.processes import exit_code, peak_megabytes
from helpers.ranks import on_two_ranks, rank
from helpers.trainers import pairs, quiet
from torch.utils.data import DataLoader

from mlu_lightning import EmbeddingDistance, FeatureUpdate, ReferenceRecorder
from mlu_lightning.models import ResNet


def fits(folder: Path, devices: int) -> None:
    def watch(hook: Callable[..., Any], *arguments: Any) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = peak_megabytes()
        hook(*arguments)
        taken.append(peak_megabytes() - before)

    for width in (32, 1024):  # the first imports what is imported late; the second has 32 MB of parameters
        taken: list[float] = []
        reference = folder / f"{width}.safetensors"
        for callbacks in ([ReferenceRecorder(reference), FeatureUpdate()], [EmbeddingDistance(reference)]):
            for callback, name in product(callbacks, ("on_train_start", "on_train_batch_end", "on_train_end")):
                setattr(callback, name, partial(watch, getattr(callback, name)))
            trainer = quiet(*callbacks, devices=devices, strategy="ddp" if devices > 1 else "auto", max_steps=2)
            trainer.fit(ResNet(4, width, width, inputs=3, outputs=2), DataLoader(pairs(16), batch_size=4))
    (folder / f"most-{rank()}").write_text(str(max(taken)))


@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_most_that_a_hook_takes(devices: int, tmp_path: Path) -> None:
    on_two_ranks(fits, tmp_path, 2) if devices == 2 else exit_code(fits, tmp_path, 1)
    assert max(float((tmp_path / f"most-{rank}").read_text()) for rank in range(devices)) < 8
