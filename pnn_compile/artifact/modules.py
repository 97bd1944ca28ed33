"""Store torch.nn modules as a class of an allow-list and its constructor arguments.

The arguments are recovered from attributes and checked on saving: a module that is built from them
must equal the original in representation, attributes, hooks and shapes.

>>> ModuleWriter().write(nn.Linear(3, 4, bias=False))
{'class': 'torch.nn.Linear', 'arguments': {'in_features': 3, 'out_features': 4, 'bias': False}}
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, TypedDict

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from passes.capture.model_copy import HOOKS
from passes.capture.refold import Attention, BatchNorm, GroupedMatmul, StochasticDepth
from passes.errors import ArtifactError
from passes.ir.held_values import nested_codes, plain_attributes
from passes.ir.module_walk import named_tensors
from pnn_compile.artifact.values import UnsupportedError, decode, encode

_NOT_LEAVES = (
    nn.Container, nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict,
    nn.Transformer, nn.TransformerEncoder, nn.TransformerDecoder, nn.modules.lazy.LazyModuleMixin,
    nn.CTCLoss,  # see functions.py
)  # fmt: skip
_PLACEMENT = ("device", "dtype")
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
"""How to recover constructor arguments that are not attributes of the same name."""


Parametrization = TypedDict("Parametrization", {"class": str, "arguments": dict[str, Any]})
"""Record of a parametrization: the function that registers it, and its encoded arguments."""

_PARAMETRIZATIONS: Mapping[type[nn.Module], tuple[Callable[..., nn.Module], tuple[str, ...]]] = {
    parametrizations._WeightNorm: (parametrizations.weight_norm, ("dim",)),
    parametrizations._SpectralNorm: (
        parametrizations.spectral_norm,
        ("n_power_iterations", "eps", "dim"),
    ),
}
"""Parametrizations that a module may have: what registers them, and its recoverable arguments."""

_REGISTER = {
    f"torch.nn.utils.parametrizations.{register.__name__}": (register, names)
    for register, names in _PARAMETRIZATIONS.values()
}
_MAX_POWER_ITERATIONS = 1000  # a file could ask for any number


@cache
def _classes() -> Mapping[str, type[nn.Module]]:
    """Return the classes that a stored program may contain, by name."""
    classes: dict[str, type[nn.Module]] = {
        # These names are part of the file format; the classes have moved since.
        "passes.restore.Attention": Attention,
        "passes.restore.BatchNorm": BatchNorm,
        "passes.capture.refold.StochasticDepth": StochasticDepth,
        "passes.capture.refold.GroupedMatmul": GroupedMatmul,
    }
    for name in torch.nn.modules.__all__:
        kind = getattr(torch.nn.modules, name)
        public = isinstance(kind, type) and issubclass(kind, nn.Module) and kind is not nn.Module
        if public and not issubclass(kind, _NOT_LEAVES):
            classes[f"torch.nn.{name}"] = kind
    return classes


@cache
def _class_names() -> Mapping[type[nn.Module], str]:
    return {kind: name for name, kind in _classes().items()}


@cache
def _parameters(name: str) -> Mapping[str, inspect.Parameter]:
    """Return the constructor parameters of a class, device and dtype included."""
    kind = _classes()[name]
    parameters = dict(inspect.signature(kind).parameters)
    if kind in (nn.RNN, nn.LSTM, nn.GRU):  # they pass *args and **kwargs to RNNBase
        parameters |= inspect.signature(nn.RNNBase).parameters
        del parameters["mode"]
    if kind in (nn.RNN, nn.GRU):
        del parameters["proj_size"]
    if kind is nn.RNN:
        parameters["nonlinearity"] = inspect.Parameter(
            "nonlinearity", inspect.Parameter.KEYWORD_ONLY
        )
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {name: parameter for name, parameter in parameters.items() if parameter.kind in named}


def is_container(module: nn.Module) -> bool:
    """Return whether a module only contains others, so that its class does not matter."""
    return type(module) is nn.Module


def build(
    name: str,
    arguments: Mapping[str, Any],
    parametrized: Mapping[str, Sequence[Parametrization]] | None = None,
) -> nn.Module:
    """Construct a module of the allow-list on the meta device.

    Args:
        name: Name of the class, such as `torch.nn.Conv2d`.
        arguments: Encoded constructor arguments.
        parametrized: Records of the parametrizations by the name of their parameter.

    Raises:
        ArtifactError: The class is not in the list, or does not take the arguments.
    """
    kind = _classes().get(name)
    if kind is None:
        raise ArtifactError(
            f"module class {name!r} is not among those that an artifact may contain"
        )
    parameters = _parameters(name)
    wrong = [key for key in arguments if key not in parameters or key in _PLACEMENT]
    if wrong:
        raise ArtifactError(f"{name} does not take the arguments {', '.join(map(repr, wrong))}")
    values = {key: decode(value) for key, value in arguments.items()}
    if "device" in parameters:
        values["device"] = "meta"
    try:
        module = kind(**values)
    except Exception as error:
        raise ArtifactError(f"{name} cannot be built from its arguments ({error})") from error
    for parameter, records in (parametrized or {}).items():
        for record in records:
            _parametrize(module, parameter, record["class"], record["arguments"])
    return module


def _parametrize(module: nn.Module, parameter: str, name: str, encoded: Mapping[str, Any]) -> None:
    """Register a parametrization of the list for a parameter of a module.

    Raises:
        ArtifactError: It is not in the list, or the module and the arguments do not fit it.
    """
    register, names = _REGISTER.get(name, (None, ()))
    arguments = {key: decode(value) for key, value in encoded.items()}
    iterations = arguments.get("n_power_iterations", 1)
    if register is None or not arguments.keys() <= set(names):
        raise ArtifactError(f"{name!r} is not a parametrization that an artifact may contain")
    if not isinstance(iterations, int) or iterations > _MAX_POWER_ITERATIONS:
        raise ArtifactError(f"{name} takes at most {_MAX_POWER_ITERATIONS} power iterations")
    try:
        register(module, parameter, **arguments)
    except Exception as error:
        raise ArtifactError(f"{name} does not fit {parameter!r} ({error})") from error


class ModuleWriter:
    """Recovers constructor arguments, and builds each distinct module once to check them."""

    def __init__(self) -> None:
        self._built: dict[str, nn.Module] = {}

    def write(self, module: nn.Module) -> dict[str, Any]:
        """Return the class name and the encoded constructor arguments of a module.

        Raises:
            UnsupportedError: The class is not in the list, or the arguments do not reproduce the
                module.
        """
        kind = _class(module)
        name = _class_names().get(kind)
        if name is None:
            raise UnsupportedError(f"module {kind.__module__}.{kind.__qualname__}")
        arguments, parametrized = _recover(module, name), _recover_parametrizations(module, name)
        key = json.dumps([name, arguments, parametrized])
        if key not in self._built:
            self._built[key] = build(name, arguments, parametrized)
        if reason := _difference(self._built[key], module):
            raise UnsupportedError(f"module {name} ({reason})")
        record = {"class": name, "arguments": arguments}
        return record | ({"parametrizations": parametrized} if parametrized else {})


def _class(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module; the one that it had before it was parametrized."""
    kind: type[nn.Module] = parametrize.type_before_parametrizations(module)
    return kind


