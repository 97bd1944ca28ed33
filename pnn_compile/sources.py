"""Where a model comes from: `file.py`, `file.py:name` or `package.module:name`, and its inputs.

A name may be dotted and means an `nn.Module`, a class, or a factory without required arguments.
Without one, `build_model`, `get_model` or `model` is taken, or else the only `nn.Module` subclass
of the file whose signature asks for no arguments. Inputs are `--input` texts, or come from
`example_inputs` beside the model: a value, or a function without required arguments, that gives a
tensor, a tuple or list of positional arguments, or a dict of keyword arguments. For a factory
`build_<x>_model`, `<x>_example_inputs` comes first.
"""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import itertools
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from passes.errors import SourceError

__all__ = ["Source", "load_source", "parse_input"]

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
NAMES = ("build_model", "get_model", "model")
FLOATS = ("float32", "float64", "float16", "bfloat16", "complex64")
INTEGERS = ("int64", "int32", "int16", "int8", "uint8")
GRAMMAR = "[name=]SIZExSIZE...[:dtype[<bound]], as in 2x3x32x32, 2x128:int64<50, mask=2x128:bool"

_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")
_INPUT = re.compile(
    r"(?:([^\W\d]\w*)=)?(?:([1-9]\d*(?:x[1-9]\d*)*)(?::([a-z]\w*)(?:<([1-9]\d{,18}))?)?)?"
)
_PREFIX = "_pnn_source_"
_counter = itertools.count()
_local: set[str] = set()  # top-level names that the last call imported from the user's folders
_stdlib = Path(sysconfig.get_path("stdlib")).resolve()


