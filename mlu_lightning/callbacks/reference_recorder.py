"""The callback that records a run, so that runs of other shapes can be compared with it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from mlu_lightning.callbacks._either_callback import EitherCallback
from mlu_lightning.callbacks.loggers import log_reference
from mlu_lightning.callbacks.probe_batches import Layout, Probe, check_arguments, cut_probe, given_probe, on_rank_zero
from mlu_lightning.callbacks.run_name import is_restarted, name_run
from mlu_lightning.observation import Observation, Reference
from mlu_lightning.observation.reference_format import ReferenceHeader, RunName, is_reference, read_reference
from mlu_lightning.observation.reference_writer import ReferenceWriter
from mlu_lightning.observation.schedule import Schedule, Steps
from mlu_lightning.utilities.lightning_steps import StepName
from mlu_lightning.utilities.locks import WriterLock


class ReferenceRecorder(EitherCallback):
    """Record the residual stream and the outputs of a run on a probe batch, for :class:`EmbeddingDistance` in others.

    At chosen steps the probe is passed through the module in evaluation mode, and the stream at relative depths and the
    outputs go into a file, with the training loss of every step, the plan, the shape and the probe itself (theory.md,
    section 4). The training is, bit for bit, the training without the recorder. The file is whole at every moment: a run
    that is killed leaves a reference up to its last recorded step, and one that is resumed with ``fit(ckpt_path=...)`` goes
    on in it; its size is in :mod:`mlu_lightning.observation.reference`. A run that was killed before its first checkpoint
    and begins again is known by its settings, initial weights and seed (or the job that Slurm or torchrun restarts), and its
    file written anew; that of another run stays. While one process writes, a lock keeps others away. A plan of
    :class:`MLUCallback` tells where the stream is; without, it is discovered.

    Args:
        path: Path of the file to be written; there must be none yet, unless the run is resumed or begins again.
        probe: Batch as ``validation_step``, or else ``training_step``, takes it, or the path of a safetensors file with one
            or of another reference. By default the first samples of the validation data, or else of the training data.
        steps: Optimizer steps to record after: ``"log"`` for 0, 1, 2, 4, 8, ... and the last one, n for every n, or a list.
        depths: Relative depths s of the stream: 0 is the embedding, 1 is behind the last residual addition.
        positions: Rows (samples, times tokens or pixels) to keep, evenly spaced; of the probe as many samples as have these.
        dtype: Type of values in the file, ``"float32"`` or ``"bfloat16"``.
        overwrite: Whether a run that begins may write over any file that is there.
        upload: Whether the file becomes an artifact of a ``WandbLogger`` when training ends.

    Raises:
        ValueError: If an argument is not of these.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from mlu_lightning.models import ResNet
        >>> model = ResNet(depth=4, hidden=16, embedding=8, inputs=3, outputs=2)
        >>> data = torch.utils.data.DataLoader([(torch.ones(3), torch.ones(2))] * 8, batch_size=4)
        >>> with TemporaryDirectory() as folder:
        ...     recorder = ReferenceRecorder(f"{folder}/reference.safetensors")
        ...     trainer = Trainer(max_epochs=2, accelerator="cpu", barebones=True, callbacks=[recorder])
        ...     trainer.fit(model, data)
        ...     Reference.load(recorder.path).steps
        (0, 1, 2, 4)
    """

    def __init__(
        self,
        path: str | Path,
        probe: Any = None,
        steps: Steps = "log",
        depths: Sequence[float] = (0, 0.25, 0.5, 0.75, 1),
        positions: int = 128,
        dtype: Literal["float32", "bfloat16"] = "float32",
        overwrite: bool = False,
        upload: bool = True,
    ) -> None:
        super().__init__()
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype={dtype!r} is none of: 'float32', 'bfloat16'.")
        self.path = Path(path)
        self._given = probe
        self._schedule = Schedule(steps)
        self._depths = check_arguments(depths, positions, fewest=1)
        self._positions = positions
        self._dtype = dtype
        self._overwrite, self._upload = overwrite, upload
        self._probe: Probe | None = None
        self._writer: ReferenceWriter | None = None
        self._lock: WriterLock | None = None
        self._saved = False  # whether there is a checkpoint that the file does not tell of
        self._name: RunName | None = None  # of the run in the checkpoint that it goes on from
        self._losses = _Losses(torch.empty(0))
        self._carried = torch.empty(0)  # losses in the checkpoint that the run goes on from
        self._last = -1
        self._failed = False

    @property
    def state_key(self) -> str:
        """One recorder for each file can be in a Trainer."""
        return self._generate_state_key(path=str(self.path))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put losses into the checkpoint, also those since the last recording, and the run's name; every process has to."""
        name = None if self._name is None else asdict(self._name)
        checkpoint["callbacks"][self.state_key] = {"losses": self._losses.all(trainer), "run": name}
        self._saved = trainer.global_step > 0

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the losses and the name of the run that is resumed."""
        self._carried = state_dict["losses"]
        name = state_dict.get("run")
        self._name = None if name is None else RunName(**name)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the probe once, open the file, and record the step if it is due."""
        step = trainer.global_step
        batch, name = on_rank_zero(trainer, lambda: self._find_probe(trainer, pl_module))
        layout = Layout.of(trainer, pl_module)
        probe = Probe.of(trainer, pl_module, batch, name, layout, self._depths, self._positions)
        self._probe, batch, count, observation = cut_probe(trainer, pl_module, probe, batch, "ReferenceRecorder")
        header = ReferenceHeader(
            depth=layout.depth,
            embedding=layout.embedding,
            hidden=layout.hidden,
            depths=self._depths,
            locations={name: (values.shape[0], values.shape[1]) for name, values in observation.items()},
            runs=name,
            data_sizes=layout.data_sizes,
            plan=None if layout.plan is None else layout.plan.to_yaml(),
            dtype=self._dtype,
            count=count,
        )

        def open_file() -> tuple[int, Tensor]:
            if vars(trainer)["fast_dev_run"]:
                return -1, torch.empty(0)  # it leaves no files
            self._lock_file()
            if step == 0:
                self._name = name_run(trainer, pl_module, layout.plan, header, batch)
            self._writer = self._open(header, batch, step, self._name)
            return (self._writer.steps or (-1,))[-1], self._writer.losses

        self._last, losses = on_rank_zero(trainer, open_file)
        self._losses = _Losses(_either(losses, self._carried, step), step, pl_module.device)
        self._carried = torch.empty(0)
        self._failed = self._saved = False
        if step > self._last and self._schedule.is_due(step):
            self._record(trainer, step, observation)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the loss, and record the step if it is due."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if not isinstance(loss, Tensor) or loss.ndim > 0:  # manual optimization may return anything
            loss = torch.as_tensor(math.nan if loss is None else loss, device=pl_module.device).float().mean()
        if trainer.accumulate_grad_batches > 1 and pl_module.automatic_optimization:
            loss = loss * trainer.accumulate_grad_batches  # the Trainer has divided it
        self._losses.add(trainer, loss.detach(), trainer.global_step)
        due = self._schedule.is_due(trainer.global_step)
        if self._saved:
            self._keep(trainer, due)
        if due:
            self._look(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the last step, and log the file as an artifact where there is a place for it."""
        self._losses.all(trainer)
        self._keep(trainer, self._schedule.ends_with_last)
        if self._schedule.ends_with_last:
            self._look(trainer, pl_module)
        if self._upload and trainer.is_global_zero and self.path.exists():
            log_reference(trainer.loggers, self.path)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the recordings, which are in the file, and let others write there."""
        self._probe = self._writer = None
        self._unlock()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let others write there."""
        self._unlock()

    def _find_probe(self, trainer: Trainer, module: LightningModule) -> tuple[Any, StepName]:
        """The probe, as it will be read from the file, and the step that takes it."""
        if self._given is None and trainer.global_step > 0 and self.path.exists():
            existing = Reference.load(self.path)
            return existing.probe, existing.header.runs
        return given_probe(trainer, module, self._given, self._positions)

    def _lock_file(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.is_dir() or not os.access(self.path.parent, os.W_OK):
            raise OSError(
                f"{self.path} cannot be written: it is a folder, or is in one that is not writable. Give "
                "ReferenceRecorder the path of a file."
            )
        if self._lock is None:  # else of a fit whose end no callback heard of
            self._lock = WriterLock(self.path)

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _open(self, header: ReferenceHeader, probe: Any, step: int, name: RunName | None) -> ReferenceWriter:
        if step > 0 and self.path.exists():
            return ReferenceWriter.resume(self.path, header, probe, step, name)
        if step > 0:
            rank_zero_warn(
                f"The run goes on from step {step}, and there is no {self.path} with what was recorded before: the "
                "reference begins here."
            )
        elif name is not None and self.path.exists() and not self._overwrite:
            self._check_restarted(name)
        return ReferenceWriter(self.path, header, probe, name or RunName({}, kept=True))

    def _check_restarted(self, name: RunName) -> None:
        """Refuse to write over the file of another run, or of one that need not begin again."""
        found = read_reference(self.path, lambda file: file.run) if is_reference(self.path) else RunName({})
        if not is_restarted(found, name):
            others = found.differences(name)
            why = f": it is of another run, with other {', '.join(others)}" if found.parts and others else ""
            raise FileExistsError(
                f"{self.path} exists, and a new run would overwrite it{why}. Delete it, give ReferenceRecorder another "
                "path or overwrite=True, or resume its run with trainer.fit(ckpt_path=...)."
            )
        rank_zero_info(f"The run of {self.path} begins again, before it had a checkpoint, so the file is written anew.")
        if found.parts != name.parts:
            self.path.unlink()  # what it holds is not of the weights that are there now

    def _look(self, trainer: Trainer, module: LightningModule) -> None:
        step = trainer.global_step
        if self._probe is not None and step > self._last:
            self._record(trainer, step, self._probe.observe(trainer, module))

    def _record(self, trainer: Trainer, step: int, observation: Observation) -> None:
        """Write a step; a disk that is full does not end the training."""
        self._last = step
        losses = self._losses.all(trainer)
        if self._writer is None:  # in another process than the first, or with fast_dev_run
            return
        writer = self._writer
        self._try(lambda: writer.write(step, observation, losses), step)

    def _keep(self, trainer: Trainer, due: bool) -> None:
        """Note that there is a checkpoint, or that the run has ended, in the file at once, or in what is due."""
        self._saved = False
        if self._writer is not None and self._writer.keep() and not (due and trainer.global_step > self._last):
            self._try(self._writer.rewrite, self._last)

    def _try(self, write: Callable[[], None], step: int) -> None:
        try:
            write()
        except OSError as error:
            if not self._failed:
                rank_zero_warn(
                    f"The reference {self.path} could not be written at step {step}: {error}. The training goes on; the "
                    "file is as it was before, and each further recording tries to write all of them again."
                )
            self._failed = True


class _Losses:
    """Training loss of every optimizer step: the mean over its batches and over processes.

    They share one buffer, because tensors that stay would keep the next steps from reusing their memory.
    """

    def __init__(self, known: Tensor, step: int = 0, device: torch.device | None = None) -> None:
        self._known = known
        self._steps = step
        # float32 whatever the precision of the run: the mean of many batches, and a NaN for none, among them
        self._pending = torch.empty(_MOST_PENDING + 1, dtype=torch.float32, device=device)
        self._repeats: list[int] = []  # how many steps each of them is the loss of
        self._batches = 0  # that are added up behind the last of them

    def add(self, trainer: Trainer, loss: Tensor, step: int) -> None:
        """Add the loss of a batch, after which so many optimizer steps had been made."""
        place = len(self._repeats)
        if self._batches == 0:
            self._pending[place] = loss  # all that is done where a step has one batch
        else:
            self._pending[place] += loss.to(self._pending.device, non_blocking=True)
        self._batches += 1
        if step > self._steps:
            if self._batches > 1:
                self._pending[place] /= self._batches
            self._repeats.append(step - self._steps)
            self._batches, self._steps = 0, step
        if len(self._repeats) >= _MOST_PENDING:
            self.all(trainer)

    def all(self, trainer: Trainer) -> Tensor:
        """Losses [steps] so far, on the CPU; every process has to ask."""
        if count := len(self._repeats):
            pending = trainer.strategy.reduce(self._pending[:count], reduce_op="mean")
            steps = torch.as_tensor(pending).cpu().repeat_interleave(torch.tensor(self._repeats))
            self._known = torch.cat((self._known, steps))
            self._pending[0] = self._pending[count]
            self._repeats = []
        return self._known


def _either(one: Tensor, other: Tensor, steps: int) -> Tensor:
    one, other = (F.pad(known[:steps], (0, steps - len(known[:steps])), value=math.nan) for known in (one, other))
    return torch.where(one.isnan(), other, one)


_MOST_PENDING = 1000  # losses that wait on the device, so that the host need not wait for each
