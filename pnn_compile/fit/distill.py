"""Distillation interface by interface: train every operator alone, against the original's states.

With s_j the true state after stage j, the preprocessing operator C_j is trained towards the state
that enters its stage, x_j = C_j(input) to s_{j-1}, and the coarse propagator F_j towards the error
that remains after its stage:

    chain       F_j(x_j, s_{j-1} - x_j)   to   s_j - g_j(x_j)
    collapsed   P_j(y_{j-1} - x_j)        to   T_{j-1} - T_j

where y_{j-1} is the uncorrected state after stage j - 1, and T_j is the last state that the fine
stages after stage j reach from y_j. With three stages, T_0 = g_2(g_1(y_0)) is the true last state,
T_1 = g_2(y_1) and T_2 = y_2. The targets telescope: (T_0 - T_1) + (T_1 - T_2) = s_2 - y_2, so that
corrections without an error return the original's outputs exactly.

The x_j are detached: no gradient crosses an interface. The 2 (N - 1) problems share nothing but
the batch and the true states, and could run on as many devices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import fx, nn

from passes.capture.refold import dropouts
from passes.errors import OptionError
from passes.transform.executor import Executor, State
from passes.transform.network import CALL, Network
from passes.transform.split import Stages
from pnn_compile.fit.optimizer import MakeOptimizer, OptimizerStep
from pnn_compile.inputs import device_of, named_batch

if TYPE_CHECKING:
    from pnn_compile.compiled import Compiled


@dataclass(frozen=True)
class InterfaceLoss:
    """Losses of one interface: squared errors relative to the squared norm of the target.

    Attributes:
        stage: Number of the stage after the interface.
        guess_first: Of the guess that enters it; mean over the first tenth of the steps.
        guess_last: The same over the last tenth.
        correction_first: Of the correction, whose target is the error that remains without one:
            1 for a correction of zero. The target shrinks as the guess improves. Mean over the
            first tenth of the steps.
        correction_last: The same over the last tenth.
    """

    stage: int
    guess_first: float
    guess_last: float
    correction_first: float
    correction_last: float


class Distiller:
    """Train the operators of a network one by one; the fine stages stay as they are.

    Args:
        compiled: The network.
        teacher: A fixed copy of `compiled.sequential`.
        make_optimizer: Makes the optimizer and learning rate schedule of each operator.
        total: Number of training steps.
        autocast: Lower precision to run the operators in.
        clip_norm: Largest norm of the gradient of one operator, or None.

    Raises:
        OptionError: No operator has a parameter to train.
    """

    def __init__(
        self,
        compiled: Compiled,
        teacher: nn.Module,
        make_optimizer: MakeOptimizer,
        total: int,
        *,
        autocast: torch.dtype | None,
        clip_norm: float | None,
    ) -> None:
        self._compiled = compiled
        self._executor = Executor(compiled, _stages_of(teacher, len(compiled.plan.stages)))
        self._operators = compiled.operators.named()
        pieces = nn.ModuleList([*compiled.stages.fine, compiled.stages.head])
        self._fine = list(pieces.modules())
        frozen = set(pieces.parameters())  # family "fine" shares the parameters of its stage
        self._optimizers = {
            name: OptimizerStep(
                [p for p in operator.parameters() if p.requires_grad and p not in frozen],
                make_optimizer,
                total,
                autocast=autocast,
                clip_norm=clip_norm,
            )
            for name, operator in self._operators.items()
        }
        if not any(optimizer.parameters for optimizer in self._optimizers.values()):
            raise OptionError(
                f"no operator of {compiled.plan.model} has a parameter that requires a gradient: "
                "leave interface_epochs out, or compile with another coarse family"
            )
        self._autocast = autocast
        self.total = total
        self.step = 0
        self._losses: list[dict[str, float]] = []

    def train(self, *, dropout: bool) -> None:
        """Set training mode, except in modules that operators share with the fine stages."""
        train_mode(self._operators, dropout=dropout)
        for module in self._fine:
            module.training = False

    def train_step(self, batch: Any) -> float:
        """Take one training step at every interface; return the mean of the losses.

        Raises:
            OptionError: A loss is not finite.
        """
        executor, losses = self._executor, {}
        collapsed = executor.plan.sweep == "collapsed"
        # The fine stages may write into their inputs: the operators read copies.
        inputs, operator_inputs = (named_batch(self._compiled, batch) for _ in range(2))
        with torch.no_grad():
            true = uncorrected = executor.advance(0, {}, executor.fine(0, {}, inputs))
            last = self._last(0, uncorrected, inputs) if collapsed else {}
        before_window: State = {}
        for number in range(1, len(executor.plan.stages)):
            if executor.plan.opens_window(number):
                before_window = true
                with torch.no_grad():
                    true = executor.advance(number, true, executor.fine(number, true, inputs))
                continue
            name = f"preprocess_{number}"
            with self._precision():
                guess = executor.guess(number, operator_inputs, before_window)
            losses[name] = self._train(name, guess, true)
            guess = {key: value.detach().to(true[key].dtype) for key, value in guess.items()}
            with torch.no_grad():
                produced = executor.fine(number, guess, inputs)
                true_after = executor.advance(number, true, executor.fine(number, true, inputs))
                before, target = true, _minus(true_after, produced)
                if collapsed:
                    before, uncorrected = (
                        uncorrected,
                        executor.advance(number, uncorrected, produced),
                    )
                    last_before, last = last, self._last(number, uncorrected, inputs)
                    target = _minus(last_before, last)  # T_{j-1} - T_j
            name = f"coarse_{number}"
            with self._precision():
                correction = executor.correct(number, guess, before, inputs)
            losses[name] = self._train(name, correction, target)
            true = true_after
        self.step += 1
        self._losses.append(losses)
        return sum(losses.values()) / len(losses)

    def _last(self, number: int, state: State, inputs: Mapping[str, Any]) -> State:
        """Return the last state that the fine stages after stage `number` reach from its state."""
        for following in range(number + 1, len(self._executor.plan.stages)):
            produced = self._executor.fine(following, state, inputs)
            state = self._executor.advance(following, state, produced)
        return state

    def _precision(self) -> torch.autocast:
        device = device_of(self._compiled.module)
        return torch.autocast(device.type, self._autocast, enabled=self._autocast is not None)

    def _train(self, name: str, state: State, target: State) -> float:
        loss = _relative(state, target)
        if not torch.isfinite(loss):
            raise OptionError(
                f"the loss of {name} is {loss.item()}: lower the learning rate, or check the inputs"
            )
        self._optimizers[name].step(loss)
        return loss.item()

    def report(self) -> tuple[InterfaceLoss, ...]:
        """Return the losses of every interface, first and last."""
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
            for number in sorted(self._executor.guesses)
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what resumes the distillation: weights, optimizers, schedules, step, losses."""
        return {
            "operators": self._operators.state_dict(),
            "learners": {name: one.state_dict() for name, one in self._optimizers.items()},
            "step": self.step,
            "total": self.total,
            "losses": self._losses,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what `state_dict` returned.

        Raises:
            ValueError: It is of a distillation of another number of steps.
        """
        if state["total"] != self.total:
            raise ValueError(f"it takes {state['total']} steps per interface, not {self.total}")
        self._operators.load_state_dict(state["operators"])
        for name, optimizer in self._optimizers.items():
            optimizer.load_state_dict(state["learners"][name])
        self.step = state["step"]
        self._losses = list(state["losses"])


def train_mode(network: nn.Module, *, dropout: bool) -> None:
    """Set training mode, if the network has one; dropout stays off unless it is asked for."""
    one_mode = isinstance(network, Network) and network.meta[CALL].only_mode == "evaluation"
    network.train(not one_mode)
    for module in () if dropout else dropouts(network):
        module.training = False


def _stages_of(sequential: nn.Module, count: int) -> Stages:
    def piece(name: str) -> fx.GraphModule:
        return cast(fx.GraphModule, sequential.get_submodule(name))

    return Stages(tuple(piece(f"fine_{number}") for number in range(count)), piece("head"))


def _minus(a: State, b: State) -> State:
    return {name: a[name] - value for name, value in b.items()}


def _relative(state: State, target: State) -> torch.Tensor:
    """Compute squared error over squared norm of the target, mean over the tensors of a state."""
    losses = []
    for name, value in state.items():
        energy = target[name].square().mean().clamp_min(1e-12)
        losses.append((value - target[name]).square().mean() / energy)
    return torch.stack(losses).mean()
