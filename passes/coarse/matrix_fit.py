"""Closed-form fit of the linear families, from streamed batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from passes.coarse.linear import LinearMap
from passes.coarse.lowrank import LowRankMap
from passes.coarse.map_matrix import MapMatrix
from passes.coarse.regression import Moments


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
        self._reads = matrix.reads
        self._moments: dict[int, Moments] = {}

    def add(
        self, state: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor], *, held_out: bool
    ) -> None:
        """Add one batch: the entering tensors and what the leaving ones should be."""
        for number, (row, reads) in enumerate(zip(self._rows, self._reads, strict=True)):
            if not row:
                continue
            pairs = zip(row, reads, strict=True)
            features = torch.cat([_map(each).features(state[source]) for each, source in pairs], 1)
            targets = _map(row[0]).targets(wanted[number])
            if number not in self._moments:
                bias = _bias(row[0]) is not None
                sizes = features.shape[1], targets.shape[1]
                self._moments[number] = Moments(*sizes, device=features.device, bias=bias)
            self._moments[number].add(features, targets, held_out=held_out)

    def finish(self, matrix: MapMatrix | None = None) -> None:
        """Solve and set the weights.

        Args:
            matrix: One that differs by its rank alone, to fit to the same samples.
        """
        rows = self._rows if matrix is None else matrix.rows()
        for number, moments in self._moments.items():
            row = rows[number]
            ranks = [
                each.down.out_features for each in map(_map, row) if isinstance(each, LowRankMap)
            ]
            rank = min(ranks, default=None)
            solution = moments.solve(rank)
            start = 0
            for each in map(_map, row):
                width = each.width
                each.assign(solution, slice(start, start + width), first=start == 0)
                start += width


def _map(module: nn.Module) -> LinearMap | LowRankMap:
    assert isinstance(module, LinearMap | LowRankMap)
    return module


def _bias(module: nn.Module) -> torch.Tensor | None:
    each = _map(module)
    return each.up.bias if isinstance(each, LowRankMap) else each.bias
