"""Load a model from Python: `file.py`, `file.py:name` or `package.module:name`, with its inputs.

A name may be dotted; it refers to an `nn.Module`, a class, or a factory without required arguments.
Without a name, the model is `build_model`, `get_model` or `model`, or else the only `nn.Module`
subclass of the file that is built without arguments. Inputs come from `--input` texts, or from
`example_inputs` beside the model: a tensor, a tuple or list of positional arguments, a dict of
keyword arguments, or a function without required arguments that returns one of these. For a factory
`build_<x>_model`, `<x>_example_inputs` comes first.

    # model.py                                           pnn-compile model.py
    class Net(nn.Module): ...                            builds Net()
    def example_inputs():                                and calls it with this tensor
        return torch.randn(2, 3, 32, 32)
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

from passes.errors import SourceError, suggest
from pnn_compile.sources.source import Inputs, Source
from pnn_compile.sources.user_code import (
    VARIADIC,
    brief,
    call,
    is_library,
    missing_arguments,
    refuse_arguments,
    report_errors,
)

NAMES = ("build_model", "get_model", "model")

_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")
_PREFIX = "_pnn_source_"
_counter = itertools.count()
_local: set[str] = set()  # top-level modules that the last call imported from the user's folders


def load(text: str, arguments: dict[str, Any], inputs: Inputs | None) -> Source:
    """Import and build the model that `text` names, and find its example inputs.

    Args:
        text: `file.py`, `file.py:name` or `package.module:name`.
        arguments: Keyword arguments of the factory.
        inputs: Inputs that replace the `example_inputs` beside the model.

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
            return _build(_import_file(path), place, name, arguments, inputs)
    with imports_from(Path.cwd()):
        with report_errors(place):
            module = importlib.import_module(place)
        return _build(module, place, name, arguments, inputs)


def _check_file(path: Path) -> None:
    if path.is_file() and path.suffix == ".py":
        return
    if path.is_file():
        raise SourceError(f"{path} is not a Python file: name the one that builds the model")
    if (path / "plan.json").is_file():
        raise SourceError(
            f"{path} is an artifact, which is compiled already: name the file of its model, or "
            f"look at it with `pnn-compile inspect {path}`"
        )
    problem = f"{path} is a directory" if path.is_dir() else f"no such file: {path}"
    folder = path if path.is_dir() else path.parent
    if files := sorted(file.name for file in folder.glob("*.py")):
        advice = f"in {folder}, {suggest(path.name, files)}"
    else:
        advice = f"there is no Python file in {folder}"
    if path.suffix != ".py":
        advice += " (a model of a module is typed package.module:name)"
    raise SourceError(f"{problem}; {advice}")


@contextmanager
def imports_from(*folders: Path) -> Iterator[None]:
    """Put folders first in `sys.path`; forget the modules that an earlier call imported so."""
    for name in [name for name in sys.modules if name.partition(".")[0] in _local]:
        del sys.modules[name]
    _local.clear()
    path, imported = list(sys.path), {name.partition(".")[0] for name in sys.modules}
    sys.path[:0] = map(str, folders)
    importlib.invalidate_caches()  # a file may be younger than a listing of its folder
    try:
        yield
    finally:
        sys.path[:] = path
        for name, module in list(sys.modules.items()):
            root = name.partition(".")[0]
            if root not in imported and not root.startswith(_PREFIX):
                file = Path(getattr(module, "__file__", None) or "")
                if any(file.is_relative_to(f) for f in folders) and not is_library(file):
                    _local.add(root)


def _import_file(path: Path) -> ModuleType:
    """Import a file under a unique name, which pickle and torch can look up later."""
    name = f"{_PREFIX}{next(_counter)}_" + re.sub(r"\W", "_", path.stem)
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with report_errors(str(path)):
            # Not by the loader: its cache may be stale within a second of an edit.
            code = compile(path.read_bytes(), str(path.resolve()), "exec", dont_inherit=True)
            exec(code, vars(module))
    except SourceError:
        del sys.modules[name]
        raise
    return module


