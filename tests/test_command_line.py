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
from mlu_lightning.cli.arrangement import arranged
from mlu_lightning.cli.parser import COMMANDS


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


LATE = """
import atexit, os, signal, sys
import mlu_lightning.cli.parser as parser
from mlu_lightning.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)
class Late:
    def __del__(self, kill=os.kill, itself=os.getpid()):
        kill(itself, signal.SIGINT)
def run(args):
    if "{moment}" == "at the exit":
        atexit.register(os.kill, os.getpid(), signal.SIGINT)
    elif "{moment}" == "after it":
        sys.late = Late()
    elif "{moment}" == "twice":
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            atexit.register(os.kill, os.getpid(), signal.SIGINT)
    print("done")
    sys.exit(4)
parser.run = run
main()
"""


@pytest.mark.parametrize(("moment", "code"), [("at the exit", 130), ("after it", 4), ("twice", 130)])
def test_an_interrupt_after_the_command(moment: str, code: int) -> None:
    """The second is when Python takes itself apart, where a signal would kill it."""
    command = [sys.executable, "-c", LATE.replace("{moment}", moment)]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=60)
    said = "" if moment == "twice" else "done\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (code, said, "")


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
seconds, widest = time.process_time(), max(len(line) for text in texts for line in text.splitlines())
print(json.dumps(["torch" in sys.modules, seconds, min(map(len, texts)), "Exits with 0" in texts[2], widest]))
"""
    imported, seconds, shortest, codes, widest = run(f"import os; os.environ['COLUMNS'] = '60'{code}")
    assert not imported and seconds < 2 and shortest > 300 and codes and widest <= 60


@pytest.mark.parametrize(
    ("given", "order"),
    [
        *(
            (line, "shape 1e6 --model resnet")
            for line in ("--model resnet shape 1e6", "--model resnet --parameters=1e6 shape")
        ),
        *((f"shape {line}", "shape 1e6 --model resnet") for line in ("--model resnet 1e6", "1e6 --model resnet")),
        ("shape --model resnet --parameters=1e6", "shape 1e6 --model resnet"),
        ("--parameters 1e6 shape --present.depth 7", "shape 1e6 --present.depth 7"),
        ("--verbose check a.yaml --log", "check a.yaml --verbose true --log true"),
        ("check --verbose a.yaml --log no", "check a.yaml --verbose true --log no"),
        ("--log check a.yaml", "check a.yaml --log true"),
        ("--log study tune a.yaml", "tune a.yaml --log study"),
        ("--out report report plan", "report plan --out report"),
        ("--seed -1 quickstart --out=-o", "quickstart --seed -1 --out=-o"),
        ("plan --other 3 a.yaml", "plan a.yaml --other 3"),
        ("plan a.yaml --out --model m", "plan a.yaml --out --model m"),
        ("--help check", "check --help"),
        ("check --version", "--version"),
        ("--steps 3 train", "3"),
        ("--verbose", ""),
    ],
)
def test_order_of_arguments(given: str, order: str) -> None:
    assert arranged(given.split(), COMMANDS) == order.split()


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
        ("--steps 2.5 quickstart", 2, "2.5"),
        ("--out {}/new", 2, "invalid choice"),
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
