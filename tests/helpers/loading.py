"""Every way in which people load a checkpoint, run here or in another process.

Nothing but torch and Lightning is imported, because there the package is not to be had at first.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

TOKENS = torch.arange(12).reshape(3, 4) % 7


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.read, self.write = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, stream: Tensor) -> Tensor:
        return self.write(torch.relu(self.read(stream)))


class Net(nn.Module):
    def __init__(self, depth: int, width: int, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 7, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        stream = self.embed(tokens)
        for block in self.blocks:
            stream = stream + block(stream)
        return self.head(stream)


class Lit(LightningModule):
    def __init__(self, depth: int = 6, width: int = 12, tied: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = Net(depth, width, tied)

    def training_step(self, tokens: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.net(tokens).flatten(0, 1), tokens.flatten())

    def validation_step(self, tokens: Tensor) -> None: ...

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.02)


def data() -> DataLoader[Any]:
    return DataLoader(TOKENS, batch_size=3)


def outputs(module: Any) -> Tensor:
    return getattr(module, "net", module)(TOKENS).detach()


def trainer(*callbacks: Any, **settings: Any) -> Trainer:
    names = "logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"
    return Trainer(max_epochs=2, accelerator="cpu", callbacks=[*callbacks], **dict.fromkeys(names, False), **settings)


def _state(path: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return state


def _loaded(module: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    module.load_state_dict(state)
    return module


def _validated(tied: bool, path: Path, *callbacks: Any) -> nn.Module:
    trainer(*callbacks).validate(module := Lit(tied=tied), data(), ckpt_path=path, verbose=False)
    return module


def _resumed(tied: bool, path: Path, *callbacks: Any) -> nn.Module:
    """At the end of the run that is resumed, so that the weights stay."""
    trainer(*callbacks).fit(module := Lit(tied=tied), data(), ckpt_path=path)
    return module


# without the package: the function that was trained, or an error
PLAIN: dict[str, Callable[[Path, bool], Any]] = {
    "load_from_checkpoint": lambda path, tied: Lit.load_from_checkpoint(path),
    "load_state_dict": lambda path, tied: _loaded(Lit(tied=tied), _state(path)),
    "inside of another": lambda path, tied: _loaded(
        nn.ModuleDict({"lit": Lit(tied=tied)}), {f"lit.{name}": value for name, value in _state(path).items()}
    )["lit"],
    "a part": lambda path, tied: _loaded(
        Net(6, 12, tied), torch.load(path.with_suffix(".part"), weights_only=True)["state_dict"]
    ),
    "validate": lambda path, tied: _validated(tied, path),
    "fit": lambda path, tied: _resumed(tied, path),
}


def _restored(module: Lit, path: Path) -> Lit:
    from mlu_lightning import restore_multipliers

    restore_multipliers(module, path)
    return module


def _callback(path: Path) -> Any:
    from mlu_lightning import MLUCallback

    base = Lit(depth=2, width=4, tied="tied" in path.name)
    return MLUCallback(base, residual="hook" if "hook" in path.name else "fold")


# with it: the function that was trained
OURS: dict[str, Callable[[Path, bool], Any]] = {
    "restored": lambda path, tied: _restored(Lit(tied=tied), path),
    "restored, of its hyperparameters": lambda path, tied: _restored(
        Lit.load_from_checkpoint(path, strict=False), path
    ),
    "validate with the callback": lambda path, tied: _validated(tied, path, _callback(path)),
    "fit with the callback": lambda path, tied: _resumed(tied, path, _callback(path)),
}


def load_all(folder: Path, ways: dict[str, Any]) -> dict[tuple[str, str], Tensor | str]:
    """Outputs of each checkpoint in a folder, loaded in each way, or what was raised."""
    found: dict[tuple[str, str], Tensor | str] = {}
    for path in sorted(folder.glob("*.ckpt")):
        for name, way in ways.items():
            try:
                found[path.stem, name] = outputs(way(path, "tied" in path.name))
            except (RuntimeError, ValueError) as error:
                found[path.stem, name] = f"{type(error).__name__}: {error}"
    return found


def load_without_and_with_the_package(folder: Path) -> None:
    sys.modules["mlu_lightning"] = None  # type: ignore[assignment]  # importing it is an ImportError
    without = load_all(folder, PLAIN)
    del sys.modules["mlu_lightning"]
    torch.save((without, load_all(folder, {**PLAIN, **OURS})), folder / "found.pt")
