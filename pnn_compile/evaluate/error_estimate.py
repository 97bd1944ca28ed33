"""Estimate the error that is left after parareal iterations, from what they computed.

The change of the last iteration d_k estimates it, and better with the change before it:

    iteration k     1      2      3
    change d_k      0.40   0.10   0.02      of the last state, relative
    d_k / d_{k-1}          0.25   0.20
    estimate        0.40   0.033  0.005     d_k rho / (1 - rho), see `estimated_errors`

At K = 1 that is the error of the guess, far above that of the result. A loop in time tells more.
Its coarse steps predict states, p = G(e) from the input e of a stage and c = G(u) from the
corrected one u, and the fine stage says y = g(e). So they missed the share ||y - p|| / ||p - e|| of
what the stage does, and they will have missed that share of the change that they predict for it,
(c - u) - (p - e):

    stage j         0      1      2      3
    y - p over p - e       0.05   0.05   0.06    missed of what the stage does
    (c - u) - (p - e)      0.02   0.04   0.05    change of what it does, by the coarse steps
    missed now      0      0.001  0.003  0.006   their product, and what was missed before

Three times that sum is the estimate of the first iteration, between a twentieth of d_1 and d_1; of
a later one, it is the larger of that sum and of the estimate above.
"""

from __future__ import annotations

import torch

from passes.plan.schema import Plan
from passes.transform.executor import State
from passes.transform.sweep import Role, Step

_SAFETY = 3.0
"""Factor over what coarse steps are predicted to miss: one sample in fifty misses more."""
_TRUSTED = 0.05
"""Least contraction of the first iteration that is believed: no other one has shown it yet."""
_TINY = torch.finfo(torch.float64).tiny


class ErrorEstimate:
    """Estimates of the relative errors of iterates, from the steps of their sweep.

    Args:
        plan: The plan.
        samples: Number of samples of the batch.
    """

    def __init__(self, plan: Plan, samples: int) -> None:
        self.plan, self.samples = plan, samples
        self._increments: list[torch.Tensor] = []
        self._missed: list[torch.Tensor] = []
        self._last: State | None = None
        self._entering: dict[int, State] = {}
        self._predicted: dict[int, State] = {}
        self._residual: dict[int, State] = {}
        self._state: State = {}
        self._sum: torch.Tensor = torch.zeros(1, dtype=torch.float64, device="cpu")

    @property
    def increments(self) -> torch.Tensor:
        """Relative changes of the last state, `[K, B]`."""
        return torch.stack(self._increments)

    def add(self, state: State) -> torch.Tensor:
        """Add the last state of the next iteration; the first one is uncorrected.

        Returns:
            The estimates so far, `[K, B]`.
        """
        last = len(self.plan.stages) - 1
        if self._last is not None:
            total = self._norm(last, state)
            change = {name: value - self._last[name] for name, value in state.items()}
            self._increments.append(self._norm(last, change) / total)
            self._missed.append(_SAFETY * self._sum.to(total.device) / total)
        self._last = state
        if not self._increments:
            return torch.zeros(0, self.samples, device="cpu")
        missed = torch.stack(self._missed) if self.plan.predicts else None
        return estimated_errors(self.increments, last + 1, missed)

    def watch(self, step: Step, state: State) -> None:
        """Take note of a step of the sweep and the state that it made."""
        number = step.stage
        if not self.plan.predicts:
            return
        if step.role is Role.PREPROCESS:
            self._entering[number] = state
        elif step.role is Role.RESIDUAL:
            self._residual[number] = state
        elif step.role is Role.COARSE and step.writes.letter == "p":
            self._predicted[number] = state
            self._entering.setdefault(number + 1, state)
        elif step.role is Role.COARSE:
            self._sum = self._propagate(number, state)
            self._predicted[number], self._entering[number] = state, self._state
        elif step.role is Role.CORRECT:
            if number == step.iteration:  # the first one that is computed is exact
                self._sum = torch.zeros_like(self._sum)
            self._state = state

    def _propagate(self, number: int, coarse: State) -> torch.Tensor:
        """Return what the states miss after a stage, given its prediction from the state before."""
        entering, predicted = self._entering[number], self._predicted[number]
        moved = {n: self._state[n] - value for n, value in entering.items()}
        change = {name: value - predicted[name] for name, value in coarse.items()}
        before, after = self._norm(number - 1, moved), self._norm(number, change)
        missed = self._norm(number, self._residual[number])
        share = missed / self._norm(number, self._beyond(number, predicted, entering))
        more = share * self._norm(number, self._beyond(number, change, moved))
        return self._sum.to(more.device) * after / before + more

    def _beyond(self, number: int, after: State, before: State) -> State:
        """Subtract the state before a stage from the one after it, component by component."""
        faces = self.plan.interfaces[number - 1 : number + 1]
        pairs = zip(*([value.name for value in face.state] for face in faces), strict=False)
        earlier = {new: before[old] for old, new in pairs if old in before}
        return {name: v - earlier[name] if name in earlier else v for name, v in after.items()}

    def _norm(self, number: int, state: State) -> torch.Tensor:
        """Return the norm of the components of a state after a stage, by sample, `[B]`.

        Several tensors count as one long vector. An axis that merges the batch with another one
        (`[B T, C]`) is split into rows by sample.
        """
        total = torch.zeros((), device="cpu")
        for value in self.plan.interfaces[number].state:
            if value.name in state:
                tensor = state[value.name]
                squares = _squared_norms(tensor, value.spec.batch_axis or 0, self.samples)
                total = squares + total.to(tensor.device)
        return total.clamp_min(_TINY).sqrt()


