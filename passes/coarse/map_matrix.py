"""A matrix of maps between the tensors of two states, and its fit in closed form.

One row per leaving tensor. For a state (image, tokens) that becomes (image, tokens), where the
tokens must not depend on the image (reads = ((0, 1), (1,))):

    image'  = map_00(image) + map_01(tokens)
    tokens' =                 map_11(tokens)

A fit is one regression per row: the features of its maps are concatenated, and every map takes its
columns of the solution. With 16 and 64 features, the row of image' has 80: map_00 takes the columns
0 to 15, map_01 the columns 16 to 79.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from passes.coarse.regression import Moments, Solution
from passes.coarse.spec import Reads
from passes.coarse.tensor_layout import fit_positions, layouts
from passes.coarse.wrappers import Difference, Sum
from passes.ir.tensor_spec import TensorSpec


class MapMatrix(nn.Module):
    """Sum, for every leaving tensor, of one map per entering tensor that it may depend on.

    A leaving tensor that depends on none of them is zero.

    Args:
        entering: Types of the tensors that it reads.
        leaving: Types of the tensors that it returns.
        make: Builds the map from a source to a target; the flag says whether it is the first of its
            row, which has the bias.
        reads: Which entering tensors each leaving one may depend on; all if None.
    """

    def __init__(
        self,
        entering: Sequence[TensorSpec],
        leaving: Sequence[TensorSpec],
        make: Callable[[TensorSpec, TensorSpec, bool], nn.Module],
        reads: Reads | None = None,
    ) -> None:
        super().__init__()
        self.reads = [tuple(range(len(entering)))] * len(leaving)
        if reads is not None:
            self.reads = [tuple(row) for row in reads]
        self.maps = nn.ModuleList(
            nn.ModuleList(make(entering[number], target, number == row[0]) for number in row)
            for row, target in zip(self.reads, leaving, strict=True)
        )
        self._layouts = [layouts(entering[0], target) for target in leaving]

    def forward(self, *state: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Map the entering tensors to the leaving ones (a tensor if there is one)."""
        results = []
        for row, reads, (source, target) in zip(
            self.rows(), self.reads, self._layouts, strict=True
        ):
            if not row:  # `zeros_like` reads the shape alone: a NaN does not reach the result
                x = torch.zeros_like(source.enter(state[0])[:, :1])
                x = fit_positions(x, source, target)
                results.append(target.leave(x.expand(-1, target.channels, *x.shape[2:])))
                continue
            total = row[0](state[reads[0]])
            for single, number in zip(row[1:], reads[1:], strict=True):
                total = total + single(state[number])
            results.append(total)
        return results[0] if len(results) == 1 else tuple(results)

    def rows(self) -> list[list[nn.Module]]:
        """Return the maps, row by row."""
        return [list(row) for row in self.maps if isinstance(row, nn.ModuleList)]


class FittedMap(nn.Module):
    """A map between two tensors that a regression can fit."""

    rank: int | None = None
    """Largest rank of its matrix; None for full rank."""

    @property
    def width(self) -> int:
        """Number of features per row of the regression."""
        raise NotImplementedError

    @property
    def biased(self) -> bool:
        """Whether it has a bias."""
        raise NotImplementedError

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Return the rows of the regression for a source tensor, `[n, width]`."""
        raise NotImplementedError

    def targets(self, y: torch.Tensor) -> torch.Tensor:
        """Return the rows of the regression for a target tensor, `[n, targets]`."""
        raise NotImplementedError

    def assign(self, solution: Solution, columns: slice, *, first: bool) -> None:
        """Set the weights to these columns of a solution, and the bias if `first`."""
        raise NotImplementedError


def fitted_parts(module: nn.Module) -> list[MapMatrix]:
    """Return the parts of a network that a regression can fit, in the order in which to fit."""
    module = module.coarse if isinstance(module, Difference) else module
    parts = module.parts if isinstance(module, Sum) else [module]
    matrices = [part for part in parts if isinstance(part, MapMatrix)]
    return [m for m in matrices if all(isinstance(x, FittedMap) for row in m.rows() for x in row)]


class MatrixFit:
    """Regression of every row of a matrix of maps: collects samples, then solves for the weights.

    Args:
        matrix: A matrix of `FittedMap`.
    """

    def __init__(self, matrix: MapMatrix) -> None:
        self._rows = _fitted_rows(matrix)
        self._reads = matrix.reads
        self._moments: dict[int, Moments] = {}

    def add(
        self, state: Sequence[torch.Tensor], targets: Sequence[torch.Tensor], *, held_out: bool
    ) -> None:
        """Add one batch.

        Args:
            state: The entering tensors.
            targets: The leaving tensors that the matrix should return.
            held_out: Whether the batch chooses the ridge instead of being fitted.
        """
        for number, (row, reads) in enumerate(zip(self._rows, self._reads, strict=True)):
            if not row:
                continue
            pairs = zip(row, reads, strict=True)
            x = torch.cat([single.features(state[source]) for single, source in pairs], 1)
            y = row[0].targets(targets[number])
            if number not in self._moments:
                sizes = x.shape[1], y.shape[1]
                self._moments[number] = Moments(*sizes, device=x.device, bias=row[0].biased)
            self._moments[number].add(x, y, held_out=held_out)

    def finish(self, matrix: MapMatrix | None = None) -> None:
        """Solve, and set the weights.

        Args:
            matrix: Another matrix to fit to the same samples, which differs only in its rank; None
                for the matrix of the constructor.
        """
        rows = self._rows if matrix is None else _fitted_rows(matrix)
        for number, moments in self._moments.items():
            row = rows[number]
            ranks = [single.rank for single in row if single.rank is not None]
            solution = moments.solve(min(ranks, default=None))
            start = 0
            for single in row:
                stop = start + single.width
                single.assign(solution, slice(start, stop), first=start == 0)
                start = stop


def _fitted_rows(matrix: MapMatrix) -> list[list[FittedMap]]:
    return [[x for x in row if isinstance(x, FittedMap)] for row in matrix.rows()]
