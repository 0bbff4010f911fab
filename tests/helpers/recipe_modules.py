"""Modules of recipes."""

import importlib
from typing import Any


def load(name: str) -> Any:
    return importlib.import_module(name)
