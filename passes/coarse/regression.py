"""Ridge and reduced-rank regression from streamed sums, in float64.

Only sums of products are kept, never the samples. Held-out samples choose the ridge. With X the
centered features and Y the centered targets, one row per sample:

    X'X = V diag(s) V'                decomposed once, after the last sample; with few of them,
                                      in the space that they span (Halko, Martinsson, Tropp 2011)
    W   = V diag(1 / (s + l)) V'X'Y   for each of a few ridges l
    W_r = W D D'                      D: the first r right singular vectors of X W

The reduced rank is that of Izenman (1975): the full solution, projected onto the directions in
which its predictions vary most. For y = 2 x + 1, where the smallest ridge has the least error:

>>> moments = Moments(1, 1, device=torch.device("cpu"))
>>> x = torch.tensor([[0.0], [1.0], [2.0]])
>>> moments.add(x, 2 * x + 1)
>>> solution = moments.solve()
>>> round(solution.weight.item(), 4), round(solution.bias.item(), 4)
(2.0, 1.0)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from passes.ir.isolation import seeded

RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Ridges to choose from, relative to the mean sum of squares of a feature."""
_SPARSE, _SPARE = 4, 8
"""Features a row from which on only the axes of the rows are sought; probes beyond these."""


@dataclass(frozen=True)
class Solution:
    """An affine map `y = weight @ x + bias`.

    Attributes:
        weight: `[targets, features]`, float64.
        bias: `[targets]`, float64.
        down: `[rank, features]`, a factor of `weight = up @ down`; None at full rank.
        up: `[targets, rank]`.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    down: torch.Tensor | None
    up: torch.Tensor | None


class _Sums:
    """Sums of products of the rows `[features, 1]` with themselves and with the targets."""

    def __init__(self, features: int, targets: int, device: torch.device) -> None:
        self.xx = torch.zeros(features + 1, features + 1, dtype=torch.float64, device=device)
        self.xy = torch.zeros(features + 1, targets, dtype=torch.float64, device=device)
        self.yy = 0.0
        self.count = 0

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        rows = torch.cat([x, x.new_ones(len(x), 1)], 1).double()
        targets = y.double()
        self.xx += rows.T @ rows
        self.xy += rows.T @ targets
        self.yy += targets.square().sum().item()
        self.count += len(rows)

    def residual(self, affine: _Affine) -> float:
        """Return the sum of squared errors of a map."""
        left, basis, bias = affine.left, affine.basis, affine.bias
        cross = self.xy[:-1] if basis is None else self.xy[:-1] @ basis
        inside = bias if basis is None else bias @ basis
        explained = 2 * ((left * cross).sum() + bias @ self.xy[-1])
        explained -= (left * (self.xx[:-1, :-1] @ left)).sum()
        explained -= 2 * (self.xx[-1, :-1] @ left) @ inside + self.count * bias @ bias
        return max(self.yy - explained.item(), 0.0)


@dataclass(frozen=True)
class _Affine:
    """The map `y = basis @ left.T @ x + bias`, in float64.

    Attributes:
        left: `[features, rank]`, or `[features, targets]` if `basis` is None.
        basis: Orthonormal columns `[targets, rank]`, or None.
        bias: `[targets]`.
    """

    left: torch.Tensor
    basis: torch.Tensor | None
    bias: torch.Tensor


@dataclass(frozen=True)
class _Decomposition:
    """The principal axes of the features, from which the solution of every ridge follows.

    Attributes:
        mean_x: Mean of the features `[features]`; zero for a map without a bias.
        mean_y: Mean of the targets `[targets]`; zero for a map without a bias.
        variances: Sum of squares of the centered features along every axis `[axes]`.
        vectors: The axes, as columns `[features, axes]`.
        cross: Products of the centered features along the axes with the targets
            `[axes, targets]`.
    """

    mean_x: torch.Tensor
    mean_y: torch.Tensor
    variances: torch.Tensor
    vectors: torch.Tensor
    cross: torch.Tensor

    @classmethod
    def of(cls, sums: _Sums, *, centered: bool) -> _Decomposition:
        count = max(sums.count, 1) if centered else float("inf")
        mean_x, mean_y = sums.xx[-1, :-1] / count, sums.xy[-1] / count
        covariance, cross = sums.xx[:-1, :-1], sums.xy[:-1]
        if centered:
            covariance = covariance - count * torch.outer(mean_x, mean_x)
            cross = cross - count * torch.outer(mean_x, mean_y)
        variances, vectors = _axes(covariance, sums.count)
        return cls(mean_x, mean_y, variances.clamp_min(0.0), vectors, vectors.T @ cross)


def _axes(covariance: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Decompose the sum of products of a number of rows; of few rows, the axes that they span.

    Across the others all features are zero, and so is every solution.
    """
    if _SPARSE * rows > len(covariance):
        variances, vectors = torch.linalg.eigh(covariance)
        return variances, vectors
    with seeded(0):
        probes = covariance.new_empty(len(covariance), rows + _SPARE).normal_()
    span, _ = torch.linalg.qr(covariance @ probes)
    variances, turned = torch.linalg.eigh(span.T @ covariance @ span)
    return variances, span @ turned


