"""Look up the functions, operators and methods that a stored graph may call, by name.

The tables are built from torch's own lists. A name from a file is looked up in them before anything
is resolved by attribute access. Excluded is what does I/O, exposes memory, takes callables, or
trusts the bytes of its arguments (packed weights):

    torch.nn.functional.gelu, operator.getitem, torch.ops.aten.add.Tensor    listed
    torch.load, builtins.eval, torch.ops.aten.from_file.default              not listed
"""

from __future__ import annotations

import builtins
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from passes.errors import ArtifactError
from pnn_compile.artifact.values import UnsupportedError


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


ATTRIBUTES = _words(
    "shape dtype device ndim T mT H mH real imag is_cuda "
    # fields of the named tuples that torch.max, torch.topk, torch.linalg.svd and others return
    "values indices Q R U S Vh eigenvalues eigenvectors"
)
"""Attributes that a graph may read with `getattr`."""

_NAMESPACES: tuple[tuple[str, Any], ...] = (
    ("torch.nn.functional", F),
    ("torch.linalg", torch.linalg),
    ("torch.fft", torch.fft),
    ("torch.special", torch.special),
    ("torch", torch),
)

_CREATION = _words(
    "arange as_tensor bartlett_window blackman_window empty empty_strided eye full hamming_window "
    "hann_window kaiser_window linspace logspace normal ones rand rand_like randint randint_like "
    "randn randn_like randperm range scalar_tensor tensor tril_indices triu_indices vander zeros"
)
"""Public functions of torch that create tensors; torch does not list them as overridable."""

_OPERATOR = _words(
    "abs add and_ eq floordiv ge getitem gt iadd iand ifloordiv ilshift imatmul imod imul inv "
    "invert ior ipow irshift is_ is_not isub itruediv ixor le lshift lt matmul mod mul ne neg "
    "not_ or_ pos pow rshift sub truediv truth xor"
)

_MATH = _words(
    "acos asin atan atan2 ceil copysign cos cosh erf erfc exp expm1 fabs floor fmod gcd isfinite "
    "isinf isnan isqrt log log10 log1p log2 pow prod sin sinh sqrt tan tanh trunc"
)

_EXCLUDED = re.compile(
    "autocast|lobpcg|from_file|record_stream|set_?|set_data|resize.*|fbgemm_.*|quantized_.*"
    "|cudnn_.*|miopen_.*|mkldnn_.*|sparse_.*|triplet_margin_with_distance_loss"
    # These trust sizes and indices of their operands: with others they crash the process.
    "|.*_backward(_.*)?|segment_reduce|ctc_loss|lu_unpack|(linalg_)?(lu|ldl)_solve"
    "|(linalg_)?eig(vals)?|promote_types"
    "|batch_norm_(?!inference).*|quantize_per_.*|choose_qparams.*"
)

_FRAGILE = re.compile(
    "_fft_.*|_weight_norm.*|_embedding_bag.*|_convolution.*|(lstm|gru|rnn_tanh|rnn_relu)(_cell)?"
    "|_?native_batch_norm.*"
)
"""Operators that trust sizes of their operands, but follow shapes without data safely."""

_EXCLUDED_METHODS = _words(
    "apply_ as_subclass backward const_data_ptr data_ptr map2_ map_ module_load numpy "
    "pin_memory register_hook register_post_accumulate_grad_hook reinforce retain_grad "
    "share_memory_ storage storage_type untyped_storage"
)

_PRIVATE_ATEN = re.compile(
    "__(and|or|xor|lshift|rshift|iand|ior|ixor|ilshift|irshift)__"
    "|_adaptive_avg_pool[23]d|_assert_async|_conj|_convolution|_embedding_bag|_fft_.*"
    "|_log_softmax|_native_batch_norm_legit.*|_prelu_kernel|_safe_softmax|_softmax|_to_copy"
    "|_scaled_dot_product_(flash|efficient|cudnn)_attention(_for_cpu)?|_unsafe_(view|index)"
    "|_scaled_dot_product_attention_math|_upsample_.*|_weight_norm(_interface)?"
)
"""Operators of ATen with a leading underscore that occur in captured programs."""

_ATEN = "torch.ops.aten."


@cache
def _functions() -> Mapping[str, Callable[..., Any]]:
    """Return all functions of the list, by qualified name."""
    overridable = {id(f) for group in torch.overrides.get_overridable_functions().values()
                   for f in group}  # fmt: skip
    table: dict[str, Callable[..., Any]] = {}
    for prefix, namespace in _NAMESPACES:
        for name in dir(namespace):
            value = getattr(namespace, name)
            allowed = id(value) in overridable and not _EXCLUDED.fullmatch(name)
            if allowed and callable(value) and not name.startswith("_"):
                table[f"{prefix}.{name}"] = value
    table |= {f"torch.{name}": getattr(torch, name) for name in _CREATION}
    table |= {f"operator.{name}": getattr(operator, name) for name in _OPERATOR}
    table |= {f"math.{name}": getattr(math, name) for name in _MATH}
    table["builtins.getattr"] = builtins.getattr
    table["torch._assert"] = torch._assert
    return table


