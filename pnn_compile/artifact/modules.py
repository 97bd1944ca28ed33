"""torch.nn modules as data: a class of an allow-list and the arguments that construct it again.

The arguments are read off the attributes of the module and proven when it is saved: a module that
is built from them must equal the original in representation, attributes, hooks and shapes.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from types import CodeType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from passes.capture.refold import Attention, BatchNorm
from passes.errors import ArtifactError
from pnn_compile.artifact.errors import UnknownError
from pnn_compile.artifact.values import decode, encode

__all__ = ["ModuleWriter", "build", "is_container", "named_tensors"]

_NOT_LEAVES = (
    nn.Container, nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict,
    nn.Transformer, nn.TransformerEncoder, nn.TransformerDecoder, nn.modules.lazy.LazyModuleMixin,
)  # fmt: skip
_PLACEMENT = ("device", "dtype")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OWN = frozenset(vars(nn.Module()))
_ACTIVATIONS = {F.relu: "relu", F.gelu: "gelu"}

_Recover = Mapping[str, Callable[[Any], Any]]
_TRANSFORMER_LAYER: _Recover = {
    "d_model": lambda m: m.self_attn.embed_dim,
    "nhead": lambda m: m.self_attn.num_heads,
    "dim_feedforward": lambda m: m.linear1.out_features,
    "dropout": lambda m: m.dropout.p,
    "activation": lambda m: _ACTIVATIONS.get(m.activation),
    "layer_norm_eps": lambda m: m.norm1.eps,
    "batch_first": lambda m: m.self_attn.batch_first,
    "bias": lambda m: m.linear1.bias is not None,
}
_SPECIAL: Mapping[type[nn.Module], _Recover] = {
    nn.MultiheadAttention: {
        "bias": lambda m: m.in_proj_bias is not None,
        "add_bias_kv": lambda m: m.bias_k is not None,
    },
    nn.TransformerEncoderLayer: _TRANSFORMER_LAYER,
    nn.TransformerDecoderLayer: _TRANSFORMER_LAYER,
    nn.AdaptiveLogSoftmaxWithLoss: {"cutoffs": lambda m: m.cutoffs[:-1]},
}
"""Constructor arguments that are not kept under their own name."""


@cache
def _classes() -> Mapping[str, type[nn.Module]]:
    """The classes that a graph file may name."""
    found: dict[str, type[nn.Module]] = {
        # By the names that they had when the format was made: artifacts hold them.
        "passes.restore.Attention": Attention,
        "passes.restore.BatchNorm": BatchNorm,
    }
    for name in torch.nn.modules.__all__:
        kind = getattr(torch.nn.modules, name)
        public = isinstance(kind, type) and issubclass(kind, nn.Module) and kind is not nn.Module
        if public and not issubclass(kind, _NOT_LEAVES):
            found[f"torch.nn.{name}"] = kind
    return found


@cache
def _class_names() -> Mapping[type[nn.Module], str]:
    return {kind: name for name, kind in _classes().items()}


@cache
def _parameters(name: str) -> Mapping[str, inspect.Parameter]:
    """The constructor parameters of a class of the list, those of placement included."""
    kind = _classes()[name]
    own = dict(inspect.signature(kind).parameters)
    if kind in (nn.RNN, nn.LSTM, nn.GRU):  # they pass on whatever they get
        own |= inspect.signature(nn.RNNBase).parameters
        del own["mode"]
    if kind in (nn.RNN, nn.GRU):
        del own["proj_size"]
    if kind is nn.RNN:
        own["nonlinearity"] = inspect.Parameter("nonlinearity", inspect.Parameter.KEYWORD_ONLY)
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {name: parameter for name, parameter in own.items() if parameter.kind in named}


def is_container(module: nn.Module) -> bool:
    """Whether a module only holds others, so that its class does not matter."""
    return type(module) is nn.Module


def named_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield every parameter and buffer under every name that it has."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def build(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Construct a module of the allow-list on the meta device.

    Args:
        name: Name of the class, such as `torch.nn.Conv2d`.
        arguments: Encoded constructor arguments.

    Raises:
        ArtifactError: The class is not in the list, or does not take the arguments.
    """
    kind = _classes().get(name)
    if kind is None:
        raise ArtifactError(f"module class {name!r} is not among those that an artifact may hold")
    parameters = _parameters(name)
    wrong = [key for key in arguments if key not in parameters or key in _PLACEMENT]
    if wrong:
        raise ArtifactError(f"{name} does not take the arguments {', '.join(map(repr, wrong))}")
    values = {key: decode(value) for key, value in arguments.items()}
    if "device" in parameters:
        values["device"] = "meta"
    try:
        return kind(**values)
    except Exception as error:
        raise ArtifactError(f"{name} cannot be built from its arguments ({error})") from error