@dataclass(frozen=True)
class Source:
    """A model and what to call it with.

    Attributes:
        model: The model, freshly built.
        args: Positional example inputs.
        kwargs: Keyword example inputs.
        origin: What was taken, in the form that `load_source` takes: `file.py:build_model`.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    origin: str


def load_source(text: str, inputs: Sequence[str] = ()) -> Source:
    """Import and build the model that `text` names, and find its example inputs.

    While the user's code runs, the file's folder and the working directory stand first in
    `sys.path`. The file, and what an earlier call imported from those folders, is imported anew.

    Args:
        text: `file.py`, `file.py:name` or `package.module:name`.
        inputs: Texts for `parse_input`, the positional ones in the order of the arguments; they
            replace the `example_inputs` beside the model.

    Raises:
        SourceError: There is no such file, module or name, no model or more than one, no inputs,
            or the user's code fails; what it raised is the cause.
    """
    given = _parse_inputs(inputs)
    place, colon, name = text.rpartition(":")
    if not colon or Path(text).is_file():
        place, name = text, ""
    elif not place or not _NAME.fullmatch(name):
        raise SourceError(f"cannot read {text!r}: type file.py:name or package.module:name")
    path = Path(place)
    if not name or path.is_file() or path.suffix == ".py" or not _NAME.fullmatch(place):
        _check_file(path)
        with _imports_from(path.resolve().parent, Path.cwd()):
            return _take(_import_file(path), place, name, given)
    with _imports_from(Path.cwd()):
        with _blame(place):
            module = importlib.import_module(place)
        return _take(module, place, name, given)


def parse_input(text: str, *, seed: int = 0) -> tuple[str | None, torch.Tensor]:
    """Make the tensor that an `--input` text describes: `[name=]SIZExSIZE...[:dtype[<bound]]`.

    Floating-point numbers are standard normal and `bool` is a fair coin; integers are drawn from
    [0, bound), and from [0, 2) without a bound. The same text and seed give the same tensor.

    Returns:
        The name of the keyword argument, or None for a positional one, and the tensor.

    Raises:
        SourceError: The text does not follow the grammar, or the dtype is unknown.
    """
    match = _INPUT.match(text)
    assert match is not None  # all of it is optional
    name, sizes, word, digits = match.groups()
    if (rest := text[match.end() :]) or not sizes:
        raise SourceError(
            f"bad --input {text!r}: cannot read {repr(rest) if rest else 'the end'} at character "
            f"{match.end() + 1}; the grammar is {GRAMMAR}"
        )
    # integers are indices into tables of unknown size: 2 is the least bound that still varies
    word, bound = word or "float32", int(digits or 2)
    if word not in (*FLOATS, *INTEGERS, "bool"):
        known = ", ".join((*FLOATS, *INTEGERS, "bool"))
        raise SourceError(f"unknown dtype {word!r} in --input {text!r}: use one of {known}")
    if digits and (word not in INTEGERS or bound > torch.iinfo(getattr(torch, word)).max + 1):
        raise SourceError(f"--input {text!r}: {word} cannot be drawn below {digits}; use int64")
    shape, dtype = [int(size) for size in sizes.split("x")], getattr(torch, word)
    generator = torch.Generator().manual_seed(seed)
    try:
        if word in FLOATS:
            return name, torch.randn(shape, dtype=dtype, generator=generator)
        return name, torch.randint(bound, shape, generator=generator).to(dtype)
    except (RuntimeError, TypeError, OverflowError) as exc:
        raise SourceError(f"--input {text!r} is too large: {_first_line(exc)}") from exc


def _parse_inputs(texts: Sequence[str]) -> Inputs | None:
    """Sort `--input` texts into positional and keyword arguments; None if there are none."""
    parsed = [parse_input(text, seed=seed) for seed, text in enumerate(texts)]  # all differ
    args = tuple(tensor for name, tensor in parsed if name is None)
    kwargs = {name: tensor for name, tensor in parsed if name is not None}
    if len(args) + len(kwargs) < len(parsed):
        raise SourceError(f"--input gives a name twice ({' '.join(texts)}): drop one of them")
    return (args, kwargs) if parsed else None


def _check_file(path: Path) -> None:
    if path.is_file() and path.suffix == ".py":
        return
    if path.is_file():
        raise SourceError(f"{path} is not a Python file: name the one that builds the model")
    what = f"{path} is a directory" if path.is_dir() else f"no such file: {path}"
    folder = path if path.is_dir() else path.parent
    advice = _advise(path.name, sorted(file.name for file in folder.glob("*.py")))
    if path.suffix != ".py":
        advice += " (a model of a module is typed package.module:name)"
    raise SourceError(f"{what}; in {folder}, {advice}")


def _advise(word: str, names: Sequence[str]) -> str:
    """Say which name was meant, or else which there are."""
    if close := difflib.get_close_matches(word, names):
        return f"did you mean {' or '.join(close)}?"
    return f"there is {', '.join(names[:8]) or 'none'}"


@contextmanager
def _imports_from(*folders: Path) -> Iterator[None]:
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
                if any(file.is_relative_to(each) for each in folders) and not _library(file):
                    _local.add(root)


def _import_file(path: Path) -> ModuleType:
    """Import a file under a name of its own, which pickle and torch can look up later."""
    name = f"{_PREFIX}{next(_counter)}_" + re.sub(r"\W", "_", path.stem)
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with _blame(str(path)):
            # not by the loader: its cache may be stale within a second of an edit
            code = compile(path.read_bytes(), str(path.resolve()), "exec", dont_inherit=True)
            exec(code, vars(module))
    except SourceError:
        del sys.modules[name]
        raise
    return module


def _take(module: ModuleType, place: str, name: str, given: Inputs | None) -> Source:
    """Build the model called `name`, or the one that the rules choose, and its inputs."""
    name = name or _choose(module, place)
    origin = f"{place}:{name}"
    with _blame(origin):
        target = _look_up(module, place, name)
    factory = re.fullmatch(r"build_(\w+)_model", name.rpartition(".")[2])
    keys = [f"{factory[1]}_example_inputs" if factory else "", "example_inputs"]
    key = next((key for key in keys if key in vars(module)), "")
    if not given and not key:
        raise SourceError(
            f"{origin} needs example inputs: add --input 1x3x32x32 for each argument, or paste "
            f"`def example_inputs(): return (torch.randn(1, 3, 32, 32),)` into {place}"
        )
    model = target if isinstance(target, nn.Module) else _call(target, origin)
    if not isinstance(model, nn.Module):
        raise SourceError(f"{origin} gives a {type(model).__name__}: return an nn.Module alone")
    return Source(model, *(given or _arguments(vars(module)[key], f"{place}:{key}")), origin)


def _choose(module: ModuleType, place: str) -> str:
    """Return the name of the model in a file that was given without one."""
    obstacles = {name: _obstacle(name, value, module) for name, value in vars(module).items()}
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


def _obstacle(name: str, value: object, module: ModuleType) -> str | None:
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
    if (own_class or not own) and (needs := _needs(value)):
        return f"needs arguments {needs}"
    return ""  # a factory of this file is meant, even one that must be mended


def _look_up(module: ModuleType, place: str, name: str) -> Any:
    """Return the attribute `name`, which may be dotted."""
    value: Any = module
    for part in name.split("."):
        try:
            value = getattr(value, part)
        except AttributeError as exc:
            advice = _advise(part, [key for key in dir(value) if not key.startswith("_")])
            raise SourceError(f"there is no {part!r} in {place}; {advice}") from exc
    return value


def _call(factory: object, origin: str) -> Any:
    """Call what the user defined, without arguments."""
    if not callable(factory):
        raise SourceError(f"{origin} is of type {type(factory).__name__}: name a model or factory")
    if needs := _needs(factory):
        raise SourceError(f"{origin} needs arguments {needs}: give each of them a default")
    with _blame(origin):
        return factory()


def _needs(factory: Callable[..., Any]) -> str:
    """Return the signature of a callable that has required parameters, "" of another."""
    try:
        signature = inspect.signature(factory).replace(return_annotation=inspect.Signature.empty)
    except (TypeError, ValueError):  # written in C, without one: a call will tell
        return ""
    rest = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = signature.parameters.values()
    required = any(each.default is each.empty and each.kind not in rest for each in parameters)
    return _first_line(signature) if required else ""


def _arguments(value: Any, origin: str) -> Inputs:
    """Sort the example inputs that the user defined into positional and keyword arguments."""
    value = _call(value, origin) if callable(value) else value
    if isinstance(value, torch.Tensor):
        return (value,), {}
    if value and isinstance(value, (tuple, list)):
        return tuple(value), {}
    if value and isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return (), dict(value)
    raise SourceError(
        f"{origin} gives {_first_line(repr(value))}: let it give a tensor, a tuple or list of "
        "positional arguments, or a dict of keyword arguments"
    )


@contextmanager
def _blame(what: str) -> Iterator[None]:
    """Report whatever the user's code raises: its type, message, file and line."""
    try:
        yield
    except SourceError:
        raise
    except (Exception, SystemExit) as exc:
        message = exc.msg if isinstance(exc, SyntaxError) else _first_line(exc)
        said = f"{type(exc).__name__}: {message}" if message else type(exc).__name__
        advice = "--debug shows the traceback"
        if isinstance(exc, ModuleNotFoundError):
            advice = f"install it for {sys.executable}, or mend its name"
        elif isinstance(exc, ImportError) and "relative import" in message:
            advice = "name a file of a package as package.module:name"
        elif isinstance(exc, SystemExit):
            advice = 'put what runs the program under `if __name__ == "__main__":`'
        raise SourceError(f"{what} raises {said}{_where(exc)}; {advice}") from exc


def _where(exc: BaseException) -> str:
    """Return " (file:line)" of the innermost line of the user's own code."""
    lines = [(Path(at.filename), at.lineno) for at in traceback.extract_tb(exc.__traceback__)]
    machinery = (Path(__file__), Path(importlib.__file__))
    lines = [each for each in lines if each[0].is_file() and each[0] not in machinery]
    lines = [each for each in lines if not _library(each[0])] or lines
    if isinstance(exc, SyntaxError) and exc.filename and Path(exc.filename).is_file():
        lines.append((Path(exc.filename), exc.lineno or 1))
    if not lines:
        return ""
    file, number = lines[-1]
    shown = file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file
    return f" ({shown}:{number})"


def _library(file: Path) -> bool:
    return file.is_relative_to(_stdlib) or bool({"site-packages", "dist-packages"} & {*file.parts})


def _first_line(value: object) -> str:
    return next((line.strip() for line in str(value).splitlines() if line.strip()), "")[:200]
