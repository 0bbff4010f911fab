"""The callback that logs how far the features of a run have moved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from mlu_lightning.callbacks._either_callback import EitherCallback
from mlu_lightning.callbacks.loggers import log_values, show_values
from mlu_lightning.callbacks.probe_batches import Layout, Probe, check_arguments, cut_probe, given_probe, on_rank_zero
from mlu_lightning.observation import Observation, feature_updates, locate_features
from mlu_lightning.observation.batches import decode_batch, encode_batch
from mlu_lightning.observation.locations import parse_location_name
from mlu_lightning.observation.schedule import Schedule, Steps
from mlu_lightning.utilities.lightning_steps import StepName


class FeatureUpdate(EitherCallback):
    """Log how far pre-activations of every branch, the residual stream and the outputs have moved since the first step.

    At chosen steps a probe batch is passed through the module in evaluation mode. Logged are root mean squares of the
    change, of up to 32 rows and 256 units of each branch: ``mlu/update/mlp/<branch>``, ``mlu/update/convolution/<branch>``
    (what enters the nonlinearity) and ``mlu/update/attention/<branch>`` (logits), of all branches of a kind,
    ``mlu/update/all/mlp``, of ``mlu/update/stream/s=0.5`` and ``mlu/update/output``. In the MLU parameterization they are
    Θ(1) at every shape (theory.md, section 1): the same curves for a small and a large run. The training is, bit for bit,
    the training without the callback; a plan of :class:`MLUCallback` tells what to read. Experts, whose tokens change
    places, are left out. A resumed run goes on with the probe of its first step.

    Args:
        probe: Batch as ``validation_step``, or else ``training_step``, takes it, or the path of a safetensors file with one
            or of a reference. By default the first samples of the validation data, or else of the training data.
        steps: Optimizer steps to look after: ``"log"`` for 1, 2, 4, 8, ... and the last one, n for every n, or a list.
        depths: Relative depths s of the stream: 0 is the embedding, 1 is behind the last residual addition.
        positions: Rows of the stream and of outputs (samples, times tokens or pixels) to keep.

    Raises:
        ValueError: If an argument is not of these.

    Example:
        >>> import torch
        >>> from mlu_lightning.models import ResNet
        >>> model = ResNet(depth=2, hidden=16, embedding=8, inputs=3, outputs=2)
        >>> data = torch.utils.data.DataLoader([(torch.ones(3), torch.ones(2))] * 8, batch_size=4)
        >>> trainer = Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        ...     enable_progress_bar=False, enable_model_summary=False, callbacks=[FeatureUpdate()])
        >>> trainer.fit(model, data)
        >>> [name for name in trainer.logged_metrics if "mlp" in name]
        ['mlu/update/mlp/blocks.0', 'mlu/update/mlp/blocks.1', 'mlu/update/all/mlp']
    """

    def __init__(
        self,
        probe: Any = None,
        steps: Steps = "log",
        depths: Sequence[float] = (0, 0.25, 0.5, 0.75, 1),
        positions: int = 128,
    ) -> None:
        super().__init__()
        self._given = probe
        self._schedule = Schedule(steps)
        self._depths = check_arguments(depths, positions)
        self._positions = positions
        self._probe: Probe | None = None
        self._batch: tuple[Any, dict[str, Tensor], StepName] | None = None
        self._start: Observation = {}
        self._last = -1
        self._values: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        """The probe, what was observed at the first step and logged last: a resumed run is as the uninterrupted one."""
        start = {str(name): values for name, values in self._start.items()}
        return {"probe": self._batch, "start": start, "last": self._last, "values": self._values}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the run that is resumed was."""
        self._start = {parse_location_name(name): values for name, values in state_dict["start"].items()}
        self._batch, self._last, self._values = state_dict["probe"], state_dict["last"], state_dict["values"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the run of another Trainer; a checkpoint, if there is one, is read after this."""
        if stage == "fit" and trainer.global_step == 0:
            self._batch, self._start, self._last, self._values = None, {}, -1, {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the probe, and keep what is seen if it is the first step."""
        show_values(trainer, self._values)
        batch, step = on_rank_zero(trainer, lambda: self._find_probe(trainer, pl_module))
        layout = Layout.of(trainer, pl_module)
        features = locate_features(layout.features, layout.branches)
        probe = Probe.of(trainer, pl_module, batch, step, layout, self._depths, self._positions, features)
        self._probe, batch, _, observed = cut_probe(trainer, pl_module, probe, batch, "FeatureUpdate")
        self._batch = (*encode_batch(batch), step)
        if trainer.global_step == 0:
            self._start, self._last = observed, 0
        elif not self._start:
            rank_zero_warn(
                f"The run goes on from step {trainer.global_step}, and its checkpoint has no FeatureUpdate: what is logged "
                "is how far features have moved since this step."
            )
            self._start, self._last = observed, trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log how far features have moved, if the step is due."""
        if trainer.global_step > self._last and self._schedule.is_due(trainer.global_step):
            self._log_updates(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log how far they have moved after the last step."""
        if self._schedule.ends_with_last and trainer.global_step > self._last:
            self._log_updates(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the probe."""
        self._probe = None

    def _find_probe(self, trainer: Trainer, module: LightningModule) -> tuple[Any, StepName]:
        """The probe, that of the first step in a run that is resumed, and the step that takes it."""
        if trainer.global_step == 0 or self._batch is None:
            return given_probe(trainer, module, self._given, self._positions)
        return decode_batch(*self._batch[:2]), self._batch[2]

    def _log_updates(self, trainer: Trainer, module: LightningModule) -> None:
        if self._probe is not None:
            self._last = trainer.global_step
            updates = feature_updates(self._start, self._probe.observe(trainer, module))
            self._values = {f"mlu/update/{name}": value for name, value in updates.items()}
            log_values(trainer, self._values)
