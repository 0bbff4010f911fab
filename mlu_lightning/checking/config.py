"""Modules of any shape from the configuration of a LightningCLI."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import Logger

from mlu_lightning.callbacks.parameterization import MLUCallback
from mlu_lightning.shapes import Shape

__all__ = ["Configured", "read_config"]


@dataclass(frozen=True)
class Configured:
    """A LightningCLI's configuration, with the names of what makes up a shape in it.

    Args:
        content: of the file.
        keys: names in the module's arguments by axis; all of an axis grow by one factor.
        start: what each of them is at the base.
        base: the same as a shape, of the first name of each axis.

    >>> content = {"model": {"class_path": "mlu_lightning.models.ResNet", "init_args": {"inputs": 3, "outputs": 2}}}
    >>> keys = {"depth": ("depth",), "hidden": ("hidden",), "embedding": ("embedding",)}
    >>> start = {"depth": 2, "hidden": 8, "embedding": 4}
    >>> configured = Configured(content, keys, start, Shape(2, 8, 4))
    >>> len(configured.build(depth=4, hidden=8, embedding=4).blocks)
    4
    """

    content: Mapping[str, Any]
    keys: Mapping[str, tuple[str, ...]]
    start: Mapping[str, int]
    base: Shape

    def build(self, depth: int, hidden: int, embedding: int) -> LightningModule:
        """Build the module at a shape.

        Args:
            depth: of the shape; all that belongs to it grows by the same factor.
            hidden: of the shape.
            embedding: of the shape.
        """
        module: LightningModule = self._parsed(Shape(depth, hidden, embedding)).model
        return module

    def callbacks(self, _: LightningModule) -> list[Callback]:
        """Callbacks that take part in the training: all of the configuration's but Lightning's and those that watch."""
        return list(self._parsed(self.base).callbacks)

    def data(self) -> LightningDataModule | None:
        """The configuration's data; None if the module has its own."""
        data: LightningDataModule | None = self._parsed(self.base).datamodule
        return data

    def loggers(self) -> list[Logger]:
        """Loggers of the configuration, built; those that Lightning makes by itself are not among them."""
        logger = (self.content.get("trainer") or {}).get("logger")
        given = logger if isinstance(logger, list) else [logger]
        named = [one for one in given if isinstance(one, (dict, str))]
        return list(self._parsed(self.base, named).loggers) if named else []

    @property
    def trainer(self) -> dict[str, Any]:
        """Arguments of the Trainer that change how a step is made."""
        given = self.content.get("trainer") or {}
        return {name: given[name] for name in _OF_A_STEP if given.get(name) is not None}

    @property
    def has_plugin(self) -> bool:
        """Whether there is an :class:`MLUCallback`."""
        return any(_is_plugin(callback) for callback in _callbacks(self.content))

    def _parsed(self, shape: Shape, loggers: Sequence[Any] = ()) -> _Parsed:
        content: dict[str, Any] = copy.deepcopy(dict(self.content))
        arguments = content["model"].setdefault("init_args", {})
        for axis, names in self.keys.items():
            factor = getattr(shape, axis) // getattr(self.base, axis)
            arguments.update({name: self.start[name] * factor for name in names})
        kept = [callback for callback in _callbacks(content) if _takes_part(callback)]
        content["trainer"] = {"callbacks": kept, "logger": list(loggers) or False}
        content["seed_everything"] = False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the command line of this process is not parsed
            return _Parsed(save_config_callback=None, run=False, args=content)


