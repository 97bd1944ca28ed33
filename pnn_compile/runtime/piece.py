"""`Piece`: one network of a rank as an autograd graph of its own, cut off at both ends."""

from __future__ import annotations

import torch

from passes.transform.executor import State

__all__ = ["Piece", "added", "detached", "leaves"]


class Piece:
    """One autograd graph: its leaves, its outputs, and after backward the leaves' gradients."""

    def __init__(self, leaves: State, outputs: State) -> None:
        self.leaves = leaves
        self.outputs = outputs
        self.gradients: State = {}

    def backward(self, adjoint: State) -> State:
        """Run backward from the adjoints of the outputs; a missing one is zero."""
        pairs = [
            (value, adjoint[name])
            for name, value in self.outputs.items()
            if value.requires_grad and name in adjoint
        ]
        if pairs:
            values, gradients = zip(*pairs, strict=True)
            torch.autograd.backward(values, gradients)
        self.gradients = {n: leaf.grad for n, leaf in self.leaves.items() if leaf.grad is not None}
        self.leaves, self.outputs = {}, {}
        return self.gradients


def leaves(state: State) -> State:
    """The same values, cut off from what they were computed from."""
    return {
        name: value.detach().requires_grad_(torch.is_grad_enabled())
        for name, value in state.items()
    }


def detached(state: State) -> State:
    """The same values, without their graph."""
    return {name: value.detach() for name, value in state.items()}


def added(state: State, other: State) -> State:
    """The sum of two states; a component that one of them lacks is zero there."""
    both = {n: state[n] + value if n in state else value for n, value in other.items()}
    return {**state, **both}
