"""Family `narrow`: a guess from a copy of all layers before the interface, at few channels.

    [B, 3, 32, 32] -> copied layers -> [B, 64, 4, 4] -> channel map -> [B, 256, 4, 4]

The copy is as deep as what it stands for, at a fraction of the cost: at a share s of the channels
its convolutions take s^2 of the FLOPs. Its weights are fresh, so that it has to be trained: with
the network from scratch, or by distillation at the interface (`pnn.fit(interface_epochs=...)`). The
share follows from the cost that a guess may have: a tenth of the original, or half an even stage
where that is less, or `prologue=`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace

from torch import fx

from passes.coarse.narrow import narrow
from passes.coarse.spec import NodeName, PreprocessOptions, Share
from passes.ir.program import Program, extract, nodes_between, tensor_leaves
from passes.ir.tensor_spec import TensorSpec


@dataclass(frozen=True, kw_only=True)
class NarrowOptions(PreprocessOptions):
    """Options of family `narrow`; its `sources` are the state, as the original computes it.

    Attributes:
        copied: First and last node of the layers before the interface.
        share: Share of the channels at which the copies work.
    """

    copied: tuple[NodeName, NodeName] = field()
    share: Share


def build_narrow(
    program: Program, options: NarrowOptions
) -> tuple[fx.GraphModule, list[TensorSpec]]:
    """Copy the layers that the options name; return them with the types of what they compute.

    Raises:
        SynthesisError: A layer has no narrower copy.
    """
    unit = extract(
        program,
        nodes_between(program, *options.copied),
        [],
        [source.name for source in options.sources],
        inputs=options.inputs,
        sides=options.sides,
        name="NarrowLayers",
    )
    unit = copy.deepcopy(unit).requires_grad_()
    outputs = narrow(unit, options.share, program.examples(options.inputs))
    pairs = zip(options.sources, tensor_leaves(outputs), strict=True)
    return unit, [replace(source, shape=tuple(x.shape)) for source, x in pairs]