def read_config(
    path: str | Path, keys: Mapping[str, Sequence[str]], model: str | None = None, data: str | None = None
) -> Configured:
    """Read a LightningCLI's configuration, and find the base's shape in it.

    The base is that of the configuration's :class:`MLUCallback`, where it has a ``class_path`` with ``init_args``;
    otherwise what the configuration trains is taken for it.

    Args:
        path: of the YAML file, of a command or of all of them.
        keys: names in the module's ``init_args`` that make up depth, hidden width and embedding.
        model: class of the module, for configurations that do not name it, as of ``LightningCLI(MyModule)``.
        data: class of the data, where it is not named.

    Raises:
        ValueError: if the file is not such a configuration, or does not have one of the names.
    """
    content = _content(Path(path))
    for name, given in (("model", model), ("data", data)):
        if given is not None:
            content[name] = {"class_path": given, "init_args": _arguments(content.get(name) or {})}
    if "class_path" not in (content.get("model") or {}):
        raise ValueError(
            f"{path} does not say which class its model is of, as configurations of LightningCLI(MyModule) do not. Give it: "
            "--model my_package.MyModule (and --data my_package.MyData if there is a class of data)."
        )
    if content.get("data") and "class_path" not in content["data"]:
        raise ValueError(f"{path} does not say which class its data are of. Give it: --data my_package.MyData.")
    arguments = _arguments(content["model"]) | _base_arguments(content)
    start: dict[str, int] = {}
    for axis, names in keys.items():
        for name in names:
            value = arguments.get(name)
            if type(value) is not int:
                raise ValueError(
                    f"The model of {path} has no argument {name!r} that is a whole number, to be its {axis}. Its arguments "
                    f"are {', '.join(arguments) or 'none'}; name those that make it up, as in --{axis} "
                    f"{','.join(list(arguments)[:2]) or 'width,heads'}, or leave the {axis} as it is with --{axis} null."
                )
            start[name] = value
    first = {axis: start[names[0]] if names else 1 for axis, names in keys.items()}
    return Configured(content, {axis: tuple(names) for axis, names in keys.items()}, start, Shape(**first))


_OF_A_STEP = (
    "accelerator",
    "accumulate_grad_batches",
    "deterministic",
    "gradient_clip_algorithm",
    "gradient_clip_val",
    "precision",
)


class _Parsed(LightningCLI):
    """A configuration whose module, data and callbacks are built, and no Trainer."""

    callbacks: Sequence[Callback] = ()
    loggers: Sequence[Logger] = ()

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Keep callbacks and loggers."""
        trainer = self.config_init["trainer"]
        self.callbacks, self.loggers = trainer["callbacks"] or [], trainer["logger"] or []


def _content(path: Path) -> dict[str, Any]:
    """The configuration of ``fit``, whether the file is of this command or of all."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read as a configuration: {error}") from error
    if isinstance(content, dict) and isinstance(content.get("fit"), dict):
        content = content["fit"]
    if not isinstance(content, dict) or not ({"model", "trainer", "data"} & content.keys()):
        raise ValueError(
            f"{path} is not the configuration of a LightningCLI: it has no model. Give that of a training."
        )
    return {name: value for name, value in content.items() if name not in ("ckpt_path", "config", "weights_only")}


def _arguments(section: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a class, with or without its name beside them."""
    if "class_path" in section:
        return dict(section.get("init_args") or {})
    return dict(section)


def _callbacks(content: Mapping[str, Any]) -> list[Any]:
    callbacks = (content.get("trainer") or {}).get("callbacks") or []
    return callbacks if isinstance(callbacks, list) else [callbacks]


def _is_plugin(callback: Any) -> bool:
    return _class_of(callback).rpartition(".")[2] == MLUCallback.__name__


def _takes_part(callback: Any) -> bool:
    """Whether a callback may change the training; Lightning's write files and stop, and others of this package watch."""
    watches = _class_of(callback).startswith(("lightning.", "mlu_lightning."))
    return _is_plugin(callback) or not (watches or "." not in _class_of(callback))


def _class_of(callback: Any) -> str:
    return str(callback.get("class_path", "") if isinstance(callback, dict) else callback)


def _base_arguments(content: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the base, where the plugin is told how to build it."""
    for callback in _callbacks(content):
        if _is_plugin(callback) and isinstance(callback, dict):
            base = (callback.get("init_args") or {}).get("base")
            if isinstance(base, dict):
                return _arguments(base)
    return {}
