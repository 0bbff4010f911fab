"""What a recipe's command leaves: its tables of comma-separated values, and what it prints."""

import csv
from pathlib import Path

RECIPES = Path(__file__).parents[2] / "recipes"
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("│")[1:-1]]
