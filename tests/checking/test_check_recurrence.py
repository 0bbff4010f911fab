"""Recurrent branches move alike along depth, units and embedding: the check passes for their plan, and fails without one."""

from __future__ import annotations

import pytest
from helpers.recurrences import RECURRENCES, Model, batches

from mlu_lightning import Shape, check


@pytest.mark.slow
@pytest.mark.parametrize("kind", RECURRENCES)
def test_recurrences_pass_the_check(kind: str) -> None:
    shape = Shape(depth=2, hidden=RECURRENCES[kind][1], embedding=16)
    build = lambda depth, hidden, embedding: Model(kind, depth, hidden, embedding)  # noqa: E731
    axes = ["depth", "hidden", "embedding"]
    report = check(build, shape, batches(), axes=axes, factors=(1, 2, 4), seeds=3, steps=3)
    assert report.verdict == "pass", f"{report.causes}\n{report}"
    without = check(build, shape, batches(), axes=axes[:1], factors=(1, 2, 4), seeds=2, steps=2, callbacks=lambda _: [])
    assert without.verdict == "fail" and without.causes[0].role.startswith("branch")
