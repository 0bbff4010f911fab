from pathlib import Path

import pytest


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a test keeps its reference."""
    return tmp_path / "reference.safetensors"
