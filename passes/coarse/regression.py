"""Ridge and reduced-rank regression from streamed sums, in float64.

Only the sums of products are kept, never the samples; a part of the samples is held out to choose
the ridge. Reduced rank after Izenman (1975): the full solution, projected onto the directions in
which its predictions vary most.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Moments", "Solution"]

RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Ridges to choose from, relative to the mean variance of a feature."""


@dataclass(frozen=True)
class Solution:
    """An affine map `y = weight @ x + bias`.

    Attributes:
        weight: `[targets, features]`, float64.
        bias: `[targets]`, float64.
        down: `[rank, features]`, and with `up` a factorisation of `weight`; None at full rank.
        up: `[targets, rank]`.
        error: Root of the unexplained share of the targets' energy, on held-out samples.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    down: torch.Tensor | None
    up: torch.Tensor | None
    error: float


class _Sums:
    """Sums over rows of `[features, 1]` against itself and against the targets."""

    def __init__(self, features: int, targets: int, device: torch.device) -> None:
        self.xx = torch.zeros(features + 1, features + 1, dtype=torch.float64, device=device)
        self.xy = torch.zeros(features + 1, targets, dtype=torch.float64, device=device)
        self.yy = 0.0
        self.count = 0

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        rows = torch.cat([x, x.new_ones(len(x), 1)], 1).double()
        wanted = y.double()
        self.xx += rows.T @ rows
        self.xy += rows.T @ wanted
        self.yy += wanted.square().sum().item()
        self.count += len(rows)

    def residual(self, solution: torch.Tensor) -> float:
        """Sum of squared errors of `[features + 1, targets]` coefficients."""
        explained = 2 * (solution * self.xy).sum() - (solution * (self.xx @ solution)).sum()
        return max(self.yy - explained.item(), 0.0)


class Moments:
    """Streams samples and solves for the best affine map.

    Args:
        features: Number of columns of the features.
        targets: Number of columns of the targets.
        device: Where the samples are.
        bias: Whether the map may have a bias.
    """

    def __init__(
        self, features: int, targets: int, *, device: torch.device, bias: bool = True
    ) -> None:
        self._fit = _Sums(features, targets, device)
        self._held = _Sums(features, targets, device)
        self._bias = bias
        self._full: dict[float, torch.Tensor] = {}
        self._bases: dict[float, torch.Tensor] = {}

    def add(self, x: torch.Tensor, y: torch.Tensor, *, held_out: bool = False) -> None:
        """Add rows `[n, features]` and `[n, targets]`."""
        self._full.clear()
        self._bases.clear()
        (self._held if held_out else self._fit).add(x, y)

    def solve(self, rank: int | None = None) -> Solution:
        """Solve with the ridge that does best on the held-out rows.

        Further calls are quick where the rank is not larger than in the first one.

        Args:
            rank: Largest rank of the map; None for full rank.
        """
        judge = self._held if self._held.count else self._fit
        best: tuple[float, torch.Tensor, torch.Tensor | None] | None = None
        for ridge in RIDGES:
            full = self._ridge(ridge)
            basis = None
            if rank is not None and rank < min(full.shape[0] - 1, full.shape[1]):
                basis = self._directions(ridge, rank)
                full = self._project(full, basis)
            error = judge.residual(full)
            if best is None or error < best[0]:
                best = error, full, basis
        assert best is not None
        error, full, basis = best
        weight, bias = full[:-1].T.contiguous(), full[-1].clone()
        down = up = None
        if basis is not None:
            down, up = basis.T @ weight, basis
        share = (error / judge.yy) ** 0.5 if judge.yy else 0.0
        return Solution(weight, bias, down, up, share)

    def _ridge(self, ridge: float) -> torch.Tensor:
        if ridge in self._full:
            return self._full[ridge]
        sums = self._fit
        scale = sums.xx.diagonal()[:-1].mean().item() or 1.0
        penalty = torch.full_like(sums.xx[0], ridge * scale)
        penalty[-1] = 1e-9 * max(sums.count, 1) if self._bias else 1e30
        solution: torch.Tensor = torch.linalg.solve(sums.xx + torch.diag(penalty), sums.xy)
        if not self._bias:
            solution[-1] = 0
        self._full[ridge] = solution
        return solution

    def _directions(self, ridge: float, rank: int) -> torch.Tensor:
        """Orthonormal directions `[targets, rank]` in which the centred predictions vary most."""
        known = self._bases.get(ridge)
        if known is None or known.shape[1] < rank:
            known = self._bases[ridge] = self._principal(self._ridge(ridge), rank)
        return known[:, :rank]

    def _principal(self, full: torch.Tensor, rank: int) -> torch.Tensor:
        count = max(self._fit.count, 1)
        mean = self._fit.xx[-1:, :-1] / count
        covariance = self._fit.xx[:-1, :-1] - count * mean.T @ mean
        if not self._bias:
            covariance = self._fit.xx[:-1, :-1]
        values, vectors = torch.linalg.eigh(covariance)
        factor = vectors * values.clamp_min(0.0).sqrt()  # factor @ factor.T is the covariance
        with torch.random.fork_rng():
            torch.manual_seed(0)
            over = min(rank + 8, *full[:-1].shape)
            _, _, directions = torch.svd_lowrank(factor.T @ full[:-1], over, niter=4)
        found: torch.Tensor = directions[:, :rank]
        return found

    def _project(self, full: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
        """Keep the part of the weights along the basis, and the predictions' mean."""
        weight = full[:-1] @ basis @ basis.T
        if not self._bias:
            return torch.cat([weight, full[-1:]])
        mean = self._fit.xx[-1:, :-1] / max(self._fit.count, 1)
        bias = full[-1:] + mean @ (full[:-1] - weight)
        return torch.cat([weight, bias])
