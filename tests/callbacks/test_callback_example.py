"""The batch that MLUCallback plans with: the one that training_step would get, taken without a trace."""

import random
import warnings
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, cycle, islice, repeat
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.plugins.precision import DoublePrecision
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, get_worker_info

from mlu_lightning.callbacks.example import find_example


def drawn() -> tuple[float, float, float]:
    return torch.rand(()).item(), np.random.rand(), random.random()


class Numbers(Dataset[Any]):  # sample i is (i, a random number); not to be read in a worker
    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[Tensor, float]:
        assert get_worker_info() is None
        return torch.tensor(float(index)), sum(drawn())


class Once(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Tensor:
        raise AssertionError("must not be read")


class Batches:  # a loader that is none of torch's
    def __iter__(self) -> Iterator[Any]:
        return iter([{"x": torch.ones(2), "text": ["one", "two"]}, {}])

    def __len__(self) -> int:
        return 2


class Slice(IterableDataset[Any]):  # the first items of what is behind it, which may go on where it was left
    def __init__(self, behind: Iterable[Any], length: int = 4) -> None:
        self.behind, self.length = behind, length

    def __iter__(self) -> Iterator[Any]:
        return islice(self.behind, self.length)


def draws(draw: Callable[[], Any]) -> Iterator[Any]:
    while True:
        yield draw()


class Finds(LightningModule):  # looks for an example in setup, and keeps the batch that training_step is given
    def __init__(self, example_input_array: Any = None) -> None:
        super().__init__()
        self.weight, self.example_input_array = nn.Parameter(torch.ones(1)), example_input_array

    def setup(self, stage: str) -> None:
        self.found = find_example(self.trainer, self)

    def training_step(self, batch: Any) -> Tensor:
        self.given = batch
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.SGD:
        return torch.optim.SGD(self.parameters())


def fit(module: LightningModule, data: Any = None, batches: float = 1.0, **settings: Any) -> None:
    trainer = Trainer(accelerator="cpu", barebones=True, max_steps=1, limit_train_batches=batches, **settings)
    trainer.fit(module, data)


LOADERS: dict[str, Callable[[], Any]] = {
    "batches": lambda: DataLoader(Numbers(), batch_size=4),
    "smaller-than-a-batch": lambda: DataLoader(Numbers(), batch_size=40),
    "own-collation": lambda: DataLoader(Numbers(), batch_size=4, collate_fn=lambda samples: samples[-1]),
    "samples": lambda: DataLoader(Numbers(), batch_size=None),
    "batch-sampler": lambda: DataLoader(Numbers(), batch_sampler=BatchSampler(range(10), 3, drop_last=True)),
    "stream": lambda: DataLoader(Slice(torch.arange(10.0)), batch_size=3),
    "stream-of-samples": lambda: DataLoader(Slice(torch.arange(10.0)), batch_size=None),
    "mapping": lambda: {
        "a": DataLoader(Numbers(), batch_size=2),
        "b": DataLoader(Slice(torch.arange(10.0)), batch_size=3),
    },
    "sequence": lambda: [DataLoader(Numbers(), batch_size=2), DataLoader(Slice(torch.arange(10.0)), batch_size=3)],
    "combined": lambda: CombinedLoader({"a": DataLoader(Numbers(), batch_size=2), "b": [Batches()]}, "min_size"),
    "other": Batches,
}


@pytest.mark.parametrize("loaders", LOADERS.values(), ids=LOADERS)
def test_example_is_what_training_step_is_given(loaders: Callable[[], Any]) -> None:
    module = Finds()
    fit(module, loaders())
    found, structure = tree_flatten(module.found)
    given, expected = tree_flatten(module.given)
    assert structure == expected and found
    for one, other in zip(found, given, strict=True):
        # samples hold random numbers, which are of another time
        assert type(one) is type(other)
        assert not isinstance(one, Tensor) or (one.shape == other.shape and one.dtype == other.dtype)


class Hooked(Finds):  # changes its batches on the way
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return {"images": batch}

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return {**batch, "labels": 2 * batch["images"][0]}


def test_hooks_of_the_module_change_the_example() -> None:
    module = Hooked()
    fit(module, DataLoader(Numbers(), batch_size=2))
    assert module.found.keys() == {"images", "labels"}
    assert torch.equal(module.found["labels"], torch.tensor([0.0, 2.0]))


class Data(LightningDataModule):  # builds its data in setup, and changes its batches
    def setup(self, stage: str) -> None:
        self.dataset = Numbers()

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.dataset, batch_size=2)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [-batch[0]]


class Loads(Finds):  # has its data itself
    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Numbers(), batch_size=2)


