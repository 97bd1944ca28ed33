"""What a rank says when an instruction fails on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from passes.errors import RuntimeFault
from passes.schedule.instruction import Instruction

if TYPE_CHECKING:
    from passes.plan.schema import Plan

__all__ = ["failure"]


def failure(
    plan: Plan,
    rank: int,
    instruction: Instruction,
    inputs: Sequence[Mapping[str, Any]],
    error: Exception,
) -> RuntimeFault:
    """Name rank, phase, stage, modules and shapes of a failure.

    Args:
        plan: The plan.
        rank: This rank.
        instruction: What failed.
        inputs: Inputs of every micro-batch, by argument name.
        error: How.
    """
    stage = plan.stages[instruction.stage]
    shapes = {
        name: list(value.shape)
        for name, value in inputs[instruction.batch].items()
        if isinstance(value, torch.Tensor)
    }
    advice = ""
    if _is_memory(error):
        advice = (
            "; memory is short: distribute() with more micro-batches (batches=) or recompute=True, "
            "or compile more stages for more ranks"
        )
    return RuntimeFault(
        f"rank {rank} failed at {instruction}, modules {stage.first_module} to "
        f"{stage.last_module}, inputs {shapes}: {type(error).__name__}: {error}{advice}"
    )


def _is_memory(error: Exception) -> bool:
    """Whether memory ran out; torch says so on the CPU in words alone."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
