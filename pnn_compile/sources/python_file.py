"""Models in Python: `file.py`, `file.py:name` or `package.module:name`, and their inputs.

A name may be dotted and means an `nn.Module`, a class, or a factory without required arguments.
Without one, `build_model`, `get_model` or `model` is taken, or else the only `nn.Module` subclass
of the file whose signature asks for no arguments. Inputs are `--input` texts, or come from
`example_inputs` beside the model: a value, or a function without required arguments, that gives a
tensor, a tuple or list of positional arguments, or a dict of keyword arguments. For a factory
`build_<x>_model`, `<x>_example_inputs` comes first.
"""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from passes.errors import SourceError
from pnn_compile.sources.calls import call, lacks, refuse_arguments
from pnn_compile.sources.errors import advise, blame, first_line, library
from pnn_compile.sources.source import Inputs, Source

__all__ = ["imports_from", "load"]

NAMES = ("build_model", "get_model", "model")

_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")
_PREFIX = "_pnn_source_"
_counter = itertools.count()
_local: set[str] = set()  # top-level names that the last call imported from the user's folders


def load(text: str, arguments: dict[str, Any], given: Inputs | None) -> Source:
    """Import and build the model that `text` names, and find its example inputs.

    Args:
        text: `file.py`, `file.py:name` or `package.module:name`.
        arguments: Keyword arguments of the factory.
        given: Inputs that replace the `example_inputs` beside the model.

    Raises:
        SourceError: See `load_source`.
    """
    place, colon, name = text.rpartition(":")
    if not colon or Path(text).is_file():
        place, name = text, ""
    elif not place or not _NAME.fullmatch(name):
        raise SourceError(f"cannot read {text!r}: type file.py:name or package.module:name")
    path = Path(place)
    if not name or path.is_file() or path.suffix == ".py" or not _NAME.fullmatch(place):
        _check_file(path)
        with imports_from(path.resolve().parent, Path.cwd()):
            return _take(_import_file(path), place, name, arguments, given)
    with imports_from(Path.cwd()):
        with blame(place):
            module = importlib.import_module(place)
        return _take(module, place, name, arguments, given)


def _check_file(path: Path) -> None:
    if path.is_file() and path.suffix == ".py":
        return
    if path.is_file():
        raise SourceError(f"{path} is not a Python file: name the one that builds the model")
    what = f"{path} is a directory" if path.is_dir() else f"no such file: {path}"
    folder = path if path.is_dir() else path.parent
    advice = advise(path.name, sorted(file.name for file in folder.glob("*.py")))
    if path.suffix != ".py":
        advice += " (a model of a module is typed package.module:name)"
    raise SourceError(f"{what}; in {folder}, {advice}")


@contextmanager
def imports_from(*folders: Path) -> Iterator[None]:
    """Let imports find modules in folders; forget those that an earlier call found so."""
    for name in [name for name in sys.modules if name.partition(".")[0] in _local]:
        del sys.modules[name]
    _local.clear()
    path, known = list(sys.path), {name.partition(".")[0] for name in sys.modules}
    sys.path[:0] = map(str, folders)
    importlib.invalidate_caches()  # a file may be younger than a listing of its folder
    try:
        yield
    finally:
        sys.path[:] = path
        for name, module in list(sys.modules.items()):
            root = name.partition(".")[0]
            if root not in known and not root.startswith(_PREFIX):
                file = Path(getattr(module, "__file__", None) or "")
                if any(file.is_relative_to(each) for each in folders) and not library(file):
                    _local.add(root)


def _import_file(path: Path) -> ModuleType:
    """Import a file under a name of its own, which pickle and torch can look up later."""
    name = f"{_PREFIX}{next(_counter)}_" + re.sub(r"\W", "_", path.stem)
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with blame(str(path)):
            # not by the loader: its cache may be stale within a second of an edit
            code = compile(path.read_bytes(), str(path.resolve()), "exec", dont_inherit=True)
            exec(code, vars(module))
    except SourceError:
        del sys.modules[name]
        raise
    return module


