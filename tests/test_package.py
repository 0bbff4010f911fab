import re
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
from helpers.bare import Bare
from packaging.requirements import Requirement
from packaging.version import Version

import mlu_lightning

ROOT = Path(__file__).parents[1]


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "arguments", [("ruff", "check", "."), ("ruff", "format", "--check", "."), ("mypy",)], ids=lambda a: " ".join(a[:2])
)
def test_clean(arguments: tuple[str, ...]) -> None:
    result = _python("-m", *arguments)
    assert result.returncode == 0, result.stdout + result.stderr


def test_public_names_are_there_and_documented() -> None:
    for name in mlu_lightning.__all__:
        assert getattr(mlu_lightning, name).__doc__, name
    assert set(mlu_lightning.__all__) < set(dir(mlu_lightning)) and not hasattr(mlu_lightning, "Nothing")


def test_pytorch_lightning_alone_is_refused_with_a_sentence() -> None:
    result = _python("-c", "import sys; sys.modules['lightning'] = None; import mlu_lightning")
    assert "ImportError: mlu_lightning needs the package 'lightning'" in result.stderr
    assert "pip install 'lightning>=2.6,<3'" in result.stderr


def test_importing_changes_nothing(bare: Bare) -> None:
    """And imports no part of the package before it is used, nor packages that not every use needs."""
    code = (
        "import sys, torch, lightning.pytorch; state, modules = torch.get_rng_state(), set(sys.modules);"
        "import mlu_lightning; assert not [name for name in sys.modules if name.startswith('mlu_lightning.')];"
        "exec('from mlu_lightning import *');"
        "assert torch.equal(state, torch.get_rng_state());"
        "print({'transformers', 'wandb', 'matplotlib.pyplot', 'torch._dynamo'} & (set(sys.modules) - modules))"
    )
    assert bare.run(code).strip() == "set()"


@pytest.mark.parametrize("page", ["README.md", "tests/README.md"])
def test_continuous_integration_runs_the_command_of_the_readme(page: str) -> None:
    readme = (ROOT / page).read_text(encoding="utf-8").splitlines()
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert script[-1].startswith("python3 -m venv") and script[-1] in readme, "word for word, last"
    before = [line for line in script[:-1] if line.endswith("pip install torch==2.13.0")]
    assert before, "so that no CUDA comes in"


def test_lowest_versions_are_those_that_are_declared() -> None:
    """Also of the extras that users install; an upper bound is none of them."""
    project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = (project["optional-dependencies"][name] for name in ("wandb", "hf", "tune", "plots"))
    declared = {Requirement(text) for text in chain(project["dependencies"], *extras)}
    lowest = {
        requirement.name.lower(): next(each.version for each in requirement.specifier if each.operator == "==")
        for requirement in map(Requirement, (ROOT / ".ci" / "lowest").read_text().splitlines()[1:])
    }
    for requirement in declared:
        (bound,) = (each.version for each in requirement.specifier if each.operator == ">=")
        assert (
            Version(lowest[requirement.name.lower()]).release[: len(Version(bound).release)] == Version(bound).release
        )


def test_description_of_the_package_has_no_links_into_the_repository() -> None:
    """An index of packages shows it alone."""
    project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())["project"]
    links = re.findall(r"\]\((.*?)\)", project["readme"]["text"])
    assert links and all(link.startswith("https://") for link in links)
