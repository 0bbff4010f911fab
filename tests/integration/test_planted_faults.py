"""Faults that lose a std, a multiplier, an lr, an eps or a decay: none of them survives the first step."""

import re
from pathlib import Path

import pytest
from helpers.faults import FAULTS
from helpers.planted_runs import is_right, outcome, right


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault(name: str) -> None:
    """It stops where it should, or the run is the one that is meant."""
    fault = FAULTS[name]
    right()
    where, message, module = outcome(fault.plant)
    assert (where, message[: len(fault.words)]) == (fault.stops, fault.words), message
    if where is None and not fault.words:
        assert not message and is_right(module)
    if where is not None:
        assert re.search(r"Give|give|Use|Call|Let|let|Make|Start|Draw|fit|Update", message), "a remedy"


def test_the_table_of_faults_is_complete() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    missing = [name for name in FAULTS if f"| {name} |" not in readme]
    assert len(FAULTS) >= 40 and not missing
