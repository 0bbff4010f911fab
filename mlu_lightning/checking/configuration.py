"""Build modules of any shape, data, callbacks and loggers from a LightningCLI configuration."""

from __future__ import annotations

import copy
import inspect
import warnings
from argparse import ArgumentError
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from reprlib import repr as _shown
from typing import Any, TypeVar

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger

from mlu_lightning.callbacks.mlu_callback import MLUCallback
from mlu_lightning.planning.arguments import ABSOLUTE
from mlu_lightning.shapes.error_bound import Shape
from mlu_lightning.utilities.config_files import load_config


@dataclass(frozen=True)
class Configured:
    """A LightningCLI's configuration, with the names of the model's arguments that make up its shape."""

    content: Mapping[str, Any]
    keys: Mapping[str, tuple[str, ...]]  # names by axis; all of an axis grow by one factor
    options: Mapping[str, int]  # whole-number arguments at the base, dotted where they are arguments of an argument
    notes: tuple[str, ...] = ()  # about what the check does not take from the configuration as it stands

    def build(self, depth: int, hidden: int, embedding: int) -> LightningModule:
        """Build the module at a shape."""
        module: LightningModule = self._parsed(Shape(depth, hidden, embedding)).model
        return module

    def callbacks(self, _: LightningModule) -> list[Callback]:
        """Build the callbacks that take part in the training: all but Lightning's and those that watch."""
        return list(self._parsed(self.base).callbacks)

    def data(self) -> LightningDataModule | None:
        """Build the data; None if the module has its own."""
        data: LightningDataModule | None = self._parsed(self.base).datamodule
        return data

    def loggers(self) -> list[Logger]:
        """Build the loggers that the configuration names; those that Lightning makes by itself are not among them."""
        logger = (self.content.get("trainer") or {}).get("logger")
        sections = logger if isinstance(logger, list) else [logger]
        named = [section for section in sections if isinstance(section, (dict, str))]
        return list(self._parsed(self.base, named).loggers) if named else []

    def parts(self) -> tuple[LightningModule, list[Callback], LightningDataModule | None]:
        """Build the module at its own shape, the callbacks that take part in its training, and the data."""
        parsed = _parse(_Parsed, self.content, {})
        return parsed.model, list(parsed.callbacks), parsed.datamodule

    @property
    def base(self) -> Shape:
        """The base's shape, from the first name of each axis."""
        first = {axis: self.options[names[0]] if names else 1 for axis, names in self.keys.items()}
        return Shape(**first)

    def build_with(self, sizes: Mapping[str, int]) -> LightningModule:
        """Build the module of the base with other values of some options."""
        return self.build_all(sizes)[0]

    def build_all(self, sizes: Mapping[str, int]) -> tuple[LightningModule, list[Callback]]:
        """Build the module of the base with other values of some options, and the callbacks that take part."""
        parsed = _parse(_Parsed, self.content, {**self.options, **sizes})
        return parsed.model, list(parsed.callbacks)

    @property
    def trainer(self) -> dict[str, Any]:
        """Arguments of the Trainer that change how a step is made."""
        given = self.content.get("trainer") or {}
        return {name: given[name] for name in _OF_A_STEP if given.get(name) is not None}

    @property
    def whole_training(self) -> dict[str, Any]:
        """Arguments of the Trainer that change a training: how a step is made, how many there are, and validation."""
        given = self.content.get("trainer") or {}
        return {name: given[name] for name in (*_OF_A_STEP, *_OF_A_TRAINING) if given.get(name) not in (None, -1)}

    def _parsed(self, shape: Shape, loggers: Sequence[Any] = ()) -> _Parsed:
        factors = {axis: getattr(shape, axis) // getattr(self.base, axis) for axis in self.keys}
        sizes = {name: self.options[name] * factors[axis] for axis, names in self.keys.items() for name in names}
        for axis, names in self.keys.items():
            for name in names:
                _require_size(axis, sizes[name], f"A factor of {factors[axis]} makes {name}={sizes[name]}")
        return _parse(_Parsed, self.content, sizes, loggers)


def read_config(
    path: str | Path, keys: Mapping[str, Sequence[str]] | None, model: str | None = None, data: str | None = None
) -> Configured:
    """Read a LightningCLI's YAML file, of one command or of all, and find the base's shape in it.

    The base is that of the configuration's :class:`MLUCallback`, or else what it trains; it also supplies arguments
    that the model lacks, because LightningCLI does not save linked ones. ``model`` and ``data`` are classes for files
    that do not name them. Without ``keys``, the file is read for its own shape alone.
    """
    content = _content(Path(path))
    left_out = [name for name in content if name not in _OF_LIGHTNING]
    content = {name: value for name, value in content.items() if name in _OF_LIGHTNING}
    for name, class_path in (("model", model), ("data", data)):
        if class_path is not None:
            content[name] = {"class_path": class_path, "init_args": _arguments(content.get(name) or {})}
    if "class_path" not in (content.get("model") or {}):
        raise ValueError(
            f"{path} does not say which class its model is of, as configurations of LightningCLI(MyModule) do not. Give it: "
            "--model my_package.MyModule (and --data my_package.MyData if there is a class of data)."
        )
    if content.get("data") and "class_path" not in content["data"]:
        raise ValueError(f"{path} does not say which class its data are of. Give it: --data my_package.MyData.")
    for name in ("optimizer", "lr_scheduler"):
        if isinstance(content.get(name), dict) and "class_path" not in content[name]:
            raise ValueError(
                f"{path} does not say which class its {name} is of, as where a CLI adds one class for it. Write it into a "
                f"copy of the file, as class_path under {name}, with the arguments that are there as init_args, and check "
                "the copy."
            )
    base = _base(content, path, keys is not None)
    keys = keys or {}
    own, missing = _arguments(content["model"]), _of_base(content["model"], base)
    given = dict(_whole_numbers(own)) | dict(_whole_numbers(_arguments(base)))
    for axis, names in keys.items():
        for name in given.keys() & set(names):
            _require_size(axis, given[name], f"The model of {path} has {name}={given[name]}")
    filled = content | {"model": content["model"] | {"init_args": missing | own}}
    parsed, data_arguments = _parse(_Arguments, filled, {}).config.as_dict(), _arguments(content.get("data") or {})
    every = dict(_whole_numbers(_arguments(parsed["model"])))
    options = every | {name: value for name, value in _whole_numbers(_arguments(base)) if name in every}
    start = {name: options[name] for names in keys.values() for name in names if name in options}
    for axis, names in keys.items():
        for name in names:
            if name not in options:
                raise ValueError(
                    f"The model of {path} has no argument {name!r} that is a whole number, to be its {axis}. Its arguments "
                    f"are {', '.join(options) or 'none'}; name those that make it up, as in --{axis} "
                    f"{','.join(list(options)[:2]) or 'width,heads'}, or leave the {axis} as it is with --{axis} null."
                )
    own |= start
    if _is_saved(content):
        linked = _linked("model", parsed, own, missing) + _linked("data", parsed, data_arguments, {})
        if linked:
            raise ValueError(
                f"{path} has no value of {', '.join(linked)}, although LightningCLI has saved it, with all arguments but "
                "those that a CLI links to others (link_arguments): what the training had is not known. Write what is "
                "missing into a copy of the file, beside the other arguments, and check the copy."
            )
    taken = [f"{name}={value}" for name, value in missing.items() if name not in start]
    axes = {axis: tuple(names) for axis, names in keys.items()}
    return Configured(filled, axes, options, tuple(_notes(left_out, taken)))


_OF_A_STEP = tuple(
    "accelerator accumulate_grad_batches deterministic gradient_clip_algorithm gradient_clip_val precision".split()
)
_OF_A_TRAINING = tuple(
    "check_val_every_n_epoch limit_train_batches limit_val_batches max_epochs max_steps overfit_batches "
    "reload_dataloaders_every_n_epochs val_check_interval".split()
)
_OF_LIGHTNING = ("seed_everything", "trainer", "model", "data", "optimizer", "lr_scheduler")
_OF_FIT = ("ckpt_path", "config", "weights_only")
_LARGEST = {"depth": 10_000, "hidden": 10_000_000, "embedding": 10_000_000}
_OTHER_VERSIONS = 4  # how many arguments the Trainer may have gained since the version of Lightning that saved a file
_MOST_SAID = 2000  # characters of what LightningCLI says, which shows values of the file


class _Arguments(LightningCLI):
    """A configuration of which nothing is built."""

    def instantiate_classes(self) -> None:
        """Build nothing."""


class _Parsed(LightningCLI):
    """A configuration whose module, data and callbacks are built, and no Trainer."""

    callbacks: Sequence[Callback] = ()
    loggers: Sequence[Logger] = ()

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        trainer = self.config_init["trainer"]
        self.callbacks, self.loggers = trainer["callbacks"] or [], trainer["logger"] or []


_CLI = TypeVar("_CLI", bound=LightningCLI)


def _parse(kind: type[_CLI], content: Mapping[str, Any], sizes: Mapping[str, int], loggers: Sequence[Any] = ()) -> _CLI:
    """Parse a configuration with other sizes in the model's arguments, and only the callbacks that take part."""
    changed: dict[str, Any] = copy.deepcopy(dict(content))
    for name, value in sizes.items():
        *parents, last = name.split(".")
        section = changed["model"].setdefault("init_args", {})
        for parent in parents:
            section = section.setdefault(parent, {})
            section = section.setdefault("init_args", {}) if "class_path" in section else section
        section[last] = value
    kept = [callback for callback in _callbacks(changed) if _takes_part(callback)]
    changed["trainer"] = {"callbacks": kept, "logger": list(loggers) or False}
    changed["seed_everything"] = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the command line of this process is not parsed
        try:
            return kind(save_config_callback=None, run=False, args=changed, parser_kwargs={"exit_on_error": False})
        except ArgumentError as error:
            wrong = str(error) if len(str(error)) <= _MOST_SAID else f"{str(error)[:_MOST_SAID]} ..."
            raise ValueError(
                f"LightningCLI cannot read the configuration: {wrong}\nCorrect it in the file, or in a copy. Arguments that "
                "a CLI of your own links to others (link_arguments) have to be in it, too, and classes have to be found "
                "from the folder in which the command is run."
            ) from error


def _content(path: Path) -> dict[str, Any]:
    """Configuration of ``fit``, whether the file is of this command or of all."""
    content = load_config(path)
    if isinstance(content, dict) and isinstance(content.get("fit"), dict):
        content = content["fit"]
    if not isinstance(content, dict) or not ({"model", "trainer", "data"} & content.keys()):
        raise ValueError(f"{path} is not a LightningCLI configuration: it has no model. Give that of a training.")
    content = {name: value for name, value in content.items() if name not in _OF_FIT}
    for name in ("model", "trainer", "data", "optimizer", "lr_scheduler"):
        _require_section(content.get(name), name, path)
    for number, callback in enumerate(_callbacks(content)):
        if not isinstance(callback, str):
            _require_section(callback, f"trainer.callbacks[{number}]", path)
            base = _arguments(callback or {}).get("base")
            _require_section(base if isinstance(base, dict) else None, "base", path)
    return content


def _require_size(axis: str, value: int, found: str) -> None:
    if not 1 <= value <= _LARGEST[axis]:
        raise ValueError(
            f"{found}, and a check builds models with a {axis} from 1 to {_LARGEST[axis]:,}. Give it a small base and small "
            "factors: it looks at what changes with the size."
        )


def _require_section(section: Any, name: str, path: Path) -> None:
    if section is None or (isinstance(section, str) and name in ("optimizer", "lr_scheduler")):
        return
    named = isinstance(section, dict) and all(isinstance(key, str) for key in section)
    if not named or not isinstance(section.get("class_path", ""), str):
        raise ValueError(
            f"{path} has {_shown(section)} as its {name}: it should be a mapping, and its class_path a text."
        )
    arguments = section.get("init_args") if "class_path" in section else section
    if arguments is not None and not (isinstance(arguments, dict) and all(isinstance(key, str) for key in arguments)):
        raise ValueError(f"{path} has {_shown(arguments)} as init_args of its {name}, which should be a mapping.")


def _arguments(section: Mapping[str, Any]) -> dict[str, Any]:
    return dict((section.get("init_args") or {}) if "class_path" in section else section)


def _whole_numbers(arguments: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, int]]:
    """Arguments that are whole numbers, and those of arguments that have arguments."""
    for name, value in arguments.items():
        if type(value) is int:
            yield f"{prefix}{name}", value
        elif isinstance(value, dict):
            yield from _whole_numbers(_arguments(value), f"{prefix}{name}.")


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