def _squared_norms(tensor: torch.Tensor, axis: int, samples: int) -> torch.Tensor:
    """Compute it for each sample `[B]`, or for all together `[1]` if the axis is not a multiple."""
    rows = samples if samples and tensor.shape[axis] % samples == 0 else 1
    return tensor.movedim(axis, 0).reshape(rows, -1).abs().double().square().sum(1)


def estimated_errors(
    increments: torch.Tensor, stages: int, missed: torch.Tensor | None = None
) -> torch.Tensor:
    """Estimate the relative error of every iterate from the increments up to it.

    With increments d_{k-1} and d_k of two iterations, the observed contraction is
    rho = d_k / d_{k-1}; if it continues, the increments still to come sum to d_k rho / (1 - rho).
    This is the estimate where it is below d_k (rho < 1/2). Elsewhere the estimate is d_k itself:
    near rho = 1 the sum means little, as only N - k increments can follow. It is d_1 in the first
    iteration, which has no contraction yet. Iterate N is exact: its estimate is 0.

    The estimate is not a bound. It sees changes, not the truth: at K = 1 corrections without effect
    look like corrections that were not needed, and increments that stall and grow again look better
    than they are. Where parareal does not contract (deep trained networks with cheap coarse
    propagators, before K approaches N) it returns the order of magnitude and separates hard samples
    from easy ones, no more. It concerns the last state, before the head; the outputs may be more or
    less sensitive.

    Args:
        increments: Relative increments of the iterations 1 to K, `[K, B]`.
        stages: Number N of stages.
        missed: What the coarse steps of a loop in time are predicted to miss, `[K, B]`: the
            estimate of the first iteration, and the least one of the others; at most d_k.

    Returns:
        Estimates `[K, B]`.

    >>> estimated_errors(torch.tensor([[0.4], [0.1], [0.02]]), stages=8).flatten()
    tensor([0.4000, 0.0333, 0.0050])
    """
    estimates = increments.clone()
    for k in range(1, len(increments)):
        rho = increments[k] / increments[k - 1]
        estimates[k] *= torch.where(rho < 0.5, rho / (1 - rho), 1.0)
    if missed is not None:
        estimates[0] *= _TRUSTED
        estimates = torch.minimum(torch.maximum(estimates, missed), increments)
    estimates[stages - 1 :] = 0.0
    return estimates
