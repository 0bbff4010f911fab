"""How the repository is built: which folder imports which, where files are, what they are called, and how long they are."""

import ast
import subprocess
import sys
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[1]
PACKAGE, RECIPES, TESTS = ROOT / "mlu_lightning", ROOT / "recipes", ROOT / "tests"
TOP_LEVEL = {"pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "mlu_lightning", "tests", "recipes"}
# lines of all Python files, as `wc -l` counts them, and of one
LONGEST_FILE = 400
MOST_LINES = {PACKAGE: 26_500, RECIPES: 5_180, TESTS: 33_520}
# these work in a loop without Lightning, and callbacks are adapters to them
WITHOUT_TRAINER = ("discovery", "planning", "application", "observation", "limit", "shapes", "utilities", "table.py")


def python_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [folder]


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n")


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> set[str]:
    """Full names of all that a file imports, wherever in it: ``from a.b import c`` imports ``a.b.c``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_contracts_of_import_linter() -> None:
    """Layers, and no circle between two files of a folder: ``[tool.importlinter]`` in pyproject.toml."""
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    command = [sys.executable, "-c", code, "--no-cache"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 kept, 0 broken" in result.stdout


def test_no_circle_of_imports() -> None:
    """Between any two files, ``__init__`` among them: a file inside of a folder does not import from the folder."""
    graph = grimp.build_graph("mlu_lightning", cache_dir=None)
    TopologicalSorter({name: graph.find_modules_directly_imported_by(name) for name in graph.modules}).prepare()


@pytest.mark.parametrize("part", WITHOUT_TRAINER)
def test_what_works_without_lightning_does_not_import_its_trainer(part: str) -> None:
    found = {
        relative(path): names
        for path in python_files(PACKAGE / part)
        # the one file of what Lightning keeps private, of its Trainer, too
        if path.stem != "lightning_private" and (names := {name for name in imports(path) if is_of_the_trainer(name)})
    }
    assert not found


def is_of_the_trainer(name: str) -> bool:
    adapters = ("lightning.pytorch.callbacks", "lightning.pytorch.trainer", "lightning.pytorch.cli")
    return name in ("lightning.pytorch.Callback", "lightning.pytorch.Trainer") or name.startswith(adapters)


def test_no_test_imports_from_a_test() -> None:
    """What tests share is in tests/helpers."""
    files = python_files(TESTS)
    tests = {path.stem for path in files if path.stem.startswith("test_")}
    found = {relative(path): names for path in files if (names := tests & split(imports(path)))}
    assert not found


def split(names: set[str]) -> set[str]:
    return {part for name in names for part in name.split(".")}


def test_top_level_has_what_it_should_and_nothing_else() -> None:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        pytest.skip("not a checkout of git")
    found = {name.split("/")[0] for name in result.stdout.splitlines()}
    assert {name for name in found if not name.startswith(".")} == TOP_LEVEL


def test_no_two_files_of_the_package_have_one_name() -> None:
    files = [path for path in python_files(PACKAGE) if path.stem != "__init__"]
    counts = Counter(path.stem for path in files)
    assert not sorted(relative(path) for path in files if counts[path.stem] > 1)


@pytest.mark.parametrize("folder", [PACKAGE, RECIPES], ids=relative)
def test_first_line_of_every_file_is_a_sentence(folder: Path) -> None:
    first = {relative(path): (docstring(path) or "").partition("\n")[0] for path in python_files(folder)}
    assert not {path: line for path, line in first.items() if not line.endswith(".")}


def docstring(path: Path) -> str | None:
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def test_folders_of_the_package_alone_say_what_they_export() -> None:
    """But utilities, whose files have nothing to do with each other; in a file, an underscore says what is its own."""
    listing = {path for path in python_files(PACKAGE) if "\n__all__ = [" in path.read_text(encoding="utf-8")}
    folders = {path for path in python_files(PACKAGE) if path.stem == "__init__"}
    assert listing == folders - {PACKAGE / "utilities" / "__init__.py"}


@pytest.mark.parametrize("folder", MOST_LINES, ids=relative)
def test_no_file_is_too_long(folder: Path) -> None:
    assert not {relative(path): length for path in python_files(folder) if (length := lines(path)) > LONGEST_FILE}


@pytest.mark.parametrize("folder", MOST_LINES, ids=relative)
def test_a_folder_is_not_too_long(folder: Path) -> None:
    assert sum(map(lines, python_files(folder))) <= MOST_LINES[folder]