def _build(
    module: ModuleType, place: str, name: str, arguments: dict[str, Any], inputs: Inputs | None
) -> Source:
    """Build the model called `name`, or the only candidate of the module, and its inputs."""
    name = name or _choose(module, place, arguments)
    origin = f"{place}:{name}"
    with report_errors(origin):
        target = _look_up(module, place, name)
    factory = re.fullmatch(r"build_(\w+)_model", name.rpartition(".")[2])
    keys = [f"{factory[1]}_example_inputs" if factory else "", "example_inputs"]
    key = next((key for key in keys if key in vars(module)), "")
    if not inputs and not key:
        raise SourceError(
            f"{origin} needs example inputs: add {_inputs_to_add(target)}, or paste "
            f"`def example_inputs(): return (torch.randn(1, 3, 32, 32),)` into {place}"
        )
    if isinstance(target, nn.Module):
        refuse_arguments(arguments, origin, "it is a model already, not a factory")
    model = target if isinstance(target, nn.Module) else call(target, origin, arguments)
    if not isinstance(model, nn.Module):
        raise SourceError(f"{origin} returns a {type(model).__name__}: return an nn.Module alone")
    return Source(model, *(inputs or _arguments(vars(module)[key], f"{place}:{key}")), origin)


def _inputs_to_add(target: Any) -> str:
    """Return the options for the arguments that a class or a model needs; of a factory, for any."""
    known = isinstance(target, nn.Module) or inspect.isclass(target)
    parameters = inspect.signature(target.forward).parameters.values() if known else ()
    names = [p.name for p in parameters if p.default is p.empty and p.name != "self"]
    if not names or any(p.kind in VARIADIC for p in parameters):
        return "--input 1x3x32x32 for each argument, with its shape (1x16:int64 for token ids)"
    options = " ".join(f"--input {name}={_shape_like(name)}" for name in names)
    return f"{options} with the shapes of your arguments"


def _shape_like(name: str) -> str:
    """Return an example of a shape and dtype, of integers where a name speaks of them."""
    return "1x16:int64" if re.search(r"token|ids?$|index|indices", name) else "1x3x32x32"


def _choose(module: ModuleType, place: str, arguments: dict[str, Any]) -> str:
    """Return the name of the only model of a module.

    Raises:
        SourceError: It has none, or several.
    """
    obstacles = {
        name: _obstacle(name, value, module, arguments) for name, value in vars(module).items()
    }
    # By identity: a class under two names is one model.
    models = {id(vars(module)[name]): name for name, why in obstacles.items() if why == ""}
    names = [name for name in NAMES if obstacles.get(name) == ""][:1] or list(models.values())
    if len(names) == 1:
        return names[0]
    if names:
        advice = " or ".join(f"{place}:{name}" for name in names)
        raise SourceError(f"{place} has {len(names)} models: type {advice}")
    refused = "; ".join(f"{name} {why}" for name, why in obstacles.items() if why)
    raise SourceError(
        f"no model found in {place} ({refused or 'no nn.Module in it'}): add a function "
        f"build_model() that returns it, or type {place}:name"
    )


def _obstacle(
    name: str, value: object, module: ModuleType, arguments: dict[str, Any]
) -> str | None:
    """Return why a value cannot be the model; "" if it can, None if it is not a candidate."""
    local = getattr(value, "__module__", None) == module.__name__
    local_class = local and isinstance(value, type) and issubclass(value, nn.Module)
    if name in NAMES and not callable(value):
        return f"is of type {type(value).__name__}"
    if isinstance(value, nn.Module):
        return "" if name in NAMES else "has another name"
    if not callable(value) or not (local_class or name in NAMES):
        return None
    if inspect.isabstract(value):
        return "is abstract"
    if (local_class or not local) and (signature := missing_arguments(value, arguments)):
        return f"needs arguments {signature}"
    return ""  # a factory of this file is the model, even one that its call will refuse


def _look_up(module: ModuleType, place: str, name: str) -> Any:
    """Return the attribute `name` of a module; it may be dotted."""
    value: Any = module
    for part in name.split("."):
        try:
            value = getattr(value, part)
        except AttributeError as error:
            own = [key for key in dir(value) if not key.startswith("_")]
            built = [key for key in own if not isinstance(getattr(value, key), ModuleType)]
            advice = suggest(part, built)
            raise SourceError(f"there is no {part!r} in {place}; {advice}") from error
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
        f"{origin} is {brief(repr(value))}: make it a tensor, a tuple or list of positional "
        "arguments, a dict of keyword arguments, or a function that returns one of these"
    )
