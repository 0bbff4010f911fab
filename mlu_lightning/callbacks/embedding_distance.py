"""The callback that logs how far a run is from reference runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations, permutations, product
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from mlu_lightning.callbacks._either_callback import EitherCallback
from mlu_lightning.callbacks.infinite_limit import Limit, LimitRun
from mlu_lightning.callbacks.loggers import fetch_reference, log_values, show_values
from mlu_lightning.callbacks.probe_batches import Layout, Probe
from mlu_lightning.observation import MetricName, Observation, OutputName, Reference, StreamName, compare
from mlu_lightning.observation.comparison import uncoupled, validated_metrics
from mlu_lightning.observation.reference_format import listed


class EmbeddingDistance(EitherCallback):
    """Log the distance of a run, in embedding space, from runs that :class:`ReferenceRecorder` recorded.

    At the steps of the reference, its probe is passed through the module in evaluation mode, and the residual stream and
    the outputs are compared with the recording (theory.md, section 4). Runs of all shapes in the MLU parameterization
    follow one limit, so the distance falls as both grow. The training is, bit for bit, the training without the callback.

    Values are logged under ``mlu/distance/<metric>/s=<depth>``, and ``mlu/distance/output``, at the number of optimizer
    steps made, to all loggers whatever ``log_every_n_steps`` is, and other callbacks can monitor them; NaN where the run is
    not finite. A reference that can no longer be read costs its distances, with a warning. References in a list or dict add
    their name, ``mlu/distance/gram/s=1/seed1``, and their mean distance from each other is
    ``mlu/distance/gram/s=1/floor``: no run can be expected to be nearer.

    With ``reference="limit"`` the run is compared with what it tends to as L, M and D grow: the infinite model, which is
    trained beside it on the same batches (theory.md, section 5; :mod:`mlu_lightning.limit`). This needs no other run and no
    coupling, but gradient descent and a model whose limit is known. Its name is ``limit``: ``mlu/distance/gram/s=1/limit``.

    Args:
        reference: Path of the file of a :class:`ReferenceRecorder`, or the name ``entity/project/name:version`` of a
            W&B artifact; a list of these, whose names are the last parts without extension; a dict of them by name; or
            ``"limit"``, the infinite model, or a :class:`Limit`, which says how finely that is computed.
        metrics: Some of ``"rms"`` (of h - h_ref[:D], which needs ``MLUCallback(init="coupled")`` with one seed in both
            runs, or of h - W a for the limit), ``"gram"``, ``"cka"``, ``"procrustes"`` and ``"output"``, which need no
            coupling; see :mod:`mlu_lightning.observation.distances`. By default all that can be measured: a warning says
            why one cannot, where a metric that is asked for by name is refused.

    Raises:
        ValueError: If an argument is not of these.

    Example:
        >>> import torch
        >>> from tempfile import TemporaryDirectory
        >>> from mlu_lightning.callbacks import ReferenceRecorder
        >>> from mlu_lightning.models import ResNet
        >>> data = torch.utils.data.DataLoader([(torch.ones(3), torch.ones(2))] * 8, batch_size=4)
        >>> def fit(embedding, callback):
        ...     trainer = Trainer(max_epochs=1, accelerator="cpu", logger=False, callbacks=[callback],
        ...         enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        ...     trainer.fit(ResNet(depth=4, hidden=16, embedding=embedding, inputs=3, outputs=2), data)
        ...     return trainer.callback_metrics
        >>> with TemporaryDirectory() as folder:
        ...     _ = fit(32, ReferenceRecorder(f"{folder}/large.safetensors", depths=[0, 1]))
        ...     logged = fit(8, EmbeddingDistance(f"{folder}/large.safetensors", metrics=["gram", "output"]))
        >>> sorted(name for name in logged if "distance" in name)
        ['mlu/distance/gram/s=0', 'mlu/distance/gram/s=1', 'mlu/distance/output']
    """

    def __init__(
        self, reference: str | Path | list[str] | dict[str, str] | Limit, metrics: Sequence[MetricName] | None = None
    ) -> None:
        super().__init__()
        self._limit = Limit() if reference == "limit" else reference if isinstance(reference, Limit) else None
        if isinstance(reference, Limit):
            self._sources = {"limit": "limit"}
        elif isinstance(reference, Mapping):
            self._sources = {name: str(source) for name, source in reference.items()}
        else:
            sources = [str(reference)] if isinstance(reference, (str, Path)) else [str(source) for source in reference]
            # ":" has a meaning in templates of file names
            names = [Path(source).name.removesuffix(".safetensors").replace(":", "-") for source in sources]
            self._sources = dict(zip(names, sources, strict=True))
            if len(self._sources) < len(sources):
                raise ValueError(f"reference={reference!r} has files of the same name: give a dict of them by name.")
        taken = [f"{name}/" for name in ("floor", *self._sources)]
        if len(taken) == 1 or any(two.startswith(one) or two == "/" for one, two in permutations(taken, 2)):
            raise ValueError(
                f'reference={reference!r} should be one or more references, none of them by the name "floor", which is '
                'that of their distance from each other, or by one that goes on from another\'s, as "a/b" does from "a".'
            )
        named = isinstance(reference, Mapping) or len(self._sources) > 1 or self._limit is not None
        self._suffixes = {name: f"/{name}" if named else "" for name in self._sources}
        self._asked = metrics is not None
        self._metrics = get_args(MetricName) if metrics is None else validated_metrics(metrics)
        self._measured: Sequence[MetricName] = self._metrics
        self._references: dict[str, Reference] = {}
        self._lost: set[str] = set()  # references that could not be read after the start
        self._probe: Probe | None = None
        self._limit_run: LimitRun | None = None
        self._limit_state: dict[str, Any] | None = None
        self._coupled = False
        self._due: frozenset[int] = frozenset()
        self._last = -1
        self._values: dict[str, float] = {}

    @property
    def state_key(self) -> str:
        """One callback for each choice of references can be in a Trainer."""
        return self._generate_state_key(references=self._sources)

    def state_dict(self) -> dict[str, Any]:
        """What was logged last and when, whether embeddings were found to be coupled, and the infinite model."""
        limit = self._limit_state if self._limit_run is None else self._limit_run.state_dict()
        return {"coupled": self._coupled, "last": self._last, "values": self._values, "limit": limit}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the run that is resumed was."""
        self._coupled, self._last, self._values = state_dict["coupled"], state_dict["last"], state_dict["values"]
        self._limit_state = state_dict["limit"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the run of another Trainer; a checkpoint, if there is one, is read after this."""
        if stage == "fit" and trainer.global_step == 0:
            self._coupled, self._last, self._values, self._limit_state = False, -1, {}, None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the references, pass the probe through the module, refuse what cannot be compared, and log the distance."""
        self._check_names(trainer)
        step = trainer.global_step
        show_values(trainer, self._values)
        if self._limit is not None:
            self._limit_run = LimitRun(self._limit, trainer, pl_module, self._limit_state)
            self._limit_state = None
            self._compare_with_limit(trainer, pl_module)
            return
        paths = {name: fetch_reference(trainer, source) for name, source in self._sources.items()}
        self._references = {name: Reference.load(path) for name, path in paths.items()}
        self._lost = set()
        references = list(self._references.values())
        self._due = frozenset(number for reference in references for number in reference.steps)
        _check_one_probe(references)
        if self._last < 0:
            _check_steps(trainer, pl_module, references)
        layout = Layout.of(trainer, pl_module)
        for reference in references:
            _check_layout(layout, reference)
        probe, header = references[0].probe, references[0].header
        depths = sorted({depth for reference in references for depth in reference.header.depths})
        positions = max(rows for rows, _ in header.locations.values())
        self._probe = Probe.of(trainer, pl_module, probe, header.runs, layout, depths, positions)
        with self._probe.first_pass(pl_module, _OTHER_DATA):
            observation, count = self._probe.observe_counted(trainer, pl_module)
        for reference in references:
            _check_count(count, reference.header.count, reference)
            _check_shapes(observation, reference, self._metrics)
        self._measured = self._measurable(observation, references, step)
        self._coupled |= "rms" in self._measured
        if step in self._due and step > self._last:
            self._compare(trainer, observation)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Train the infinite model on the batch."""
        if self._limit_run is not None:
            self._limit_run.learn(trainer, batch)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Update the infinite model at the learning rate of the run."""
        if self._limit_run is not None:
            self._limit_run.step(trainer, optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the distance, if a reference was recorded at this step, or the limit is looked at."""
        step = trainer.global_step
        self._compare_with_limit(trainer, pl_module)
        if step in self._due and step > self._last and self._probe is not None:
            self._compare(trainer, self._probe.observe(trainer, pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the distance from the limit after the last step."""
        if self._limit_run is not None and self._limit_run.schedule.ends_with_last:
            self._compare_with_limit(trainer, pl_module, due=True)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the probe and of the references; the infinite model stays, for a checkpoint or another fit."""
        if self._limit_run is not None:
            self._limit_state = self._limit_run.state_dict()
        self._probe = self._limit_run = None
        self._references = {}

    def _check_names(self, trainer: Trainer) -> None:
        """Refuse callbacks of which one would write over what the other logs."""

        def logged(callback: EmbeddingDistance) -> list[str]:
            suffixes = [*callback._suffixes.values()]
            if len(suffixes) > 1 or callback._limit is not None:
                suffixes.append("/floor")
            return [f"{metric}{suffix}/" for metric in callback._metrics for suffix in suffixes]

        callbacks = [callback for callback in vars(trainer)["callbacks"] if isinstance(callback, EmbeddingDistance)]
        for first, second in combinations(callbacks, 2):
            # nor may a name be the folder of another, which a logger that keeps each value in a file could not have
            if any(a.startswith(b) or b.startswith(a) for a, b in product(logged(first), logged(second))):
                raise ValueError(
                    f"Two EmbeddingDistance callbacks, of {', '.join(first._sources)} and of {', '.join(second._sources)}, "
                    "would log distances under the same names. Give them different metrics, or the references as a dict by "
                    'name, such as EmbeddingDistance({"large": "large.safetensors"}), whose names become part of those of '
                    "the values."
                )

    def _measurable(
        self, observation: Observation, references: Sequence[Reference], step: int
    ) -> tuple[MetricName, ...]:
        """Metrics that can be measured with every reference; what was asked for by name has to be one of them."""
        obstacles: dict[MetricName, tuple[str, str]] = {}
        for metric, reference in product(self._metrics, references):
            obstacle = _obstacle(metric, observation, reference, step, self._coupled)
            if obstacle is not None:
                obstacles.setdefault(metric, obstacle)
        measurable = tuple(metric for metric in self._metrics if metric not in obstacles)
        for metric, (reason, remedy) in obstacles.items():
            if self._asked or not measurable:
                raise ValueError(
                    f'"{metric}" cannot be measured: {reason}. {remedy}, or leave "{metric}" out of metrics ("gram", "cka", '
                    '"procrustes" and "output" need no coupling and compare any dimensions).'
                )
            rank_zero_warn(f'"{metric}" is left out of the distances, because {reason}.')
        return measurable

    def _compare_with_limit(self, trainer: Trainer, module: LightningModule, due: bool = False) -> None:
        step, run = trainer.global_step, self._limit_run
        if run is not None and step > self._last and (due or run.schedule.is_due(step)):
            self._log(trainer, run.distances(trainer, module, self._metrics))

    def _compare(self, trainer: Trainer, observation: Observation) -> None:
        """Log the distance of an observation at the present step from every reference that has it."""
        step = trainer.global_step
        recorded: dict[str, Observation] = {}
        for name, reference in self._references.items():
            try:
                if step in reference.steps:
                    recorded[name] = reference.read(step)
            except (OSError, ValueError) as error:
                if name not in self._lost:
                    rank_zero_warn(
                        f"The reference {name} cannot be read at step {step}, so that there is no distance from it: {error} "
                        "The training goes on, and the file is looked for again at its next steps."
                    )
                self._lost.add(name)
        values: dict[str, float] = {}
        for name, theirs in recorded.items():
            found = compare(observation, theirs, self._measured)
            values.update({f"{key}{self._suffixes[name]}": value for key, value in found.items()})
        # the smaller one first, because "rms" is of its coordinates
        pairs = combinations(sorted(recorded.values(), key=_width), 2)
        between = [compare(smaller, larger, self._measured) for smaller, larger in pairs]
        for key in dict.fromkeys(key for found in between for key in found):
            values[f"{key}/floor"] = fmean(found[key] for found in between if key in found)
        self._log(trainer, values)

    def _log(self, trainer: Trainer, values: dict[str, float]) -> None:
        self._last = trainer.global_step
        values = {f"mlu/distance/{name}": value for name, value in values.items()}
        self._values = self._values | values  # not in place: a checkpoint of the older ones may still be being written
        log_values(trainer, values)


def _width(observation: Observation) -> int:
    return max((values.shape[1] for name, values in observation.items() if isinstance(name, StreamName)), default=0)


_OTHER_DATA = (
    "A run can be compared with a reference of the same data: the same form of batches, sizes of inputs, vocabulary and "
    "outputs. Record a reference with this run's data."
)


def _check_one_probe(references: Sequence[Reference]) -> None:
    first = references[0]
    for other in references[1:]:
        if other.probe_hash != first.probe_hash or other.header.runs != first.header.runs:
            raise ValueError(
                f"{first.path} and {other.path} were recorded with different probes, so a run cannot be compared with "
                f"both. Record one of them again with ReferenceRecorder(probe={str(first.path)!r}), or use one callback "
                "for each."
            )


def _check_steps(trainer: Trainer, module: LightningModule, references: Sequence[Reference]) -> None:
    now = trainer.global_step
    last = trainer.estimated_stepping_batches if module.automatic_optimization else math.inf
    last = math.inf if last < 0 else last  # of data whose length is not known
    for reference in references:
        if not any(now <= step <= last for step in reference.steps):
            raise ValueError(
                f"{reference.path} was recorded at the steps {listed(reference.steps)}, and this run goes from {now} to "
                f"{last}, so there is no step at which they can be compared. Train longer, or record the reference at "
                "steps of this run."
            )


def _check_layout(layout: Layout, reference: Reference) -> None:
    header = reference.header
    if len(layout.depth) != len(header.depth):
        raise ValueError(
            f"The module has {len(layout.depth)} residual streams, and that of {reference.path} {len(header.depth)}: they "
            "are of different architecture. Record a reference of this architecture."
        )
    for name, sizes in layout.data_sizes.items():
        if header.data_sizes.get(name, sizes) != sizes:
            raise ValueError(
                f"{name} has {listed(sizes)} entries beside the embedding dimension in this module, and "
                f"{listed(header.data_sizes[name])} in that of {reference.path}: they are made for different data, such as "
                "another tokenizer or other classes. Record a reference with this run's data."
            )


def _check_count(count: int, recorded: int | None, reference: Reference) -> None:
    if recorded is not None and count != recorded:
        raise ValueError(
            f"This module makes {count} positions of the probe, and that of {reference.path} made {recorded}: they divide "
            "their data otherwise. Record a reference of this architecture."
        )


def _check_shapes(observation: Observation, reference: Reference, metrics: Sequence[MetricName]) -> None:
    for name in [name for name in observation if name in reference.header.locations]:
        (rows, dimension), (own_rows, own) = reference.header.locations[name], observation[name].shape
        _check_count(own_rows, rows, reference)
        if isinstance(name, OutputName) and "output" in metrics and own != dimension:
            raise ValueError(
                f"This module has {own} outputs, and that of {reference.path} {dimension}: they "
                'are made for different data. Record a reference with this run\'s data, or leave "output" out of metrics.'
            )


def _obstacle(
    metric: MetricName, observation: Observation, reference: Reference, step: int, coupled: bool
) -> tuple[str, str] | None:
    """Why a metric cannot be measured with a reference, and what would help, if it cannot."""
    kind = OutputName if metric == "output" else StreamName
    names = [name for name in observation if name in reference.header.locations and isinstance(name, kind)]
    if not names:
        what = "output" if metric == "output" else "depth of a stream"
        return (
            f"{reference.path} and this module have no {what} in common that can be read",
            "Record a reference of this architecture",
        )
    if metric != "rms":
        return None
    for name in names:
        own, dimension = observation[name].shape[1], reference.header.locations[name][1]
        if own > dimension:
            return (
                f"the stream at {name} has {own} coordinates in this run and {dimension} in {reference.path}, and it "
                "compares with the first coordinates of a larger reference",
                "Record a reference of at least this embedding dimension",
            )
    if coupled:
        return None
    if step > 0 or 0 not in reference.steps:
        at = f"{reference.path} has no recording at step 0" if step == 0 else f"this run goes on from step {step}"
        return (
            f"it needs coupled embeddings, and these are seen at step 0, but {at}",
            "Begin both runs at step 0 with EmbeddingDistance and ReferenceRecorder",
        )
    return uncoupled(observation, reference.read(0))
