"""Studies without new processes, each of which would import everything again."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from recipes.common import studies


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(studies, "ProcessPoolExecutor", lambda *args: ThreadPoolExecutor(1))
