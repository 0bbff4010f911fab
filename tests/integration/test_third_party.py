"""Models of other packages that nothing here was written for: roles that were read through, ratios, and what is refused.

They need the extra ``tests-models``, and are skipped without a package.
"""

import copy
import fnmatch
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from helpers.third_party import MODELS, RIGHTLY_REFUSED, expected
from torch import nn

from mlu_lightning import Plan, attach_multipliers, discover, fold

pytestmark = pytest.mark.slow
EXPECTED = expected()


def built(name: str, size: int) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    try:
        return MODELS[name](size)
    except (ImportError, RuntimeError) as error:
        return pytest.skip(f"not installed: {error}")


def output(module: nn.Module, inputs: Any) -> torch.Tensor:
    torch.manual_seed(1)
    found = module(**inputs) if isinstance(inputs, Mapping) else module(*inputs)
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(found) if isinstance(leaf, torch.Tensor)]
    return torch.cat([leaf.flatten().double() for leaf in leaves if leaf.is_floating_point()])


def row_by_hand(name: str, rows: Mapping[str, str]) -> str | None:
    """The row of a name, where ``*`` stands for one part."""
    parts = name.split(".")
    globs = ((glob.split("."), row) for glob, row in rows.items())
    alike = (row for glob, row in globs if len(glob) == len(parts) and all(map(fnmatch.fnmatchcase, parts, glob)))
    return next(alike, None)


@pytest.mark.parametrize("name", EXPECTED)
def test_roles_and_streams_are_those_that_were_read_through(name: str) -> None:
    streams, rows = EXPECTED[name]
    structure = discover(*built(name, 1))
    assert " ".join(f"{stream.depth}x{stream.embedding}" for stream in structure.streams) == streams
    found = {parameter: facts.row for parameter, facts in structure.parameters.items()}
    assert found == {parameter: row_by_hand(parameter, rows) for parameter in found}


@pytest.mark.parametrize("name", EXPECTED)
def test_hook_is_fold_and_the_base_is_the_identity(name: str) -> None:
    (base, inputs), (module, larger) = built(name, 1), built(name, 2)
    at_base = Plan.from_model(copy.deepcopy(base), inputs, base=base)
    assert all(multiplier.value == 1 for multiplier in at_base.multipliers)
    assert all(ratio == 1 for entry in at_base.parameters.values() for ratio in vars(entry.ratios).values())
    plan = Plan.from_model(module.double(), larger, base=base)
    assert {multiplier.kind for multiplier in plan.multipliers} >= {"branch"}
    module.eval()
    if any(multiplier.site is None for multiplier in plan.multipliers if multiplier.value != 1):
        pytest.skip("not every multiplier can be a hook")
    hooked, folded = copy.deepcopy(module), fold(copy.deepcopy(module), plan)
    attach_multipliers(hooked, plan)
    doubled = torch.utils._pytree.tree_map(
        lambda leaf: leaf.double() if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf, larger
    )
    with torch.no_grad():
        torch.testing.assert_close(output(hooked, doubled), output(folded, doubled), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", RIGHTLY_REFUSED)
def test_refused(name: str) -> None:
    (base, _), (module, inputs) = built(name, 1), built(name, 2)
    with pytest.raises(ValueError, match=r"no residual branches|recurrent|multiplies its stream"):
        Plan.from_model(module, inputs, base=base)


def test_every_model_has_its_place() -> None:
    assert {*MODELS} == {*EXPECTED, *RIGHTLY_REFUSED}
