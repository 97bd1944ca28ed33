"""Build the preprocessing operators and coarse propagators that a plan describes."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import nn

from passes.coarse.conv_residual import Conv
from passes.coarse.copied_blocks import build_units
from passes.coarse.linear import Linear
from passes.coarse.lowrank import LowRank
from passes.coarse.spec import CoarseSpec
from passes.coarse.strided_conv import Convolution
from passes.coarse.thinned_blocks import THINNED, build_front, build_thinned
from passes.coarse.wrappers import Exact, Guess, Sum, Zero
from passes.errors import SynthesisError
from passes.ir.program import Program
from passes.ir.subgraph import extract, nodes_between
from passes.ir.tensor_spec import TensorSpec
from passes.options import BLOCK_FAMILIES

__all__ = ["FAMILIES", "GUESSES", "build_coarse", "build_guess"]


def build_guess(program: Program, spec: CoarseSpec, state: list[TensorSpec]) -> nn.Module:
    """Build a preprocessing operator.

    Raises:
        SynthesisError: The family is unknown.
    """
    sources = [_decode(item) for item in spec.options["sources"]]
    parts = [_guess_part(name, spec, sources, state) for name in spec.family.split("+")]
    operator = parts[0] if len(parts) == 1 else Sum(parts)
    if spec.family == THINNED:
        return Guess(operator, build_front(program, spec.options))
    names = [item["name"] for item in spec.options["sources"]]
    inputs = spec.options["inputs"]
    if names == inputs:
        return Guess(operator, None)
    ends = spec.options.get("copied")
    prologue = extract(
        program,
        nodes_between(program, *ends) if ends else [],
        [],
        names,
        inputs=inputs,
        sides=spec.options["sides"],
        name="Prologue",
    )
    return Guess(operator, copy.deepcopy(prologue).requires_grad_() if ends else prologue)


def _guess_part(
    name: str, spec: CoarseSpec, sources: list[TensorSpec], state: list[TensorSpec]
) -> nn.Module:
    reads = spec.options.get("reads")
    if name == "convolution":
        return Convolution(sources, state)
    if name in ("linear", THINNED):
        return Linear(sources, state, bias=True, reads=reads)
    if name == "lowrank":
        return LowRank(sources, state, int(spec.options["rank"]), bias=True, reads=reads)
    if name == "conv":
        return Conv(sources, state, reads)
    raise SynthesisError(f"unknown preprocessing family {name!r}; known: {', '.join(GUESSES)}")


def _decode(item: Mapping[str, object]) -> TensorSpec:
    fields = {key: item[key] for key in ("shape", "dtype", "batch_axis", "channel_axis")}
    shape = fields.pop("shape")
    assert isinstance(shape, (list, tuple))
    return TensorSpec(shape=tuple(shape), **fields)  # type: ignore[arg-type]


def build_coarse(
    program: Program,
    spec: CoarseSpec,
    entering: list[TensorSpec],
    leaving: list[TensorSpec],
    fine: nn.Module,
) -> nn.Module:
    """Build a coarse propagator.

    Raises:
        SynthesisError: The family is unknown.
    """
    parts = [
        _coarse_part(name, program, spec, entering, leaving, fine)
        for name in spec.family.split("+")
    ]
    return parts[0] if len(parts) == 1 else Sum(parts)


def _coarse_part(
    name: str,
    program: Program,
    spec: CoarseSpec,
    entering: list[TensorSpec],
    leaving: list[TensorSpec],
    fine: nn.Module,
) -> nn.Module:
    bias, reads = bool(spec.options.get("bias", False)), spec.options.get("reads")
    if name == "linear":
        return Linear(entering, leaving, bias=bias, reads=reads)
    if name == "lowrank":
        return LowRank(entering, leaving, int(spec.options["rank"]), bias=bias, reads=reads)
    if name == "conv":
        return Conv(entering, leaving, reads)
    if name == "units":
        return build_units(program, spec.options)
    if name == "thinned":
        return build_thinned(program, spec.options)
    if name == "exact":
        return Exact(fine)
    if name == "zero":
        return Zero(entering, leaving)
    raise SynthesisError(f"unknown coarse family {name!r}; known: {', '.join(FAMILIES)}")


FAMILIES = ("linear", "lowrank", "conv", *BLOCK_FAMILIES, "exact", "zero")
"""Names of the families of coarse propagators; the first three combine: "linear+lowrank"."""

GUESSES = ("convolution", "linear", "lowrank", "conv", THINNED)
"""Names of the families of preprocessing operators; all but the last combine."""
