"""READMEs, cards and theory.md: links lead somewhere, cited sections and files exist, code compiles."""

import ast
import fnmatch
import importlib.resources
import re
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[1]
README, THEORY = ROOT / "README.md", ROOT / "mlu_lightning" / "theory.md"
CARDS = [*sorted((ROOT / "recipes").rglob("README.md")), *sorted((ROOT / "tests").rglob("README.md"))]
PAGES = [README, ROOT / "CHANGELOG.md", *CARDS, THEORY]
SOURCES = [path for name in ("mlu_lightning", "recipes", "tests") for path in sorted((ROOT / name).rglob("*.py"))]
CITATION = re.compile(r'theory\.md,\ssections?\s(\d+(?:(?:,\s|\sand\s)\d+)*)(?:,\s"([^"]+)")?')


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tokens(path: Path) -> list[Token]:
    """Of a page, with those inside of paragraphs, headings and cells beside them."""
    found = MarkdownIt("commonmark").enable("table").parse(path.read_text(encoding="utf-8"))
    return [token for outer in found for token in (outer, *(outer.children or ()))]


def headings(path: Path) -> list[tuple[str, str]]:
    """Level and text of each, such as ``("h2", "What is covered")``."""
    after = zip(tokens(path), tokens(path)[1:], strict=False)
    return [(opened.tag, text_of(inline)) for opened, inline in after if opened.type == "heading_open"]


def text_of(inline: Token) -> str:
    return "".join(child.content for child in inline.children or ())


def anchors(path: Path) -> set[str]:
    """Of all headings, by GitHub's rule; the second of one text gets ``-1``, and so on."""
    seen = Counter(re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for _, text in headings(path))
    return {slug if not n else f"{slug}-{n}" for slug, count in seen.items() for n in range(count)}


def code_blocks(path: Path, language: str | None = None) -> list[str]:
    fences = [token for token in tokens(path) if token.type == "fence"]
    return [fence.content for fence in fences if language in (None, fence.info.strip())]


def test_anchors_by_the_rule_of_github(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A `b_c`, [d](e) & F-g!\n## Twice\n## Twice\n```\n# comment\n```\n")
    assert anchors(page) == {"a-b_c-d--f-g", "twice", "twice-1"}


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_and_images_lead_to_a_file_and_to_a_heading_of_it(page: Path) -> None:
    kinds = {"link_open": "href", "image": "src"}
    targets = [str(token.attrs[kinds[token.type]]) for token in tokens(page) if token.type in kinds]
    dead = []
    for target in targets:
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if "://" not in target and not (path.exists() and (not anchor or anchor in anchors(path))):
            dead.append(target)
    assert not dead


@pytest.mark.parametrize("page", [README, *CARDS, THEORY], ids=relative)
def test_files_that_a_page_names_exist(page: Path) -> None:
    """In code: ``tests/planning/test_base.py``, and what ``python -m recipes.lr_transfer.run`` runs."""
    code = "\n".join([*code_blocks(page), *(token.content for token in tokens(page) if token.type == "code_inline")])
    files = set(re.findall(r"(?<![\w./-])(?:tests|recipes|mlu_lightning)/[\w./-]*\w", code))
    modules = set(re.findall(r"python3? -m (recipes[\w.]*\w)", code))
    missing = {name for name in files if not (ROOT / name).exists()}
    missing |= {name for name in modules if not (ROOT / name.replace(".", "/")).with_suffix(".py").exists()}
    assert not missing


@pytest.mark.parametrize("page", [README, *CARDS], ids=relative)
def test_python_code_compiles(page: Path) -> None:
    for block in code_blocks(page, "python"):
        ast.parse(block)


def test_readme_can_be_read_in_three_minutes() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 250


def test_cited_sections_of_the_theory_exist() -> None:
    found = headings(THEORY)
    numbers = {match[1] for level, text in found if level == "h2" and (match := re.match(r"(\d+)\. ", text))}
    titles = {text for _, text in found}
    missing = []
    for path in SOURCES:
        # a citation in a docstring or comment may be continued in the next line
        source = re.sub(r"\s*\n\s*(?:# )?", " ", path.read_text(encoding="utf-8"))
        for match in CITATION.finditer(source):
            cited, title = set(re.findall(r"\d+", match[1])), match[2]
            if not cited <= numbers or (title and title not in titles):
                missing.append(f"{relative(path)}: {match[0]}")
    assert numbers and not missing


def test_theory_and_types_are_where_the_package_is() -> None:
    files = importlib.resources.files("mlu_lightning")
    assert (files / "py.typed").is_file() and (files / "theory.md").read_text(encoding="utf-8").startswith("# ")


def test_every_file_of_the_package_is_package_data() -> None:
    tomllib = pytest.importorskip("tomllib")
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    patterns = tools["setuptools"]["package-data"]["mlu_lightning"]
    found = [path.relative_to(THEORY.parent) for path in THEORY.parent.rglob("*") if path.is_file()]
    data = [path.as_posix() for path in found if path.suffix not in (".py", ".pyc")]
    assert not [name for name in data if not any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]


@pytest.mark.slow
def test_wheel_has_what_the_package_has(tmp_path: Path) -> None:
    source, package = tmp_path / "source", THEORY.parent
    shutil.copytree(package, source / package.name, ignore=shutil.ignore_patterns("*.pyc", "__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    found = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("mlu_lightning/")}
    assert found == {relative(path) for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc"}