def _recover_parametrizations(module: nn.Module, name: str) -> dict[str, list[Parametrization]]:
    """Describe the parametrizations of a module, by the name of their parameter."""
    if not parametrize.is_parametrized(module):
        return {}
    if isinstance(module, nn.RNNBase):  # it keeps a list of its weights
        raise UnsupportedError(f"module {name} with parametrized weights")
    records: dict[str, list[Parametrization]] = {}
    owner: Any = module.parametrizations
    for parameter, chain in owner.items():
        records[parameter] = []
        for part in chain:
            if type(part) not in _PARAMETRIZATIONS:
                kind = type(part)
                raise UnsupportedError(f"parametrization {kind.__module__}.{kind.__qualname__}")
            register, names = _PARAMETRIZATIONS[type(part)]
            values = {key: encode(getattr(part, key)) for key in names if hasattr(part, key)}
            kind_name = f"torch.nn.utils.parametrizations.{register.__name__}"
            records[parameter].append({"class": kind_name, "arguments": values})
    return records


def _recover(module: nn.Module, name: str) -> dict[str, Any]:
    arguments = {}
    special = _SPECIAL.get(_class(module), {})
    for key, parameter in _parameters(name).items():
        if key in _PLACEMENT:
            continue
        if key not in special and not hasattr(module, key):
            if parameter.default is inspect.Parameter.empty:
                raise UnsupportedError(f"module {name} (argument {key!r} is not stored)")
            continue  # an alias or deprecated: the comparison tells whether it mattered
        value = special[key](module) if key in special else getattr(module, key)
        if key == "bias" and not isinstance(value, bool):
            value = value is not None
        try:
            arguments[key] = encode(value)
        except UnsupportedError as error:
            raise UnsupportedError(f"module {name} (argument {key!r}: {error})") from error
    return arguments


