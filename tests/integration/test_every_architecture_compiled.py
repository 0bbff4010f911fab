"""Every module of the registry, compiled, trained with MLUCallback: the run without compilation, in as many graphs."""

import itertools
from collections import Counter
from typing import Any, Literal

import pytest
import torch
from helpers.architecture_runs import BATCHES, Seeded, attachable, batches_like, built, fit, identical
from helpers.architectures import ARCHITECTURES
from helpers.compilation import Counting

from mlu_lightning import Plan
from mlu_lightning.callbacks import MLUCallback

# one block, because that is compiled faster than two, and the base has two
SHAPE, BASE = (1, 4, 32), (2, 2, 16)


pytestmark = pytest.mark.usefixtures("fresh_compiler")

ALIKE = {"tied llama", "mistral", "qwen3", "gpt-neox", "t5", "tied t5", "bert", "vit", "hugging face resnet"}
ALIKE |= {"post-norm decoder", "sum of experts", "bottleneck resnet"}
"""Close to others, which are compiled by default."""


def case(name: str, backend: str, residual: str) -> Any:
    """Slow are backward passes, which aot_eager compiles, folds with few hooks, and what is alike."""
    hooks = residual == "hook" or ARCHITECTURES[name].unfoldable
    quick = name == "resnet" or (backend == "eager" and hooks and name not in ALIKE)
    return pytest.param(name, backend, residual, marks=[] if quick else [pytest.mark.slow])


CASES = [case(*each) for each in itertools.product(ARCHITECTURES, ("eager", "aot_eager"), ("hook", "fold"))]


@pytest.mark.parametrize(("name", "backend", "residual"), CASES)
def test_compiled_run_is_the_run(name: str, backend: str, residual: Literal["hook", "fold"]) -> None:
    """Also where code without the multipliers was compiled before; and without more graphs or breaks than that has."""
    architecture = ARCHITECTURES[name]
    batches = batches_like(architecture.example)
    compiled, plain = built(architecture, SHAPE), built(architecture, SHAPE)
    counting = Counting(backend)
    wrapped: Any = torch.compile(compiled, backend=counting)
    for module in (wrapped, plain):
        fit(module, batches, Seeded(), epochs=1)
    graphs, breaks = counting.counts()
    assert graphs > 0
    plan = Plan.from_model(compiled, batches[0], base=built(architecture, BASE, seed=1), alpha=1.5)
    assert counting.counts() == (0, Counter()), "planning runs the module as it is written"
    if residual == "hook" and not attachable(plan):
        pytest.skip("its multipliers can be folded only")
    for module in (wrapped, plain):
        fit(module, batches, MLUCallback(plan=plan, residual=residual), Seeded(), epochs=1)
    more_graphs, more_breaks = counting.counts()
    assert more_breaks.keys() <= breaks.keys()
    # where the module has breaks, how many of them and of graphs there are depends on data: experts are chosen by them
    assert breaks or more_graphs <= graphs
    assert len(compiled.losses) == 2 * BATCHES
    if backend == "eager":
        assert compiled.losses == plain.losses and identical(compiled, plain)
    else:
        # rounding of float32: operations are taken apart and put together in another way
        assert compiled.losses == pytest.approx(plain.losses, rel=1e-5)
