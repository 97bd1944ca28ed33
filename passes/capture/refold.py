"""Restore torch.nn modules in a captured graph, so that train() and eval() work on it again.

Two passes: `outline` folds the operators of one module call back into the call, for modules with
one tensor as argument and one as result. `toggle` replaces the remaining operators that have a
training flag by modules that follow the mode, by a table of rules. Where torch.nn has no such
module, `Attention` and `BatchNorm` take the place of the operator; artifacts store them by class
name and options.

>>> model = nn.Sequential()
>>> graph = fx.symbolic_trace(lambda x: F.dropout(x, 0.1, True)).graph
>>> toggle(model, graph), model.get_submodule("dropout")
(1, Dropout(p=0.1, inplace=False))
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

from passes.capture.fx_trace import is_leaf, parametrizing_code
from passes.ir.program import Provenance, provenance, resolve, set_provenance

aten = torch.ops.aten


class Attention(nn.Module):
    """Apply scaled dot-product attention with dropout in training mode only.

    Args:
        dropout_p: Probability of dropping an attention weight.
        is_causal: Whether to mask later positions.
    """

    def __init__(self, dropout_p: float, is_causal: bool = False) -> None:
        super().__init__()
        self.dropout_p = dropout_p
        self.is_causal = is_causal

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        """Attend to keys and values.

        Args:
            query: Queries `[B, H, T, D]`.
            key: Keys `[B, H, S, D]`.
            value: Values `[B, H, S, D]`.
            attn_mask: Mask that broadcasts to `[B, H, T, S]`: True, or the bias to add.
            scale: Factor of the scores; `D**-0.5` if None.
            enable_gqa: Whether keys and values may have fewer heads than queries.

        Returns:
            The mean of the values under the attention weights, `[B, H, T, D]`.
        """
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask,
            self.dropout_p if self.training else 0.0,
            self.is_causal, scale=scale, enable_gqa=enable_gqa,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """Return the options for the module's `repr`."""
        return f"dropout_p={self.dropout_p}, is_causal={self.is_causal}"


def dropouts(network: nn.Module) -> list[nn.Module]:
    """Return the modules that drop values at random in training mode and change nothing else."""
    return [
        module
        for module in network.modules()
        if isinstance(module, Attention | StochasticDepth)
        or (isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0)
        or (isinstance(module, nn.MultiheadAttention) and module.dropout > 0)
    ]


