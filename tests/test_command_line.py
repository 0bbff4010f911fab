"""What all commands share: versions, other ways to start them, and interrupts."""

import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from typing import Any

import pytest
from helpers.check_command import command
from helpers.processes import environment, run

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


def test_help_needs_no_torch_and_little_time() -> None:
    """The processor time of all commands together; a command itself may import what it likes."""
    code = """
import contextlib, io, json, sys, time
from mlu_lightning.cli import main
texts = []
for command in ([], ["quickstart"], ["check"], ["tune"], ["plan"], ["report"], ["shape"]):
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        main([*command, "--help"])
    texts.append(text.getvalue())
print(json.dumps(["torch" in sys.modules, time.process_time(), min(map(len, texts)), "Exits with 0" in texts[2]]))
"""
    imported, seconds, shortest, codes = run(code)
    assert not imported and seconds < 2 and shortest > 300 and codes


def test_positional_arguments_stand_anywhere(capsys: pytest.CaptureFixture[str]) -> None:
    said, resnet = set(), "--model resnet"
    for args in (f"1e6 {resnet}", f"{resnet} 1e6", f"--parameters 1e6 {resnet}", f"{resnet} --parameters=1e6"):
        main(["shape", *args.split()])
        said.add(capsys.readouterr().out)
    assert len(said) == 1 and "resnet with up to 1,000,000 parameters" in said.pop()


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ("", 2, 'expected "command"'),
        ("train", 2, "invalid choice"),
        ("shape", 2, "required"),
        ("shape 1e8 1e9", 2, "nrecognized arguments: 1e9"),
        ("shape many", 2, "many"),
        ("quickstart --step 3", 2, "nrecognized arguments: --step"),
        ("quickstart --steps 2.5", 2, "2.5"),
        ("quickstart --steps 0 --out {}/new", 1, "There are no runs of 0 steps"),
        ("quickstart --seed -1 --out {}/new", 1, "The seed -1 is none"),
        ("quickstart --text {}/none --out {}/new", 1, "cannot be read"),
        ("quickstart --out {}/file", 1, "cannot be made"),
        ("check {}/none.yaml --out {}/new", 1, "cannot be read as a configuration"),
        ("check {}/file --factors 1,x --out {}/new", 1, "--factors 1,x should be whole numbers with commas"),
        ("plan {} --out {}/new/plan.yaml", 1, "cannot be read as a configuration"),
        ("report {}/none --out {}/new.html", 1, "none"),
    ],
)
def test_bad_options(args: str, code: int, message: str, tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("nothing")
    assert command(*args.replace("{}", str(tmp_path)).split()) == code
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