class ModuleWriter:
    """Recovers constructor arguments; builds each kind of module once to prove them."""

    def __init__(self) -> None:
        self._proven: dict[str, nn.Module] = {}

    def write(self, module: nn.Module) -> dict[str, Any]:
        """Return the class name and the encoded constructor arguments of a module.

        Raises:
            UnknownError: The class is not in the list, or its arguments do not give the module.
        """
        name = _class_names().get(type(module))
        if name is None:
            raise UnknownError(f"module {type(module).__module__}.{type(module).__qualname__}")
        arguments = _recover(module, name)
        key = json.dumps([name, arguments])
        if key not in self._proven:
            self._proven[key] = build(name, arguments)
        if reason := _difference(self._proven[key], module):
            raise UnknownError(f"module {name} ({reason})")
        return {"class": name, "arguments": arguments}


def _recover(module: nn.Module, name: str) -> dict[str, Any]:
    arguments = {}
    special = _SPECIAL.get(type(module), {})
    for key, parameter in _parameters(name).items():
        if key in _PLACEMENT:
            continue
        if key not in special and not hasattr(module, key):
            if parameter.default is inspect.Parameter.empty:
                raise UnknownError(f"module {name} (argument {key!r} is not kept)")
            continue  # an alias or a deprecated argument: the comparison decides
        value = special[key](module) if key in special else getattr(module, key)
        if key == "bias" and not isinstance(value, bool):
            value = value is not None
        try:
            arguments[key] = encode(value)
        except UnknownError as error:
            raise UnknownError(f"module {name} (argument {key!r}: {error})") from error
    return arguments


def _difference(made: nn.Module, module: nn.Module) -> str:
    """Say in what a module differs from the one that its arguments make; "" if in nothing."""
    children, wanted = dict(made.named_modules()), dict(module.named_modules())
    if list(children) != list(wanted):
        return "other submodules than its class makes"
    for path, child in wanted.items():
        where = f" of {path}" if path else ""
        if type(child) is not type(children[path]):
            return f"another class{where}"
        if any(getattr(child, hooks) for hooks in _HOOKS):
            return f"a hook{where}"
        attributes, expected = _attributes(child), _attributes(children[path])
        # A note that somebody left on the layer, and that its code does not look at, is no part.
        notes = {name for name in attributes.keys() - expected.keys() if _is_note(child, name)}
        names = sorted({*attributes, *expected} - notes)
        changed = [n for n in names if attributes.get(n, names) != expected.get(n, names)]
        if changed:
            return f"attribute {changed[0]!r}{where} differs"
    if _state(made) != _state(module):
        return "other parameters, buffers or shapes"
    return "" if repr(made) == repr(module) else "another representation"


def _is_note(module: nn.Module, name: str) -> bool:
    """Whether an attribute of an instance is none that its class has, or whose name it mentions."""
    kind: Any = type(module)
    return not hasattr(kind, name) and name not in _mentioned(kind)


@cache
def _mentioned(kind: type[Any]) -> frozenset[str]:
    """Every name and text in the code of a class, nested functions included."""
    found: set[str] = set()
    pending = [
        code
        for base in kind.__mro__
        for value in vars(base).values()
        if (code := getattr(inspect.unwrap(_function(value)), "__code__", None)) is not None
    ]
    while pending:
        code = pending.pop()
        found.update(code.co_names, (text for text in code.co_consts if isinstance(text, str)))
        pending += [inner for inner in code.co_consts if isinstance(inner, CodeType)]
    return frozenset(found)


def _function(value: Any) -> Any:
    """The function of a method, static method or property."""
    return getattr(value, "__func__", None) or getattr(value, "fget", None) or value


def _attributes(module: nn.Module) -> dict[str, Any]:
    """What an instance holds beside tensors and submodules.

    Private values if they are plain, or stand in the place of a method of the class.
    """
    own = {name: value for name, value in vars(module).items() if name not in _OWN}
    return {
        name: value if _is_plain(value) or callable(value) else object()  # equal to nothing
        for name, value in own.items()
        if not name.startswith("_") or _is_plain(value) or hasattr(type(module), name)
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _state(module: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Kind, persistence and shape of every tensor by name."""
    transient = {
        f"{path}.{name}".lstrip(".")
        for path, child in module.named_modules()
        for name in child._non_persistent_buffers_set
    }
    return {
        name: (isinstance(value, nn.Parameter), name not in transient, value.shape)
        for name, value in named_tensors(module)
    }
