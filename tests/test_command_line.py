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
    said = f"mlu-lightning {version('mlu-lightning')}\n"
    assert not exit_.value.code and capsys.readouterr().out == said == f"mlu-lightning {mlu_lightning.__version__}\n"
    command = [sys.executable, "-m", "mlu_lightning", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=60).stdout == said


@pytest.mark.parametrize("becomes", [SystemExit(1), RuntimeError("a pool that is broken"), ValueError("no value")])
def test_an_interrupt_that_became_something_else(becomes: BaseException, monkeypatch: Any, tmp_path: Any) -> None:
    def train(*args: Any) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        except KeyboardInterrupt:
            raise becomes from None

    monkeypatch.setattr("mlu_lightning.quickstart.study.run_study", train)
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
import mlu_lightning.cli as cli, mlu_lightning.cli.parser as parser
signal.signal(signal.SIGINT, signal.default_int_handler)
class Late:
    def __del__(self, kill=os.kill, itself=os.getpid()):
        kill(itself, signal.SIGINT)
def run(args):
    {do}
    sys.exit(4)
parser.run = run
cli.main()
"""
_LATER = "atexit.register(os.kill, os.getpid(), signal.SIGINT)"


@pytest.mark.parametrize(
    ("do", "code"), [(_LATER, 130), ("sys.late = Late()", 4), (f"{_LATER}; os.kill(os.getpid(), signal.SIGINT)", 130)]
)
def test_an_interrupt_after_the_command(do: str, code: int) -> None:
    """Also when Python takes itself apart, where a signal would kill it."""
    command = [sys.executable, "-c", LATE.replace("{do}", do)]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=60)
    assert (ended.returncode, ended.stderr) == (code, "")


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


ORDERS = """
--model resnet --parameters=1e6 shape     => shape 1e6 --model resnet
shape --present.depth 7 --parameters 1e6  => shape 1e6 --present.depth 7
--verbose check a.yaml --log no           => check a.yaml --verbose true --log no
--log check --verbose a.yaml              => check a.yaml --log true --verbose true
--log study tune a.yaml                   => tune a.yaml --log study
--out report report plan                  => report plan --out report
--seed -1 quickstart --out=-o             => quickstart --seed -1 --out=-o
plan --other 3 a.yaml                     => plan a.yaml --other 3
--help check                              => check --help
check --version                           => --version
--steps 3 train                           => 3
"""


def test_order_of_arguments() -> None:
    for line in ORDERS.strip().splitlines():
        given, _, order = line.partition("=>")
        assert arranged(given.split(), COMMANDS) == order.split(), given


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ("", 2, 'expected "command"'),
        ("train", 2, "invalid choice"),
        ("shape", 2, "required"),
        ("shape 1e8 1e9", 2, "nrecognized arguments: 1e9"),
        ("quickstart --step 3", 2, "nrecognized arguments: --step"),
        ("quickstart --steps 2.5", 2, "2.5"),
        ("quickstart --steps 0 --out {}/new", 1, "There are no runs of 0 steps"),
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
