"""Restore torch.nn modules in a captured graph, so that train() and eval() work on it again.

Two passes: `outline` folds the operators of one module call back into the call, for modules that
take one tensor and give one; `toggle` turns what is left of operators with a training flag into
modules that follow the mode. The rules of `toggle` are data.
"""

from __future__ import annotations

import inspect
import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx.operator_schemas import normalize_function
from torch.nn import functional as F

from passes.capture.fx_trace import is_leaf
from passes.ir.mode_layers import Attention, BatchNorm
from passes.ir.program import Provenance, provenance, resolve, set_provenance

__all__ = ["CALL_KEY", "attach", "flagged_call", "free_path", "outline", "rule_key", "toggle"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Rule:
    """Turns calls of `targets` into a call of the module that `build` makes.

    `build` gets the call's arguments by name and returns the module, and the names of the
    arguments that the module is called with; None where the call has nothing to toggle.
    """

    targets: tuple[Any, ...]
    build: Callable[[Mapping[str, Any]], tuple[nn.Module, tuple[str, ...]] | None]


def _dropout(
    kind: type[nn.Module], *, inplace: bool = False
) -> Callable[[Mapping[str, Any]], tuple[nn.Module, tuple[str, ...]]]:
    def build(call: Mapping[str, Any]) -> tuple[nn.Module, tuple[str, ...]]:
        return kind(float(call["p"]), bool(call.get("inplace", inplace))), ("input",)

    return build


def _rrelu(call: Mapping[str, Any]) -> tuple[nn.Module, tuple[str, ...]]:
    lower, upper = float(call.get("lower", 1 / 8)), float(call.get("upper", 1 / 3))
    module = nn.RReLU(lower, upper, bool(call.get("inplace", False)))
    return module, ("input" if "input" in call else "self",)


def _attention(call: Mapping[str, Any]) -> tuple[nn.Module, tuple[str, ...]] | None:
    if not call.get("dropout_p"):
        return None
    module = Attention(float(call["dropout_p"]), bool(call.get("is_causal", False)))
    return module, ("query", "key", "value", "attn_mask", "scale", "enable_gqa")


def _batch_norm(call: Mapping[str, Any]) -> tuple[nn.Module, tuple[str, ...]] | None:
    if call.get("running_mean") is None or call.get("running_var") is None:
        return None  # without statistics the batch's own are used in either mode
    module = BatchNorm(float(call.get("momentum", 0.1)), float(call.get("eps", 1e-5)))
    return module, ("input", "running_mean", "running_var", "weight", "bias")


RULES: tuple[Rule, ...] = (
    # Dropout by function or by operator: the probability stays, the flag follows the mode.
    Rule((F.dropout, torch.dropout, aten.dropout.default), _dropout(nn.Dropout)),
    Rule((torch.dropout_, aten.dropout_.default), _dropout(nn.Dropout, inplace=True)),
    Rule(
        (F.alpha_dropout, torch.alpha_dropout, aten.alpha_dropout.default),
        _dropout(nn.AlphaDropout),
    ),
    Rule(
        (F.feature_alpha_dropout, torch.feature_alpha_dropout, aten.feature_alpha_dropout.default),
        _dropout(nn.FeatureAlphaDropout),
    ),
    # Whole channels; the three functions differ only in the ranks that they accept.
    Rule((F.dropout1d,), _dropout(nn.Dropout1d)),
    Rule(
        (F.dropout2d, torch.feature_dropout, aten.feature_dropout.default), _dropout(nn.Dropout2d)
    ),
    Rule((F.dropout3d,), _dropout(nn.Dropout3d)),
    # Random slopes in training mode, their mean in evaluation mode.
    Rule((F.rrelu, torch.rrelu, aten.rrelu.default), _rrelu),
    # Attention drops probabilities inside the kernel.
    Rule((F.scaled_dot_product_attention, aten.scaled_dot_product_attention.default), _attention),
    # Written with its own buffers, as layers that fuse norm and activation do.
    Rule((F.batch_norm, torch.batch_norm, aten.batch_norm.default), _batch_norm),
)

_FLAGS = ("training", "train", "dropout_p", "cudnn_enabled")
_RULE_KEY = "pnn_rule"


def rule_key(node: fx.Node) -> tuple[Any, ...] | None:
    """What a call has in common in both modes, if a rule covers it and its flag is off.

    A module that `toggle` made has the key of the call that it replaced, for it is off in
    evaluation mode.
    """
    if (key := node.meta.get(_RULE_KEY)) is not None:
        return tuple(key)
    call = flagged_call(node)
    if call is None or call.get("training", call.get("train", call.get("dropout_p"))):
        return None
    return _key_of(node, call)


def _key_of(node: fx.Node, call: Mapping[str, Any]) -> tuple[Any, ...]:
    given = [f"{name}={_sign(value)}" for name, value in call.items() if name not in _FLAGS]
    return provenance(node).path, node.target, *given


def _sign(value: Any) -> str:
    return "%" if isinstance(value, fx.Node) else repr(value)


def flagged_call(node: fx.Node) -> Mapping[str, Any] | None:
    """Return the arguments, in the order of the signature, of a call that a rule covers."""
    target = node.target
    if isinstance(target, str) or not any(target in rule.targets for rule in RULES):
        return None
    normal = normalize_function(
        target, node.args, dict(node.kwargs), normalize_to_only_use_kwargs=True
    )
    return None if normal is None else normal.kwargs


def toggle(model: nn.Module, graph: fx.Graph) -> int:
    """Replace operators that carry a training flag by modules that follow the mode.

    The new modules are added to `model` under the path that the operator came from. A flag that
    is already off in a graph captured in training mode never turns on, and stays.

    Returns:
        How many nodes were replaced.
    """
    rules = {target: rule for rule in RULES for target in rule.targets}
    count = 0
    for node in list(graph.nodes):
        call = flagged_call(node)
        if call is None or call.get("training", call.get("train")) is False:
            continue
        made = rules[node.target].build(call)
        if made is None:
            continue
        module, names = made
        path = free_path(model, provenance(node).path, node.name)
        attach(model, path, module)
        values = {name: value for name, value in call.items() if name in names[1:]}
        key = _key_of(node, call)
        _replace_by_call(node, path, (call[names[0]],), values).meta[_RULE_KEY] = key
        count += 1
    return count


def free_path(model: nn.Module, parent: str, name: str) -> str:
    """Return a qualified name below `parent` that no attribute has, much like `name`."""
    try:
        owner = resolve(model, parent) if parent else model
    except AttributeError:
        owner = None
    while hasattr(owner, name):
        name += "_"
    return f"{parent}.{name}".lstrip(".")


def attach(model: nn.Module, path: str, module: nn.Module) -> None:
    """Register `module` under a qualified name, making the modules on the way as needed.

    What is new follows the mode of the module that it is put in.
    """
    *parents, name = path.split(".")
    for atom in parents:
        if atom not in dict(model.named_children()):
            model.add_module(atom, nn.Module().train(model.training))
        model = model.get_submodule(atom)
    model.add_module(name, module.train(model.training))


def outline(model: nn.Module, graph: fx.Graph) -> int:
    """Fold the operators of each torch.nn module call back into one call of that module.

    Operators belong together when they were made by the same call of the same module; they are
    folded if they follow each other, and the module takes one tensor and gives one tensor. The
    operators of other modules (recurrent ones, attention) stay.

    Returns:
        How many module calls were restored.
    """
    calls = [node for node in graph.nodes if node.op == "call_function"]
    groups = [
        (call, list(nodes))
        for call, nodes in itertools.groupby(calls, lambda node: node.meta.get(CALL_KEY, ""))
    ]
    times = Counter(call for call, _ in groups)
    return sum(_fold(model, nodes) for call, nodes in groups if call and times[call] == 1)


CALL_KEY = "pnn_module_call"
"""Key of node.meta under which a front end notes which call of which module made the node."""


def _fold(model: nn.Module, nodes: list[fx.Node]) -> bool:
    path = provenance(nodes[0]).path
    if not path or not _takes_and_gives_one(resolve(model, path)):
        return False
    inside = set(nodes)
    read = {
        source
        for node in nodes
        for source in node.all_input_nodes
        if source not in inside and source.op != "get_attr"
    }
    results = [node for node in nodes if any(user not in inside for user in node.users)]
    if len(read) != 1 or len(results) > 1:
        return False
    (source,) = read
    result = results[0] if results else nodes[-1]  # a result that nothing reads: statistics alone
    _replace_by_call(result, path, (source,), {})
    for node in reversed(nodes):
        if node is not result:
            node.graph.erase_node(node)
    return True


def _takes_and_gives_one(module: nn.Module) -> bool:
    if not is_leaf(module) or getattr(module, "return_indices", False):
        return False
    return len(inspect.signature(module.forward).parameters) == 1


def _replace_by_call(
    node: fx.Node, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> fx.Node:
    graph = node.graph
    with graph.inserting_after(node):
        call = graph.create_node("call_module", path, args, kwargs)
    set_provenance(call, Provenance(path, provenance(node).source))
    node.replace_all_uses_with(call)
    graph.erase_node(node)
    return call