def _base(content: Mapping[str, Any], path: str | Path, is_built: bool) -> dict[str, Any]:
    """Section of the base, where the plugin is told how to build it, as it has to be for a base that is built."""
    instead = "as base: {class_path: my_package.MyModule, init_args: {...}} in a copy of the file, and check the copy."
    for callback in _callbacks(content):
        if not (_is_plugin(callback) and isinstance(callback, dict)):
            continue
        arguments = callback.get("init_args") or {}
        base = arguments.get("base")
        if is_built and arguments.get("plan") is not None:
            raise ValueError(
                f"The MLUCallback of {path} has a finished plan, which is for one shape, and a check trains several. Give "
                f"it a base instead, {instead}"
            )
        if isinstance(base, dict):
            return base
        if is_built and base not in (None, ABSOLUTE):
            raise ValueError(
                f"The base of the MLUCallback of {path} is a saved plan, from which a module of its shape cannot be "
                f"built, to begin there. Give it another, {instead}"
            )
    return {}


def _of_base(model: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a base of the model's class that the model has no value for."""
    if _class_of(base).rpartition(".")[2] != _class_of(model).rpartition(".")[2]:
        return {}
    given = _arguments(model)
    return {name: value for name, value in _arguments(base).items() if name not in given}


def _notes(left_out: Sequence[str], taken: Sequence[str]) -> Iterator[str]:
    """Say which keys are not LightningCLI's, and which arguments the model has from the base."""
    if left_out:
        yield (
            f"Left out, because LightningCLI itself does not have them: {', '.join(map(str, left_out))}. Optimizers and "
            "callbacks that your own CLI makes of them are not in this check."
        )
    if taken:
        yield f"Taken from the MLUCallback's base, because the model has no value for them: {', '.join(taken)}."


def _is_saved(content: Mapping[str, Any]) -> bool:
    """Whether LightningCLI has written the file: it saves all arguments of a Trainer, and people do not write them all."""
    every = inspect.signature(Trainer).parameters.keys()
    return "seed_everything" in content and len(every - (content.get("trainer") or {}).keys()) <= _OTHER_VERSIONS


def _linked(section: str, parsed: Mapping[str, Any], given: Mapping[str, Any], of_base: Mapping[str, Any]) -> list[str]:
    """Arguments of a class that a saved configuration has no value for, and its base none that somebody has chosen."""
    found = parsed.get(section) or {}
    arguments = found.get("init_args") or {}
    if not arguments:
        return []
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(resolve_name(found["class_path"]), "of")
    # which LightningCLI has saved with the base, whatever the model had
    defaults = parser.get_defaults().as_dict()["of"]
    return [
        f"{section}.{name}"
        for name, value in arguments.items()
        if name not in given and (name not in of_base or value == defaults.get(name))
    ]
