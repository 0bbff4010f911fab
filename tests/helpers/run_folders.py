"""Folders of runs that were never made: logs and plans as files, and the text of their page."""

import struct
from pathlib import Path
from typing import Any

import torch
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import crc32c
from torch.utils.tensorboard import SummaryWriter

from helpers.html_pages import Page
from mlu_lightning import Plan
from mlu_lightning.models import ResNet
from mlu_lightning.reporting import RunRecord, run_page


def plan_yaml() -> str:
    module = ResNet(depth=2, hidden=8, embedding=4, inputs=3, outputs=2)
    return Plan.from_model(module, (torch.ones(4, 3), torch.ones(4, 2)), base=module).to_yaml()


def write_csv(path: Path, values: dict[int, Any], name: str = "loss") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"step,{name}\n" + "".join(f"{step},{value}\n" for step, value in values.items()))


def write_events(folder: Path, values: dict[int, float]) -> Path:
    before = set(folder.glob("*"))
    writer = SummaryWriter(str(folder), filename_suffix=f".{len(before)}")
    for step, value in values.items():
        writer.add_scalar("loss", value, step)
    writer.close()
    (path,) = set(folder.glob("*")) - before
    return path


def event(data: bytes, length: int | None = None) -> bytes:
    """A record of TensorBoard's, with checksums that are right."""
    head = struct.pack("<Q", len(data) if length is None else length)
    return head + _masked(head) + data + _masked(data)


def _masked(data: bytes) -> bytes:
    crc = crc32c(data) & 0xFFFFFFFF
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


def text_of(record: RunRecord) -> str:
    page = Page(run_page(record))
    assert page.tags.isdisjoint({"script", "b", "i"})
    shown = "".join(page.text)
    shown.encode()  # as a file has it
    return shown
