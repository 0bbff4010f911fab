"""Modules of recipes."""

import importlib
from pathlib import Path
from typing import Any

RECIPES = Path(__file__).parents[2] / "recipes"


def load(name: str) -> Any:
    return importlib.import_module(name)
