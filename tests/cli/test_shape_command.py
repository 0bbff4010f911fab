"""``mlu-lightning shape``: tables of shapes, the sentences above them, and what is refused."""

import re
from math import log2

import pytest
import torch
from helpers.check_command import command
from helpers.error_bound_by_hand import by_hand
from helpers.recipe_results import cells

from mlu_lightning import Architecture, ErrorConstants, Shape, optimal_shape
from mlu_lightning.cli import main
from mlu_lightning.models import CausalTransformer
from mlu_lightning.shapes.error_bound import ATTENTION


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    main(["shape", *arguments])
    return capsys.readouterr().out


def rows(text: str) -> list[list[str]]:
    return [cells(line) for line in text.splitlines() if line.startswith("│")]


ASSUMPTIONS = (
    "c1 = 0.5, c2 = 2.2, c3 = 2.5. c1 and c2 were measured with attention of head dimension 4, c2 at L = 8 only",
    *("c3 could not be had", "gradient descent and a bounded number of steps", "L is twice the number of blocks"),
    "promises nothing for Adam or longer training, and the error is not the loss",
    "M counts heads, of dimension 64 at every shape, and each MLP has 256 units for each head",
    "No shape is marked as the best, because not all constants were measured with Transformers",
    "All errors are as large as the stream itself",
)


def test_command_line_prints_a_table_for_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "100e6", "--present", "{depth: 24, hidden: 12, embedding: 768}")
    table = rows(text)
    for mark, blocks, heads, units, embedding, parameters, error, ratio in table[1:-1]:
        assert not mark and int(units) == 256 * int(heads)
        with torch.device("meta"):
            model = CausalTransformer(50257, 8, int(blocks), int(embedding), int(heads), 64, int(units))
        assert int(parameters.replace(",", "")) == sum(p.numel() for p in model.parameters()) <= 1e8
        shape = Shape(2 * int(blocks), int(heads), int(embedding))
        assert float(error) == pytest.approx(by_hand(shape, ATTENTION), abs=6e-4)
        assert float(ratio) == pytest.approx(
            by_hand(shape, ATTENTION) / by_hand(Shape(24, 12, 768), ATTENTION), abs=6e-4
        )
    assert table[-1][0] == "present" and table[-1][-1] == "1.000"
    assert len(table) > 6 and text.index("Adam") < text.index("│")
    assert [says for says in ASSUMPTIONS if says not in " ".join(text.split())] == []


@pytest.mark.parametrize("parameters", ["2e7", "1e9", "1e12"])
def test_transformers_are_of_shapes_that_people_build(parameters: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The largest of each aspect: no further 64 of the embedding would fit, and of given constants the best is marked."""
    table = rows(printed(capsys, parameters, "--constants", "{depth: 1, hidden: 0.1, embedding: 1}"))[1:]
    assert [row[0] for row in table].count("*") == 1
    constants, prices = ErrorConstants(1, 0.1, 1), {}
    for mark, *sizes in table:
        blocks, heads, _, embedding, count = (int(size.replace(",", "")) for size in sizes[:5])
        assert heads * 64 / embedding in (1, 2) and embedding / blocks < 200
        assert embedding / blocks > 16 or blocks == 1
        assert 0.3 * float(parameters) < count <= float(parameters)
        prices[mark, blocks, heads] = by_hand(Shape(2 * blocks, heads, embedding), constants) * (2 * blocks) ** -log2(
            0.95
        )
    assert min(prices, key=prices.__getitem__)[0] == "*"


def test_command_line_prints_a_table_for_resnets(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--parameters 1e6 --model resnet --inputs 784 --outputs 10 --multiple 32 --gain 0.1".split()
    present = "--present.depth 7 --present.hidden 100 --present.embedding 300".split()
    text = printed(capsys, *arguments, *present, "--constants", "{depth: 2, hidden: 1, embedding: 3}")
    constants = ErrorConstants(2, 1, 3)
    best = next(row for row in rows(text) if row[0] == "*")
    wanted = optimal_shape(1e6, Architecture.resnet(784, 10, 32, constants), 0.1)
    assert best[1:4] == [str(size) for size in vars(wanted.shape).values()]
    assert best[4:6] == [f"{wanted.parameters:,}", f"{wanted.error:.3f}"]
    assert float(best[6]) == pytest.approx(wanted.error / by_hand(Shape(7, 100, 300), constants), abs=6e-4)
    sentences = " ".join(text.split())
    assert "c1 = 2, c2 = 1, c3 = 3. These constants were given." in sentences
    assert "heads" not in sentences and "as large as the stream" not in sentences


def test_command_line_without_a_present_shape_compares_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "--parameters", "1_000_000", "--model", "resnet")
    assert "present" not in text and "published fit to the paper's experiment" in " ".join(text.split())


THIN = "--present.hidden 1 --present.embedding 1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("1e3", r"smallest allowed one, Shape\(depth=2, hidden=1, embedding=64\), has 6,482,240 parameters"),
        ("1e8 --inputs 3 --outputs 4", r"--inputs and --outputs cannot be used with --model transformer"),
        ("1e8 --model resnet --head_dim 3", r"with --model resnet, which has --inputs, --outputs\. Leave"),
        ("1e8 --present.depth 4", r"--present has depth, and should have depth, hidden and embedding: --pr"),
        ("1e8 --constants {}", r"--constants has nothing, and should have"),
        (f"1e8 {THIN} --present.depth 0", r"depth=0 of a shape should be a whole number"),
        (
            f"1e8 {THIN} --present.depth 5",
            r"no depth of 5: depth counts residual additions, two for each block\. Give twice",
        ),
        ("1e8 --mlp_ratio -1", r"--mlp_ratio -1 should be 1 or more"),
        ("1e8 --gain 0", r"gain=0\.0 should be from 0\.01"),
    ],
)
def test_command_line_says_what_is_wrong(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("shape", "--parameters", *arguments.split()) == 1
    error = capsys.readouterr().err
    assert error.startswith("mlu-lightning: ") and error.count("\n") == 1
    assert re.search(message, error), error
