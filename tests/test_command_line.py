"""What all commands share: versions, other ways to start them, and interrupts."""

import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from typing import Any

import pytest
from helpers.processes import environment

import mlu_lightning
from mlu_lightning.cli import main


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert not exit_.value.code and capsys.readouterr().out == f"mlu-lightning {version('mlu-lightning')}\n"
    assert mlu_lightning.__version__ == version("mlu-lightning")


def test_started_as_a_module() -> None:
    command = [sys.executable, "-m", "mlu_lightning", "--version"]
    said = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True, timeout=60)
    assert said.stdout == f"mlu-lightning {version('mlu-lightning')}\n"


@pytest.mark.parametrize("becomes", [SystemExit(1), RuntimeError("a pool that is broken"), ValueError("no value")])
def test_an_interrupt_that_became_something_else(becomes: BaseException, monkeypatch: Any, tmp_path: Any) -> None:
    def train(*args: Any) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        except KeyboardInterrupt:
            raise becomes from None

    monkeypatch.setattr("mlu_lightning.quickstart.run_study", train)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which who runs these tests may ignore
    try:
        with pytest.raises(SystemExit) as exit_:
            main(["quickstart", "--out", str(tmp_path)])
        assert exit_.value.code == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