class BatchNorm(nn.Module):
    """Apply batch normalization with running statistics that another module owns.

    Args:
        momentum: Weight of the batch in the update of the running statistics.
        eps: Constant added to the variance.
    """

    def __init__(self, momentum: float, eps: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.eps = eps

    def forward(
        self,
        input: torch.Tensor,
        running_mean: torch.Tensor,
        running_var: torch.Tensor,
        weight: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Normalize `[B, C, ...]`: by the batch in training mode, which updates the statistics."""
        return F.batch_norm(
            input, running_mean, running_var, weight, bias, self.training, self.momentum, self.eps
        )

    def extra_repr(self) -> str:
        """Return the options for the module's `repr`."""
        return f"momentum={self.momentum}, eps={self.eps}"


def batch_norms(network: nn.Module) -> list[nn.Module]:
    """Return the modules that normalize by the batch in training mode, else by statistics."""
    kinds = (BatchNorm, nn.modules.batchnorm._BatchNorm)
    return [module for module in network.modules() if isinstance(module, kinds)]


class StochasticDepth(nn.Module):
    """Drop samples, or the whole batch, at random in training mode, as torchvision's layers do.

    Args:
        p: Probability of dropping.
        mode: "row" to drop every sample by itself, "batch" to drop all or none.
    """

    def __init__(self, p: float, mode: str) -> None:
        super().__init__()
        self.p = p
        self.mode = mode

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Scale what is kept by `1 / (1 - p)`; draws the numbers that torchvision would."""
        if not self.training or self.p == 0.0:
            return input
        rows = input.shape[0] if self.mode == "row" else 1
        noise = input.new_empty([rows] + [1] * (input.dim() - 1)).bernoulli_(1.0 - self.p)
        return input * (noise.div_(1.0 - self.p) if self.p < 1.0 else noise)

    def extra_repr(self) -> str:
        """Return the options for the module's `repr`."""
        return f"p={self.p}, mode={self.mode}"


class GroupedMatmul(nn.Module):
    """Multiply groups of rows by one matrix each, as a layer of experts does."""

    def forward(
        self, input: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor
    ) -> torch.Tensor:
        """Multiply rows that are sorted by their group.

        Args:
            input: Rows `[S, D]`.
            weight: Matrices `[G, D, E]`.
            offs: Number of rows up to the end of each group, `[G]`; rows after the last give zeros.

        Returns:
            The products, `[S, E]`.
        """
        if input.is_meta or torch.compiler.is_compiling():  # the sizes of the groups are data
            rows = torch.arange(input.shape[0], device=input.device)
            group = (rows[:, None] >= offs).sum(1)
            last = weight.shape[0] - 1
            product = torch.bmm(input[:, None], weight[group.clamp(max=last)])[:, 0]
            return product * (group <= last)[:, None]
        ends = offs.tolist()
        bounds = zip([0, *ends], ends, weight, strict=False)
        parts = [input[start:end] @ matrix for start, end, matrix in bounds]
        rest = input.new_zeros(input.shape[0] - ends[-1], weight.shape[2])
        return torch.cat([*parts, rest])


@dataclass(frozen=True)
class Rule:
    """Replacement of an operator by a module that follows the mode, or that artifacts can store.

    Attributes:
        targets: Functions and operators that the rule covers; qualified names of functions of
            libraries that may be missing.
        build: Called with the arguments of the call by name; returns the module and the names of
            the arguments that the module is called with, or None if there is nothing to toggle.
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


def _stochastic_depth(call: Mapping[str, Any]) -> tuple[nn.Module, tuple[str, ...]]:
    return StochasticDepth(float(call["p"]), str(call["mode"])), ("input",)


def _grouped_matmul(call: Mapping[str, Any]) -> tuple[nn.Module, tuple[str, ...]]:
    return GroupedMatmul(), ("input", "weight", "offs")


def _batch_norm(call: Mapping[str, Any]) -> tuple[nn.Module, tuple[str, ...]] | None:
    if call.get("running_mean") is None or call.get("running_var") is None:
        return None  # without running statistics, both modes normalize by the batch
    module = BatchNorm(float(call.get("momentum", 0.1)), float(call.get("eps", 1e-5)))
    return module, ("input", "running_mean", "running_var", "weight", "bias")


RULES: tuple[Rule, ...] = (
    # Dropout: the probability stays, the flag follows the mode.
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
    # Dropout of whole channels; the functions differ only in the ranks that they accept.
    Rule((F.dropout1d,), _dropout(nn.Dropout1d)),
    Rule(
        (F.dropout2d, torch.feature_dropout, aten.feature_dropout.default), _dropout(nn.Dropout2d)
    ),
    Rule((F.dropout3d,), _dropout(nn.Dropout3d)),
    # Random slopes in training mode, their mean in evaluation mode.
    Rule((F.rrelu, torch.rrelu, aten.rrelu.default), _rrelu),
    # Attention drops probabilities inside the kernel.
    Rule((F.scaled_dot_product_attention, aten.scaled_dot_product_attention.default), _attention),
    # Functional batch norm on the layer's own buffers, as in fused norm and activation layers.
    Rule((F.batch_norm, torch.batch_norm, aten.batch_norm.default), _batch_norm),
    # torch.fx keeps it as one call of Python code, which no artifact could hold.
    Rule(("torchvision.ops.stochastic_depth.stochastic_depth",), _stochastic_depth),
    # An operator of a library, which loops over sizes that are data.
    Rule(("transformers::grouped_mm_fallback",), _grouped_matmul),
)


def _rule_of(target: Any) -> Rule | None:
    """Return the rule that covers a function or operator."""
    name = f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', '')}"
    if isinstance(target, torch._ops.OpOverload):
        name = target._schema.name
    return next((rule for rule in RULES if target in rule.targets or name in rule.targets), None)


def is_replaced(name: str) -> bool:
    """Whether a rule covers a function or operator of a library, by its qualified name."""
    return any(name in rule.targets for rule in RULES)


CALL_KEY = "pnn_module_call"
"""Key of node.meta under which a front end records which call of which module made the node."""

_FLAGS = ("training", "train", "dropout_p", "cudnn_enabled")
_RULE_KEY = "pnn_rule"


def rule_key(node: fx.Node) -> tuple[Any, ...] | None:
    """Return a key that is equal for the same call in both modes; None if no rule covers it.

    In evaluation mode the flag of the call is off; in training mode `toggle` has replaced the call
    by a module, which carries the key of the call.
    """
    if (key := node.meta.get(_RULE_KEY)) is not None:
        return tuple(key)
    call = flagged_call(node)
    if call is None or call.get("training", call.get("train", call.get("dropout_p"))):
        return None
    return _key_of(node, call)


def _key_of(node: fx.Node, call: Mapping[str, Any]) -> tuple[Any, ...]:
    options = [
        f"{name}={'%' if isinstance(value, fx.Node) else repr(value)}"
        for name, value in call.items()
        if name not in _FLAGS
    ]
    return provenance(node).path, node.target, *options


def flagged_call(node: fx.Node) -> Mapping[str, Any] | None:
    """Return the arguments of a call that a rule covers by name, in the order of the signature.

    Returns:
        The arguments; None if no rule covers the call.
    """
    target = node.target
    if isinstance(target, str) or _rule_of(target) is None:
        return None
    normal = normalize_function(
        target, node.args, dict(node.kwargs), normalize_to_only_use_kwargs=True
    )
    return None if normal is None else normal.kwargs


def toggle(model: nn.Module, graph: fx.Graph) -> int:
    """Replace operators that have a training flag by modules that follow the mode.

    A flag that is off in a graph captured in training mode is off in both modes, and stays.

    Args:
        model: Root of the graph; it gets the new modules, under the path that the operator came
            from.
        graph: The graph in training mode; it is changed in place.

    Returns:
        Number of nodes replaced.
    """
    count = 0
    for node in list(graph.nodes):
        call = flagged_call(node)
        rule = _rule_of(node.target)
        if call is None or rule is None or call.get("training", call.get("train")) is False:
            continue
        replacement = rule.build(call)
        if replacement is None:
            continue
        module, names = replacement
        parent = provenance(node).path
        # An export has the module in the name of the operator.
        name = node.name.lstrip("_").removeprefix(f"{parent.replace('.', '_')}_")
        path = free_path(model, parent, name)
        attach(model, path, module)
        values = {name: value for name, value in call.items() if name in names[1:]}
        key = _key_of(node, call)
        _replace_by_call(node, path, (call[names[0]],), values).meta[_RULE_KEY] = key
        count += 1
    return count


def free_path(model: nn.Module, parent: str, name: str) -> str:
    """Return an unused qualified name below `parent`: `name`, with underscores as needed."""
    try:
        owner = resolve(model, parent) if parent else model
    except AttributeError:
        owner = None
    while hasattr(owner, name):
        name += "_"
    return f"{parent}.{name}".lstrip(".")


def attach(model: nn.Module, path: str, module: nn.Module) -> None:
    """Register a module under a qualified name, and create the missing modules on the path.

    Args:
        model: Root of the path.
        path: Qualified name.
        module: The module; it and the created ones get the mode of the module that holds them.
    """
    *parents, name = path.split(".")
    for atom in parents:
        if atom not in dict(model.named_children()):
            model.add_module(atom, nn.Module().train(model.training))
        model = model.get_submodule(atom)
    model.add_module(name, module.train(model.training))


def outline(model: nn.Module, graph: fx.Graph) -> int:
    """Fold the operators of each torch.nn module call back into one call of that module.

    The operators of one call (`CALL_KEY`) are folded if they are consecutive and the module has one
    tensor as argument and one as result. Operators of other modules (recurrent layers, attention)
    stay.

    Args:
        model: Root of the graph.
        graph: The graph; it is changed in place.

    Returns:
        Number of module calls restored.
    """
    calls = [node for node in graph.nodes if node.op == "call_function"]
    groups = [
        (call, list(nodes))
        for call, nodes in itertools.groupby(calls, lambda node: node.meta.get(CALL_KEY, ""))
    ]
    num_groups = Counter(call for call, _ in groups)
    return sum(_fold(model, nodes) for call, nodes in groups if call and num_groups[call] == 1)


def _fold(model: nn.Module, nodes: list[fx.Node]) -> bool:
    """Replace the operators of one module call by the call; return whether that was possible."""
    path = provenance(nodes[0]).path
    if not path or not _is_unary(resolve(model, path)):
        return False
    if resolve(model, path).training != model.training:
        return False  # `train()` of the model keeps its mode: the operators have it, a call has not
    inside = set(nodes)
    sources = {
        source
        for node in nodes
        for source in node.all_input_nodes
        if source not in inside and source.op != "get_attr"
    }
    results = [node for node in nodes if any(user not in inside for user in node.users)]
    if len(sources) != 1 or len(results) > 1:
        return False
    (source,) = sources
    result = results[0] if results else nodes[-1]  # called only for its running statistics
    _replace_by_call(result, path, (source,), {})
    for node in reversed(nodes):
        if node is not result:
            node.graph.erase_node(node)
    return True


def _is_unary(module: nn.Module) -> bool:
    """Whether a module of torch.nn has one argument and one tensor as result."""
    if not is_leaf(module) or parametrizing_code(module):
        return False
    if getattr(module, "return_indices", False):
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