def _take(
    module: ModuleType, place: str, name: str, arguments: dict[str, Any], given: Inputs | None
) -> Source:
    """Build the model called `name`, or the one that the rules choose, and its inputs."""
    name = name or _choose(module, place, arguments)
    origin = f"{place}:{name}"
    with blame(origin):
        target = _look_up(module, place, name)
    factory = re.fullmatch(r"build_(\w+)_model", name.rpartition(".")[2])
    keys = [f"{factory[1]}_example_inputs" if factory else "", "example_inputs"]
    key = next((key for key in keys if key in vars(module)), "")
    if not given and not key:
        raise SourceError(
            f"{origin} needs example inputs: add --input 1x3x32x32 for each argument, or paste "
            f"`def example_inputs(): return (torch.randn(1, 3, 32, 32),)` into {place}"
        )
    if isinstance(target, nn.Module):
        refuse_arguments(arguments, origin, "it is a model already, not a factory")
    model = target if isinstance(target, nn.Module) else call(target, origin, arguments)
    if not isinstance(model, nn.Module):
        raise SourceError(f"{origin} gives a {type(model).__name__}: return an nn.Module alone")
    return Source(model, *(given or _arguments(vars(module)[key], f"{place}:{key}")), origin)


def _choose(module: ModuleType, place: str, arguments: dict[str, Any]) -> str:
    """Return the name of the model in a file that was given without one."""
    obstacles = {
        name: _obstacle(name, value, module, arguments) for name, value in vars(module).items()
    }
    free = {id(vars(module)[name]): name for name, why in obstacles.items() if why == ""}
    names = [name for name in NAMES if obstacles.get(name) == ""][:1] or list(free.values())
    if len(names) == 1:
        return names[0]
    if names:
        advice = " or ".join(f"{place}:{name}" for name in names)
        raise SourceError(f"{place} has {len(names)} models, and it is open which: type {advice}")
    seen = "; ".join(f"{name} {why}" for name, why in obstacles.items() if why)
    raise SourceError(
        f"no model found in {place} ({seen or 'no nn.Module in it'}): add a function build_model() "
        f"that returns it, or type {place}:name"
    )


def _obstacle(
    name: str, value: object, module: ModuleType, arguments: dict[str, Any]
) -> str | None:
    """Say why a value cannot be taken for the model: "" if it can, None if nobody would."""
    own = getattr(value, "__module__", None) == module.__name__
    own_class = own and isinstance(value, type) and issubclass(value, nn.Module)
    if name in NAMES and not callable(value):
        return f"is of type {type(value).__name__}"
    if isinstance(value, nn.Module):
        return "" if name in NAMES else "has another name"
    if not callable(value) or not (own_class or name in NAMES):
        return None
    if inspect.isabstract(value):
        return "is abstract"
    if (own_class or not own) and (missing := lacks(value, arguments)):
        return f"needs arguments {missing}"
    return ""  # a factory of this file is meant, even one that must be mended


def _look_up(module: ModuleType, place: str, name: str) -> Any:
    """Return the attribute `name`, which may be dotted."""
    value: Any = module
    for part in name.split("."):
        try:
            value = getattr(value, part)
        except AttributeError as exc:
            advice = advise(part, [key for key in dir(value) if not key.startswith("_")])
            raise SourceError(f"there is no {part!r} in {place}; {advice}") from exc
    return value


def _arguments(value: Any, origin: str) -> Inputs:
    """Sort the example inputs that the user defined into positional and keyword arguments."""
    value = call(value, origin) if callable(value) else value
    if isinstance(value, torch.Tensor):
        return (value,), {}
    if value and isinstance(value, (tuple, list)):
        return tuple(value), {}
    if value and isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return (), dict(value)
    raise SourceError(
        f"{origin} gives {first_line(repr(value))}: let it give a tensor, a tuple or list of "
        "positional arguments, or a dict of keyword arguments"
    )