def _difference(rebuilt: nn.Module, module: nn.Module) -> str:
    """Name a difference of a module from the one built from its arguments; "" if there is none."""
    expected_modules, modules = dict(rebuilt.named_modules()), dict(module.named_modules())
    if list(expected_modules) != list(modules):
        return "other submodules than its class creates"
    for path, child in modules.items():
        where = f" of {path}" if path else ""
        if _class(child) is not _class(expected_modules[path]):
            return f"another class{where}"
        if any(getattr(child, hooks) for hooks in HOOKS):
            return f"a hook{where}"
        attributes, expected = _attributes(child), _attributes(expected_modules[path])
        # Users attach attributes to layers; those that the class does not use do not matter.
        unused = {name for name in attributes.keys() - expected.keys() if _is_unused(child, name)}
        names = sorted({*attributes, *expected} - unused)
        changed = [n for n in names if attributes.get(n, names) != expected.get(n, names)]
        if changed:
            return f"attribute {changed[0]!r}{where} differs"
    if _state(rebuilt) != _state(module):
        return "other parameters, buffers or shapes"
    return "" if repr(rebuilt) == repr(module) else "another representation"


def _is_unused(module: nn.Module, name: str) -> bool:
    """Return whether the class of a module neither has an attribute nor mentions its name."""
    kind: Any = _class(module)
    return not hasattr(kind, name) and name not in _names_in_code(kind)


@cache
def _names_in_code(kind: type[Any]) -> frozenset[str]:
    """Return the names and strings in the code of a class, nested functions included."""
    members = (value for base in kind.__mro__ for value in vars(base).values())
    functions = (inspect.unwrap(_function(member)) for member in members)
    outer = (getattr(function, "__code__", None) for function in functions)
    codes = [code for one in outer if one is not None for code in nested_codes(one)]
    constants = (constant for code in codes for constant in code.co_consts)
    names = {name for code in codes for name in code.co_names}
    return frozenset(names.union(text for text in constants if isinstance(text, str)))


def _function(value: Any) -> Any:
    """Return the function of a method, static method or property."""
    return getattr(value, "__func__", None) or getattr(value, "fget", None) or value


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Return the attributes of an instance apart from tensors and submodules.

    Private ones only if they are plain values or shadow an attribute of the class.
    """
    return {
        name: value if _is_plain(value) or callable(value) else object()  # equal to nothing
        for name, value in plain_attributes(module).items()
        if not name.startswith("_") or _is_plain(value) or hasattr(type(module), name)
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _state(module: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Return kind, persistence and shape of all tensors by name."""
    transient = {
        f"{path}.{name}".lstrip(".")
        for path, child in module.named_modules()
        for name in child._non_persistent_buffers_set
    }
    return {
        name: (isinstance(value, nn.Parameter), name not in transient, value.shape)
        for name, value in named_tensors(module, repeats=True)
    }


def training_modes(module: nn.Module) -> dict[str, Any]:
    """Describe the training mode of a module, and name its submodules in the other mode."""
    default = module.training
    children = module.named_modules(remove_duplicate=False)
    return {
        "default": default,
        "except": [name for name, child in children if child.training != default],
    }


def set_training_modes(module: nn.Module, data: Mapping[str, Any]) -> None:
    """Set the modes that `training_modes` described."""
    exceptions, default = set(data["except"]), data["default"]
    for name, child in module.named_modules(remove_duplicate=False):
        child.training = default != (name in exceptions)
