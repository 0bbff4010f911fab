"""What is read of a model, and under which names."""

import copy
import pickle

import pytest

from mlu_lightning.discovery.structure import Tap
from mlu_lightning.observation import FeatureName, LocationName, OutputName, StreamName, locate
from mlu_lightning.observation.locations import parse_location_name


def stream_taps(depth: int, number: int = 0) -> list[Tap]:
    return [Tap("stream", number, position, f"block{position}", "input", 0, -1) for position in range(depth + 1)]


BETWEEN = [(4, 0.0, {0: 1.0}), (4, 0.25, {1: 1.0}), (4, 1.0, {4: 1.0})]
BETWEEN += [(2, 0.25, {0: 0.5, 1: 0.5}), (3, 0.25, {0: 0.25, 1: 0.75}), (1, 0.75, {0: 0.25, 1: 0.75})]
BETWEEN += [(10, 0.7, {7: 1.0}), (10, 0.3, {3: 1.0}), (7, 1 / 7, {1: 1.0})]  # but for rounding, whole positions


@pytest.mark.parametrize(("depth", "s", "expected"), BETWEEN)
def test_relative_depth_lies_between_two_positions(depth: int, s: float, expected: dict[int, float]) -> None:
    (location,) = locate(stream_taps(depth), [depth], [s])
    assert location.name == f"s={s:g}"
    assert {taps[0].position: weight for weight, taps in location.parts} == pytest.approx(expected)


def test_streams_and_readouts_have_names() -> None:
    taps = [*stream_taps(2), *stream_taps(4, 1)]
    taps += [Tap("readout", number, 0, f"head{number}", "output", None, -1) for number in range(2)]
    names = [location.name for location in locate(taps, [2, 4], [0, 1])]
    assert names == ["s=0", "s=1", "stream1/s=0", "stream1/s=1", "output", "output1"]


WITHOUT_MIDDLE = [tap for tap in stream_taps(4) if tap.position != 2]
REMEDY = r"after 2 of its 4 additions cannot be read.*nn.Identity.*other than 0.5"


@pytest.mark.parametrize(
    ("taps", "s", "message"),
    [(WITHOUT_MIDDLE, 0.5, REMEDY), (stream_taps(4), 1.5, r"from 0 \(the embedding\) to 1 .* 1.5 is not")],
)
def test_position_that_cannot_be_read_is_refused_with_a_remedy(taps: list[Tap], s: float, message: str) -> None:
    assert len(locate(taps, [4], [0, 0.25, 1])) == 3
    with pytest.raises(ValueError, match=message):
        locate(taps, [4], [0, s])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (StreamName(0), "s=0"),
        (StreamName(1 / 3, 2), "stream2/s=0.333333"),
        (StreamName(1e-5), "s=1e-05"),
        (OutputName(), "output"),
        (OutputName(3), "output3"),
        (FeatureName("mlp", ""), "mlp/self"),
        (FeatureName("attention", "blocks.0/a"), "attention/blocks.0/a"),
    ],
)
def test_name_is_its_text_and_comes_back_from_it(name: LocationName, text: str) -> None:
    assert name == text and str(name) == f"{name}" == text and type(str(name)) is str
    for again in (parse_location_name(text), pickle.loads(pickle.dumps(name)), copy.deepcopy(name)):
        assert again == name and type(again) is type(name)
        for field, value in vars(name).items():
            assert getattr(again, field) == (pytest.approx(value, rel=1e-5) if field == "depth" else value)


NO_NAMES = [
    *("", "s", "s=", "s=2", "s=nan", "s=0.50", "s=-0.1", "s=1.", "stream0/s=0", "stream01/s=0", "output0", "output-1"),
    *("conv/a", "mlp", "mlp/", "s=1\n", "output\u0663", "output" + "9" * 5000, "mlu/distance/rms/s=0"),
]


@pytest.mark.parametrize("text", NO_NAMES)
def test_text_that_is_no_name_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # of a number that is none, Python's own
        parse_location_name(text)