@cache
def _names() -> Mapping[int, str]:
    """Return qualified names by identity of the function; the first namespace in order wins."""
    return {id(value): name for name, value in reversed(list(_functions().items()))}


@cache
def _aten() -> frozenset[str]:
    """Return the operator overloads of ATen in the dispatcher, such as `add.Tensor`."""
    return frozenset(_allowed_aten(torch._C._dispatch_get_all_op_names()))


def _allowed_aten(names: list[str]) -> Iterator[str]:
    for qualified in names:
        namespace, _, operator_name = qualified.partition("::")
        name, _, overload = operator_name.partition(".")
        if namespace != "aten" or _EXCLUDED.fullmatch(name):
            continue
        if not name.startswith("_") or _PRIVATE_ATEN.fullmatch(name):
            yield f"{name}.{overload or 'default'}"


def function_name(target: Any) -> str:
    """Return the qualified name that stands for a function in a stored graph.

    Raises:
        UnsupportedError: The function is not in the list.
    """
    if isinstance(target, torch._ops.OpOverload):
        name = f"{target._schema.name.partition('::')[2]}.{target._overloadname}"
        if target.namespace == "aten" and name in _aten():
            return _ATEN + name
        raise UnsupportedError(f"operator {target}")
    listed = _names().get(id(target))
    if listed is None:
        label = getattr(target, "__qualname__", None) or repr(target)
        raise UnsupportedError(f"function {getattr(target, '__module__', '?')}.{label}")
    return listed


def function(name: str) -> Callable[..., Any]:
    """Return the function of a qualified name.

    Raises:
        ArtifactError: The name is not in the list.
    """
    if name.startswith(_ATEN) and name.removeprefix(_ATEN) in _aten():
        packet, _, overload = name.removeprefix(_ATEN).partition(".")
        operator_overload: Callable[..., Any] = getattr(getattr(torch.ops.aten, packet), overload)
        return operator_overload
    if name not in _functions():
        raise ArtifactError(f"function {name!r} is not among those that a graph may call")
    return _functions()[name]


def is_fragile(target: Any) -> bool:
    """Return whether an operator may only run where its operands are known to fit."""
    operator_name = target._schema.name if isinstance(target, torch._ops.OpOverload) else ""
    return _FRAGILE.fullmatch(operator_name.partition("::")[2]) is not None


def check_operands(target: Any, args: tuple[Any, ...]) -> None:
    """Check what following the shapes does not: that statistics have a value for every channel.

    Raises:
        ArtifactError: They do not.
    """
    if is_fragile(target) and "batch_norm" in str(target):
        x, *statistics = (value for value in args[:5] if isinstance(value, torch.Tensor))
        if any(value.shape != x.shape[1:2] for value in statistics):
            raise ArtifactError(f"{target} gets statistics of another number of channels")


_ENUM_TYPES = {
    "ScalarType": torch.dtype,
    "Layout": torch.layout,
    "MemoryFormat": torch.memory_format,
}


def check_enums(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Check that an operator gets no number for a dtype: it would take it for its code, unchecked.

    Raises:
        UnsupportedError: It gets one.
    """
    if not isinstance(target, torch._ops.OpOverload):
        return
    arguments = target._schema.arguments
    values = dict(zip((argument.name for argument in arguments), args, strict=False)) | {**kwargs}
    for argument in arguments:
        kind = _ENUM_TYPES.get(re.sub(r"Optional\[(.*)\]", r"\1", str(argument.real_type)))
        value = values.get(argument.name)
        is_read = isinstance(value, fx.Node) and value.target is getattr
        if kind is not None and value is not None and not (is_read or isinstance(value, kind)):
            raise UnsupportedError(f"{argument.name}={value!r} of {target}")


@cache
def _methods() -> frozenset[str]:
    return frozenset(
        name
        for name in dir(torch.Tensor)
        if not name.startswith("_")
        and name not in _EXCLUDED_METHODS
        and not _EXCLUDED.fullmatch(name)
        and callable(getattr(torch.Tensor, name))
    )


def check_method(name: str) -> str:
    """Return the name of a tensor method if a graph may call it.

    Raises:
        UnsupportedError: The method is not in the list.
    """
    if name not in _methods():
        raise UnsupportedError(f"method {name!r}")
    return name


def check_attribute(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Check that the arguments of a call of `getattr` name an attribute of the list.

    Raises:
        UnsupportedError: The attribute is not in the list.
    """
    if kwargs or len(args) != 2 or args[1] not in ATTRIBUTES:
        raise UnsupportedError(f"getattr of {', '.join(map(repr, args[1:])) or 'nothing'}")
