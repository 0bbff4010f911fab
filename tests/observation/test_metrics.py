"""Metrics over batches and processes, against the functions on all samples at once."""

import copy
import io
import math
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.trainers import quiet
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import Metric, MetricCollection

from mlu_lightning.observation import distances
from mlu_lightning.observation.metrics import CKADistance, GramDistance, OutputDistance, ProcrustesDistance, RMSDistance

Distance = Callable[[Tensor, Tensor], Tensor]

DISTANCES: dict[type[Metric], Distance] = {
    RMSDistance: distances.rms_distance,
    GramDistance: distances.gram_distance,
    CKADistance: distances.cka_distance,
    ProcrustesDistance: distances.procrustes_distance,
    OutputDistance: distances.output_distance,
}
every = pytest.mark.parametrize(("kind", "distance"), DISTANCES.items(), ids=lambda value: value.__name__)


def close(found: Tensor, wanted: Tensor, rtol: float = 1e-13) -> None:
    """Equal but for sums of squares in another order."""
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=0.0)


def draw(samples: int, dimension: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(samples, dimension, generator=torch.Generator().manual_seed(seed))


def data(kind: type[Metric], samples: int = 20) -> tuple[Tensor, Tensor]:
    return draw(samples), draw(samples, 4 if kind is OutputDistance else 6, 1)


def split(kind: type[Metric], *sizes: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(*(values.split(sizes) for values in data(kind, sum(sizes))), strict=True))


def fed(kind: type[Metric], *sizes: int) -> Metric:
    metric = kind()
    for batch in split(kind, *sizes):
        metric.update(*batch)
    return metric


@every
@pytest.mark.parametrize("sizes", [(20,), (7, 13), (1, 1, 18), (5, 5, 5, 5)])
def test_batches_make_the_distance_of_all_samples(kind: type[Metric], distance: Distance, sizes: Any) -> None:
    value = fed(kind, *sizes).compute()
    assert value.dtype == torch.float64 and value.shape == ()
    close(value, distance(*data(kind)))


@every
def test_forward_returns_the_distance_of_the_batch(kind: type[Metric], distance: Distance) -> None:
    metric = kind()
    for batch in split(kind, 6, 14):
        close(metric(*batch), distance(*batch))
    close(metric.compute(), distance(*data(kind)))


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_sums_are_float64_whatever_comes_in(kind: type[Metric], distance: Distance, dtype: torch.dtype) -> None:
    h, reference = ((1000 + values).to(dtype) for values in data(kind, 3000))
    metric = kind()
    for batch in zip(h.split(100), reference.split(100), strict=True):
        metric.update(*batch)
    # the rounding of 1e3 twice, or of 1e6 in Gram matrices, in float64
    close(metric.compute(), distance(h.double(), reference.double()), rtol=1e-9)


def test_a_large_sum_takes_small_squares() -> None:
    metric = RMSDistance()
    metric.update(torch.full((1, 1), 1e6), torch.zeros(1, 1))
    for _ in range(100):
        metric.update(torch.full((100, 1), 1e-1), torch.zeros(100, 1))
    # 1e12 + 10^4 * 0.1^2: float32 would stay at 1e12
    total = metric.compute().square().item() * 10_001 - 1e12
    assert total == pytest.approx(1e4 * float(np.float32(0.1)) ** 2, rel=1e-4)


@every
def test_values_that_are_not_finite_make_nan_until_reset(kind: type[Metric], distance: Distance) -> None:
    metric = fed(kind, 10)
    h, reference = data(kind)
    for wrong in (math.nan, math.inf):
        metric.update(torch.full_like(h, wrong), reference)
        metric.update(h, reference)
        assert metric.compute().isnan()
        metric.reset()
    metric.update(h, reference)
    close(metric.compute(), distance(h, reference))


@every
def test_without_samples_it_is_nan(kind: type[Metric], distance: Distance) -> None:
    metric = kind()
    for _ in range(2):
        with pytest.warns(UserWarning, match="was called before the ``update`` method"):
            value = metric.compute()
        assert value.isnan() and value.dtype == torch.float64
        metric.update(*data(kind))
        metric.reset()


@every
def test_what_cannot_be_compared_is_refused(kind: type[Metric], distance: Distance) -> None:
    with pytest.raises(ValueError, match="5 samples of one model and 6 of its reference"):
        kind().update(draw(5), draw(6))
    with pytest.raises(ValueError, match=r"\[samples, coordinates\].*flatten"):
        kind().update(draw(5)[None], draw(5)[None])


def test_shapes_are_refused_as_by_the_functions() -> None:
    for kind, message in ((RMSDistance, "needs no coupling"), (OutputDistance, "same targets")):
        with pytest.raises(ValueError, match=message):
            kind().update(draw(5, 4), draw(5, 3))


@pytest.mark.parametrize("kind", [GramDistance, CKADistance, ProcrustesDistance])
@pytest.mark.parametrize("second", [(4, 8), (2, 6), (8, 3)])
def test_batches_of_different_dimensions_are_refused(kind: type[Metric], second: tuple[int, int]) -> None:
    metric = kind()
    metric.update(draw(5, 4), draw(5, 6))
    metric(draw(5, second[0]), draw(5, second[1]))
    with pytest.raises(ValueError, match=r"streams of different dimensions, .* reset\(\) it before"):
        metric.compute()


@every
def test_a_metric_keeps_neither_what_it_was_given_nor_its_graph(kind: type[Metric], distance: Distance) -> None:
    h, reference = (values.double() for values in data(kind))
    wanted, metric = distance(h, reference), kind()
    assert not metric(h.requires_grad_(), reference).requires_grad
    assert not any(state.requires_grad for state in flat(metric))
    assert metric.is_differentiable is False and metric.higher_is_better is False
    h.detach().zero_()
    close(metric.clone().compute(), wanted)


@every
def test_copies_go_on_by_themselves(kind: type[Metric], distance: Distance) -> None:
    first, rest = split(kind, 8, 12)
    metric = kind()
    metric.update(*first)
    before = metric.compute()
    for copied in (metric.clone(), copy.deepcopy(metric), pickle.loads(pickle.dumps(metric))):
        copied.update(*rest)
        close(copied.compute(), distance(*data(kind)))
    close(metric.compute(), distance(*first))
    assert not torch.equal(before, distance(*data(kind)))


@every
def test_state_dict_carries_the_samples_if_persistent(kind: type[Metric], distance: Distance) -> None:
    *first, rest = split(kind, 8, 4, 8)
    metric, resumed, buffer = kind(), kind(), io.BytesIO()
    assert not metric.state_dict()
    metric.persistent(True)
    resumed.persistent(True)
    for batch in first:
        metric.update(*batch)
    torch.save(nn.ModuleDict({"metric": metric}).state_dict(), buffer)
    buffer.seek(0)
    nn.ModuleDict({"metric": resumed}).load_state_dict(torch.load(buffer, weights_only=True))
    resumed.update(*rest)
    close(resumed.compute(), distance(*data(kind)))


@every
def test_states_of_two_metrics_merge(kind: type[Metric], distance: Distance) -> None:
    one, other = kind(), kind()
    for metric, batch in zip((one, other), split(kind, 8, 12), strict=True):
        metric.update(*batch)
    one.merge_state(other)
    close(one.compute(), distance(*data(kind)), rtol=1e-12)


def test_collection_shares_the_samples() -> None:
    streams = [RMSDistance, GramDistance, CKADistance, ProcrustesDistance]
    collection = MetricCollection([kind() for kind in streams])
    for batch in split(GramDistance, 10, 10, 10):
        collection.update(*batch)
    shared = frozenset({"GramDistance", "CKADistance", "ProcrustesDistance"})
    assert set(map(frozenset, collection.compute_groups.values())) == {frozenset({"RMSDistance"}), shared}
    values = collection.compute()
    for kind in streams:
        close(values[kind.__name__], DISTANCES[kind](*data(GramDistance, 30)))


def test_collection_takes_outputs_by_name() -> None:
    collection = MetricCollection([GramDistance(), OutputDistance()], compute_groups=False)
    h, reference = draw(9), draw(9, seed=1)
    collection.update(streams=h, outputs=2 * h, reference=reference)
    values = collection.compute()
    close(values["GramDistance"], distances.gram_distance(h, reference))
    close(values["OutputDistance"], distances.output_distance(2 * h, reference))


CONVERSIONS: dict[str, Callable[[Metric], Any]] = {
    "half": lambda metric: metric.half(),
    "to": lambda metric: metric.to(torch.bfloat16),
    "set_dtype": lambda metric: metric.set_dtype(torch.float16),
    "parent": lambda metric: nn.ModuleList([metric]).to("cpu", torch.float32),
}


@every
@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_states_stay_float64(kind: type[Metric], distance: Distance, conversion: str) -> None:
    first, rest = split(kind, 8, 12)
    metric = kind()
    metric.update(*first)
    CONVERSIONS[conversion](metric)
    metric.update(*rest)
    kept = {torch.float64, torch.int64}
    assert {state.dtype for state in flat(metric)} <= kept and metric.dtype == torch.float64
    close(metric.compute(), distance(*data(kind)))
    metric.reset()
    assert {state.dtype for state in flat(metric)} <= kept


@pytest.mark.parametrize("kind", DISTANCES)
def test_states_move_with_the_metric(kind: type[Metric]) -> None:
    metric = fed(kind, 3, 4).to("meta")
    assert {state.device.type for state in flat(metric)} == {"meta"} == {metric.device.type}


def flat(metric: Metric) -> list[Tensor]:
    return [tensor for state in metric.metric_state.values() for tensor in (state if type(state) is list else [state])]


class Watched(LightningModule):  # logs a metric object, which Lightning computes at the end of the epoch
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.gram, self.rms = nn.Linear(4, 4), GramDistance(), RMSDistance()

    def validation_step(self, batch: list[Tensor]) -> None:
        self.gram.update(batch[0], batch[1])
        self.rms.update(batch[0], batch[1])
        self.log_dict({"gram": self.gram, "rms": self.rms})


def test_lightning_logs_them_at_low_precision() -> None:
    h, reference = (values.bfloat16() for values in data(GramDistance, 300))
    trainer = quiet(precision="bf16-true")
    trainer.validate(Watched(), DataLoader(TensorDataset(h, reference), batch_size=7), verbose=False)
    for name, distance in (("gram", distances.gram_distance), ("rms", distances.rms_distance)):
        # logged as float32
        assert trainer.callback_metrics[name].item() == pytest.approx(distance(h, reference).item(), rel=1e-6)


SHARDS = [(10, 10), (3, 17), (20, 0), (0, 0)]  # samples of rank 0 and 1, in batches of at most 4


def run_rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    warnings.simplefilter("ignore")
    found: dict[str, Tensor] = {}
    for shard in SHARDS:
        for kind in DISTANCES:
            metric, begin = kind(), shard[0] * rank
            h, reference = (values[begin : begin + shard[rank]] for values in data(kind))
            for batch in zip(h.split(4), reference.split(4), strict=True):
                if len(batch[0]):
                    metric.update(*batch)
            found[f"{kind.__name__} {shard}"] = metric.compute()
            if shard == (3, 17):  # the states are each rank's own again
                metric.update(*(values[begin : begin + 2] for values in data(kind)))
                found[f"{kind.__name__} more"] = metric.compute()
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_have_the_distance_of_all_samples(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(run_rank, (str(tmp_path),), nprocs=2, start_method="fork")
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for kind, distance in DISTANCES.items():
            for shard in SHARDS[:-1]:
                close(found[f"{kind.__name__} {shard}"], distance(*data(kind)))
            assert found[f"{kind.__name__} {SHARDS[-1]}"].isnan()
            again = (torch.cat((values, values[:2], values[3:5])) for values in data(kind))
            close(found[f"{kind.__name__} more"], distance(*again))
