"""Modules of recipes."""

import importlib
from typing import Any


def load(name: str) -> Any:
    """Import a module of the recipes, untyped."""
    return importlib.import_module(name)
