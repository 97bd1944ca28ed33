"""Distillation interface by interface: every guess and every correction learns by itself.

With s_j the true state behind stage j and x_j = C_j(input) the guess of the state before it, the
guess is fitted to s_{j-1} and the correction to the error that is left behind its stage,

    chain       F_j(x_j, s_{j-1} - x_j)   to   s_j - g_j(x_j)
    collapsed   P_j(y_{j-1} - x_j)        to   T_{j-1} - T_j

where y_{j-1} is the uncorrected state behind stage j - 1 and T_j is where the remaining fine stages
take y_j. These last targets telescope: T_0 is the true last state and T_N what the network gives
without a correction, so corrections that hit them give the original exactly.

The x_j are detached: no gradient crosses an interface. The 2 (N - 1) problems share nothing but
the batch and the true states, so they could run on as many devices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import fx, nn

from passes.errors import OptionError
from passes.ir.mode_layers import dropouts
from passes.transform.executor import Executor, State
from passes.transform.split import Stages
from pnn_compile.fit.optimizer import Learner, Trainer
from pnn_compile.inputs import device_of, named_batch

if TYPE_CHECKING:
    from pnn_compile.compiled import Compiled

__all__ = ["Distiller", "InterfaceLoss", "train_mode"]


@dataclass(frozen=True)
class InterfaceLoss:
    """Losses of one interface: squared errors over the energy of what was wanted.

    Attributes:
        stage: Number of the stage behind the interface.
        guess_first: Of the state that enters it, guessed; mean over the first tenth of the steps.
        guess_last: The same over the last tenth.
        correction_first: Of the correction, against the error that is left without one (1 for a
            correction of zero, and what it is measured by shrinks as the guess learns); mean over
            the first tenth of the steps.
        correction_last: The same over the last tenth.
    """

    stage: int
    guess_first: float
    guess_last: float
    correction_first: float
    correction_last: float


class Distiller:
    """Trains the guesses and corrections of a network, its fine stages left as they are.

    Args:
        compiled: The network.
        teacher: A fixed copy of `compiled.sequential`.
        trainer: Makes the optimizer of each guess and of each correction.
        total: Steps to take in all.
        autocast: Lower precision to run the guesses and corrections in.
        clip_norm: Largest norm of the gradient of one guess or correction, or None.

    Raises:
        OptionError: No guess or correction has a parameter to train.
    """

    def __init__(
        self,
        compiled: Compiled,
        teacher: nn.Module,
        trainer: Trainer,
        total: int,
        *,
        autocast: torch.dtype | None,
        clip_norm: float | None,
    ) -> None:
        self._compiled = compiled
        self._executor = Executor(compiled, _stages_of(teacher, len(compiled.plan.stages)))
        self._operators = compiled.operators.named()
        held = nn.ModuleList([*compiled.stages.fine, compiled.stages.head])
        self._fine = list(held.modules())
        frozen = set(held.parameters())
        self._learners = {
            name: Learner(
                [p for p in operator.parameters() if p.requires_grad and p not in frozen],
                trainer,
                total,
                autocast=autocast,
                clip_norm=clip_norm,
            )
            for name, operator in self._operators.items()
        }
        if not any(learner.parameters for learner in self._learners.values()):
            raise OptionError(
                f"no guess or correction of {compiled.plan.model} has a parameter that trains: "
                "leave interface_epochs out, or compile with another coarse family"
            )
        self._autocast = autocast
        self.total = total
        self.step = 0
        self._losses: list[dict[str, float]] = []

    def train(self, *, dropout: bool) -> None:
        """Set training mode where something trains: not in what is shared with the stages."""
        train_mode(self._operators, dropout=dropout)
        for module in self._fine:
            module.training = False

    def take(self, batch: Any) -> float:
        """Take one step at every interface; give the mean of the losses.

        Raises:
            OptionError: A loss is not finite.
        """
        executor, found = self._executor, {}
        collapsed = executor.plan.sweep == "collapsed"
        # Copies of their own: a model may write into its inputs.
        inputs, given = (named_batch(self._compiled, batch) for _ in range(2))
        with torch.no_grad():
            true = reached = executor.advance(0, {}, executor.fine(0, {}, inputs))
            end = self._end(0, reached, inputs) if collapsed else {}
        for number in range(1, len(executor.plan.stages)):
            name = f"preprocess_{number}"
            with self._precision():
                guess = executor.guess(number, given)
            found[name] = self._learn(name, guess, true)
            guess = {key: value.detach().to(true[key].dtype) for key, value in guess.items()}
            with torch.no_grad():
                produced = executor.fine(number, guess, inputs)
                behind = executor.advance(number, true, executor.fine(number, true, inputs))
                before, left = true, _minus(behind, produced)
                if collapsed:
                    before, reached = reached, executor.advance(number, reached, produced)
                    nearer, end = end, self._end(number, reached, inputs)
                    left = _minus(nearer, end)
            name = f"coarse_{number}"
            with self._precision():
                correction = executor.correct(number, guess, before, inputs)
            found[name] = self._learn(name, correction, left)
            true = behind
        self.step += 1
        self._losses.append(found)
        return sum(found.values()) / len(found)

    def _end(self, number: int, state: State, inputs: Mapping[str, Any]) -> State:
        """Where the fine stages behind stage `number` take its state."""
        for following in range(number + 1, len(self._executor.plan.stages)):
            produced = self._executor.fine(following, state, inputs)
            state = self._executor.advance(following, state, produced)
        return state

    def _precision(self) -> torch.autocast:
        device = device_of(self._compiled.module)
        return torch.autocast(device.type, self._autocast, enabled=self._autocast is not None)

    def _learn(self, name: str, found: State, wanted: State) -> float:
        loss = _relative(found, wanted)
        if not torch.isfinite(loss):
            raise OptionError(
                f"the loss of {name} is {loss.item()}: lower the learning rate, or check the inputs"
            )
        self._learners[name].learn(loss)
        return loss.item()

    def report(self) -> tuple[InterfaceLoss, ...]:
        """The losses of every interface, first and last."""
        tenth = max(1, len(self._losses) // 10)

        def mean(name: str, rows: Sequence[Mapping[str, float]]) -> float:
            return sum(row[name] for row in rows) / len(rows)

        first, last = self._losses[:tenth], self._losses[-tenth:]
        return tuple(
            InterfaceLoss(
                stage=number,
                guess_first=mean(f"preprocess_{number}", first),
                guess_last=mean(f"preprocess_{number}", last),
                correction_first=mean(f"coarse_{number}", first),
                correction_last=mean(f"coarse_{number}", last),
            )
            for number in range(1, len(self._executor.plan.stages))
        )

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on: weights, optimizers, schedules, numbers."""
        return {
            "operators": self._operators.state_dict(),
            "learners": {name: one.state_dict() for name, one in self._learners.items()},
            "step": self.step,
            "total": self.total,
            "losses": self._losses,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set what `state_dict` gave.

        Raises:
            ValueError: It was made for another number of steps.
        """
        if state["total"] != self.total:
            raise ValueError(f"it takes {state['total']} steps per interface, not {self.total}")
        self._operators.load_state_dict(state["operators"])
        for name, learner in self._learners.items():
            learner.load_state_dict(state["learners"][name])
        self.step = state["step"]
        self._losses = list(state["losses"])


def train_mode(network: nn.Module, *, dropout: bool) -> None:
    """Set training mode, but leave dropout off unless it is asked for."""
    network.train()
    for module in () if dropout else dropouts(network):
        module.training = False


def _stages_of(sequential: nn.Module, count: int) -> Stages:
    def piece(name: str) -> fx.GraphModule:
        return cast(fx.GraphModule, sequential.get_submodule(name))

    return Stages(tuple(piece(f"fine_{number}") for number in range(count)), piece("head"))


def _minus(a: State, b: State) -> State:
    return {name: a[name] - value for name, value in b.items()}


def _relative(found: State, wanted: State) -> torch.Tensor:
    """Squared error over the energy of what was wanted, mean over the tensors of the state."""
    losses = []
    for name, value in found.items():
        energy = wanted[name].square().mean().clamp_min(1e-12)
        losses.append((value - wanted[name]).square().mean() / energy)
    return torch.stack(losses).mean()