class Moments:
    """Regression over streamed samples: collects sums, and solves for the best affine map.

    Args:
        features: Number of columns of the features.
        targets: Number of columns of the targets.
        device: Device of the samples.
        bias: Whether the map may have a bias.
    """

    def __init__(
        self, features: int, targets: int, *, device: torch.device, bias: bool = True
    ) -> None:
        self._fit = _Sums(features, targets, device)
        self._held_out = _Sums(features, targets, device)
        self._bias = bias
        self._full: dict[float, torch.Tensor] = {}
        self._bases: dict[float, torch.Tensor] = {}
        self._axes: _Decomposition | None = None

    def add(self, x: torch.Tensor, y: torch.Tensor, *, held_out: bool = False) -> None:
        """Add rows `[n, features]` and `[n, targets]`."""
        self._full.clear()
        self._bases.clear()
        self._axes = None
        (self._held_out if held_out else self._fit).add(x, y)

    def solve(self, rank: int | None = None) -> Solution:
        """Solve with the ridge of least error on the held-out rows.

        Further calls with at most the same rank reuse the decompositions.

        Args:
            rank: Largest rank of the map; None for full rank.
        """
        judge = self._held_out if self._held_out.count else self._fit
        best = min((self._affine(ridge, rank) for ridge in RIDGES), key=judge.residual)
        if best.basis is None:
            return Solution(best.left.T.contiguous(), best.bias, None, None)
        weight = best.basis @ best.left.T
        return Solution(weight, best.bias, best.left.T.contiguous(), best.basis)

    def _affine(self, ridge: float, rank: int | None) -> _Affine:
        """Return the solution with a ridge, projected to a rank unless that is full."""
        axes, weight = self._decomposed(), self._weight(ridge)
        if rank is None or rank >= min(weight.shape):
            return _Affine(weight, None, axes.mean_y - axes.mean_x @ weight)
        basis = self._directions(ridge, rank)
        left = weight @ basis
        return _Affine(left, basis, axes.mean_y - axes.mean_x @ left @ basis.T)

    def _weight(self, ridge: float) -> torch.Tensor:
        """Return the coefficients `[features, targets]` at full rank."""
        if ridge not in self._full:
            axes = self._decomposed()
            self._full[ridge] = axes.vectors @ (axes.cross / self._damped(ridge))
        return self._full[ridge]

    def _damped(self, ridge: float) -> torch.Tensor:
        """Return the variances along the axes plus the ridge, `[axes, 1]`."""
        scale = self._fit.xx.diagonal()[:-1].mean().item() or 1.0
        return self._decomposed().variances[:, None] + ridge * scale

    def _decomposed(self) -> _Decomposition:
        if self._axes is None:
            self._axes = _Decomposition.of(self._fit, centered=self._bias)
        return self._axes

    def _directions(self, ridge: float, rank: int) -> torch.Tensor:
        """Return orthonormal directions `[targets, rank]` in which predictions vary most."""
        basis = self._bases.get(ridge)
        if basis is None or basis.shape[1] < rank:
            basis = self._bases[ridge] = self._principal(ridge, rank)
        return basis[:, :rank]

    def _principal(self, ridge: float, rank: int) -> torch.Tensor:
        axes = self._decomposed()
        # A matrix with the same Gram matrix as the predictions, but one row per axis.
        predictions = axes.variances.sqrt()[:, None] * axes.cross / self._damped(ridge)
        with seeded(0):
            oversampled = min(rank + 8, *predictions.shape)
            _, _, directions = torch.svd_lowrank(predictions, oversampled, niter=4)
        basis: torch.Tensor = directions[:, :rank]
        return basis