@pytest.mark.parametrize(("make", "data", "sample"), [(Finds, Data, -1.0), (Loads, lambda: None, 1.0)])
def test_example_from_a_datamodule_or_the_module(make: type[Finds], data: Callable[[], Any], sample: float) -> None:
    module = make()
    fit(module, data())
    assert torch.equal(module.found[0], torch.tensor([0.0, sample]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batch_has_the_precision_of_the_module(dtype: torch.dtype) -> None:
    """In setup the module is not converted yet, except where it is built in that precision."""
    module = Finds().to(dtype)
    fit(module, DataLoader(Slice(torch.arange(10.0)), batch_size=2), plugins=DoublePrecision())
    assert module.found.dtype == dtype


def seed_all() -> None:
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)


def test_random_states_samplers_and_workers_are_left_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    loaders = DataLoader(Numbers(), batch_size=4, shuffle=True, generator=generator, num_workers=2)
    module = Finds()
    seed_all()
    fit(module, loaders, batches=0)
    assert torch.equal(module.found[0], torch.arange(4.0))
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(0).get_state())
    after = drawn()
    seed_all()
    assert after == drawn()


NOT_TWICE: dict[str, tuple[Callable[[], Any], str]] = {
    "generator": (lambda: (torch.ones(2) for _ in range(3)), "from a generator, which gives them only once"),
    "one-stream": (lambda: DataLoader(Once(), batch_size=2), "from a Once, which gives them only once"),
    "names": (lambda: DataLoader({"a": 1.0, "b": 2.0}, sampler=["a", "b"]), "dict has no samples numbered from 0"),
    "nothing": (lambda: DataLoader(Slice(()), batch_size=2), "Slice has no samples"),
    "no-batches": (lambda: [Slice(())], "Slice has no batches"),
}


@pytest.mark.parametrize(("loaders", "message"), NOT_TWICE.values(), ids=NOT_TWICE)
def test_without_a_batch_the_example_input_array_serves(loaders: Callable[[], Any], message: str) -> None:
    module = Finds(torch.ones(1, 3))
    fit(module, loaders(), batches=0)
    assert module.found is None
    with pytest.raises(ValueError, match=rf"no example to run it on: .*{message}. Give MLUCallback\(example=\.\.\.\)"):
        fit(Finds(), loaders(), batches=0)


def find(loaders: Any) -> tuple[Any, list[str]]:
    module = Finds()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(module, loaders, batches=0)
    return module.found, [str(one.message) for one in caught if "gave other data" in str(one.message)]


OWN = np.random.default_rng(0)
GOES_ON: dict[str, Callable[[], Any]] = {
    "batches": lambda: [Slice(cycle([torch.zeros(1), torch.ones(1)]), 3)],
    "arrays": lambda: [Slice(cycle([np.zeros(1), np.ones(1)]))],
    "samples": lambda: DataLoader(Slice(cycle([0.0, 1.0, 2.0])), batch_size=2),
    "text": lambda: DataLoader(Slice(cycle(["one", "two", "three"])), batch_size=2),
    "sizes": lambda: [Slice(chain([torch.ones(1)], repeat(torch.ones(2))))],
    "kinds": lambda: [Slice(chain([torch.ones(1)], repeat(np.ones(1))))],
    "to-an-end": lambda: [Slice(iter([torch.ones(1)]))],
    "draws": lambda: DataLoader(Slice(draws(OWN.random)), batch_size=2),
}


@pytest.mark.parametrize("loaders", GOES_ON.values(), ids=GOES_ON)
def test_data_that_go_on_where_they_were_left(loaders: Callable[[], Any]) -> None:
    found, warned = find(loaders())
    assert len(found) > 0
    (text,) = warned
    assert "Slice gave other data" in text and "MLUCallback(example=...)" in text


STARTS_ANEW: dict[str, Callable[[], Any]] = {
    "batches": lambda: [Slice([torch.zeros(1), torch.ones(1)])],
    "missing-values": lambda: [Slice([(torch.tensor([1.0, torch.nan]), np.array([np.nan, 1.0]), float("nan"))])],
    "drawn-by-torch": lambda: [Slice(draws(lambda: torch.rand(2)))],
    "drawn-by-numpy": lambda: DataLoader(Slice(draws(lambda: np.random.rand(3))), batch_size=2),
    "sparse": lambda: [Slice([torch.eye(2).to_sparse()])],
    "other-objects": lambda: [Slice(draws(object))],
}


@pytest.mark.parametrize("loaders", STARTS_ANEW.values(), ids=STARTS_ANEW)
def test_data_that_start_anew_are_left_alone(loaders: Callable[[], Any]) -> None:
    found, warned = find(loaders())
    assert found is not None and not warned
