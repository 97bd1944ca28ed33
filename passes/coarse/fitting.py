"""Closed-form fit of the linear families, from streamed batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from passes.coarse.linear import LinearMap
from passes.coarse.lowrank import LowRankMap
from passes.coarse.maps import MapMatrix
from passes.coarse.regression import Moments

__all__ = ["MatrixFit", "fitted_parts"]


def fitted_parts(module: nn.Module) -> list[MapMatrix]:
    """The parts of a network that a regression can fit, in the order in which to fit them."""
    found = [m for m in module.modules() if isinstance(m, MapMatrix)]
    return [m for m in found if all(_fits(each) for row in m.rows() for each in row)]


def _fits(module: nn.Module) -> bool:
    return isinstance(module, LinearMap | LowRankMap)


class MatrixFit:
    """Collects samples for every row of a matrix of maps and solves for its weights.

    Args:
        matrix: A matrix of `LinearMap` or of `LowRankMap`.
    """

    def __init__(self, matrix: MapMatrix) -> None:
        self._rows = matrix.rows()
        self._moments: list[Moments] = []

    def add(
        self, state: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor], *, held_out: bool
    ) -> None:
        """Add one batch: the entering tensors and what the leaving ones should be."""
        for number, (row, target) in enumerate(zip(self._rows, wanted, strict=True)):
            features = torch.cat(
                [_map(each).features(x) for each, x in zip(row, state, strict=True)], 1
            )
            targets = _map(row[0]).targets(target)
            if number == len(self._moments):
                bias = _bias(row[0]) is not None
                sizes = features.shape[1], targets.shape[1]
                self._moments.append(Moments(*sizes, device=features.device, bias=bias))
            self._moments[number].add(features, targets, held_out=held_out)

    def finish(self, matrix: MapMatrix | None = None) -> list[float]:
        """Solve, set the weights, and return the held-out relative error of every row.

        Args:
            matrix: One that differs by its rank alone, to fit to the same samples.
        """
        errors = []
        rows = self._rows if matrix is None else matrix.rows()
        for row, moments in zip(rows, self._moments, strict=True):
            ranks = [
                each.down.out_features for each in map(_map, row) if isinstance(each, LowRankMap)
            ]
            rank = min(ranks, default=None)
            solution = moments.solve(rank)
            start = 0
            for number, each in enumerate(map(_map, row)):
                width = each.width
                each.assign(solution, slice(start, start + width), first=number == 0)
                start += width
            errors.append(solution.error)
        return errors


def _map(module: nn.Module) -> LinearMap | LowRankMap:
    assert isinstance(module, LinearMap | LowRankMap)
    return module


def _bias(module: nn.Module) -> torch.Tensor | None:
    each = _map(module)
    return each.up.bias if isinstance(each, LowRankMap) else each.bias
