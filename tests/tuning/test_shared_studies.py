"""One study in SQLite or a journal for several processes: two at once, a killed one, and one that goes on."""

import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from shutil import chown, which
from tempfile import TemporaryDirectory

import optuna
import pytest
from helpers.processes import forked, training
from helpers.tuned_trainings import Failing, Small, tuned


class Waits(Small):  # until it is killed, or a file is there
    place = Path()

    def on_train_start(self) -> None:
        (self.place / "begun").touch()
        while not (self.place / "go").exists():
            time.sleep(0.01)


@pytest.fixture
def postgresql() -> Iterator[str]:
    """URL of a PostgreSQL server, which refuses to be root's, at a socket in a folder of its own."""
    found = which("initdb") or max(map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb")), default=None)
    if found is None or find_spec("psycopg") is None:
        pytest.skip("PostgreSQL and psycopg are not installed")
    with TemporaryDirectory() as folder:
        if user := "postgres" if os.getuid() == 0 else None:
            chown(folder, user)
        options = {"check": True, "user": user, "cwd": folder, "stdout": subprocess.DEVNULL}
        subprocess.run([found, "-D", "data", "-U", "mlu", "-A", "trust", "--no-sync"], **options)
        control = [str(Path(found).with_name("pg_ctl")), "-D", "data", "-w"]
        subprocess.run([*control, "-o", f"-F -k {folder} -h ''", "start"], **options)
        yield f"postgresql+psycopg://mlu@/postgres?host={folder}"
        subprocess.run([*control, "-m", "immediate", "stop"], **options)


JOURNAL = pytest.param("{}/journal.log", marks=pytest.mark.slow)


@pytest.mark.parametrize("storage", ["sqlite:///{}/shared.db", "postgresql", JOURNAL])
def test_two_processes_work_on_one_study(tmp_path: Path, storage: str, request: pytest.FixtureRequest) -> None:
    url = request.getfixturevalue(storage) if storage == "postgresql" else storage.format(tmp_path)
    shared = {"storage": url, "trials": 4}
    others = [training(tuned, tmp_path, **shared) for _ in range(2)]
    for other in others:
        other.join(60)
        assert other.exitcode == 0
    found = tuned(tmp_path, **shared)
    assert 4 <= len(found.trials) <= 5  # the last two may begin together
    points = Counter(tuple(trial.point.items()) for trial in found.trials)
    assert max(points.values()) == 1  # nobody tries what another does
    assert not [trial for trial in found.trials if trial.reason and not trial.reason.startswith("stopped")]


def test_a_killed_process_leaves_a_study_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlu_lightning.tuning.storage._HEARTBEAT", 1)
    monkeypatch.setattr("mlu_lightning.tuning.storage._GRACE", 1)
    tuned(tmp_path, trials=1)
    monkeypatch.setattr(Waits, "place", tmp_path)
    killed = forked(tuned, tmp_path, build=Waits, trials=6)
    while not (tmp_path / "begun").exists():
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.join(60)
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    states = [trial.state.name for trial in optuna.load_study(study_name="mlu-tune", storage=storage).trials]
    assert states[1:] == ["RUNNING"]
    time.sleep(2.1)
    found = tuned(tmp_path, trials=3)
    assert [trial.number for trial in found.trials] == [0, 1, 2]
    assert [trial.reason for trial in found.trials if trial.number == 1] == ["its process ended"]


@pytest.mark.slow
def test_several_workers_make_the_trials(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    found = tuned(
        tmp_path, trials=9, workers=2, progress=lambda what, done, total, best: seen.append((what, done, total))
    )
    assert 9 <= len(found.trials) <= 10
    assert seen[0][:2] == ("trials", 0) and seen[-1][1] == seen[-1][2]
    assert found.again and all(len(losses) == 1 for losses in found.again.values())
    with pytest.raises(ValueError, match="base cannot be trained as it is: RuntimeError: out of luck"):
        tuned(tmp_path / "failing", workers=2, callbacks=Failing(RuntimeError, tmp_path / "count", 0))
