"""Modules of recipes, which are scripts beside the package."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

RECIPES = Path(__file__).parents[1] / "recipes"


def load(name: str) -> Any:
    """Import a module of the folder of recipes, as Python does for a script in it."""
    sys.path.insert(0, str(RECIPES))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(RECIPES))
