from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from passes.capture.equivalence import Reference
from passes.errors import CaptureError
from passes.ir.example_inputs import bind
from passes.ir.isolation import preserved
from passes.ir.run_step import StepResult, compare, relative_error, run_one_step


class Counter(nn.Module):
    """Puts a new tensor in the place of one buffer and writes to another."""

    replaced: Tensor
    written: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("replaced", torch.zeros(()))
        self.register_buffer("written", torch.zeros(()))
        self.register_buffer("untouched", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.replaced = self.replaced + 1
        self.written.add_(1)
        return self.linear(x) * self.replaced + torch.rand(())


def test_everything_is_put_back() -> None:
    counter, dropout = Counter(), nn.Dropout().eval()
    model = nn.Sequential(counter, dropout)
    gradient = torch.ones(4)
    counter.linear.bias.grad = gradient
    replaced = counter.replaced
    random = torch.get_rng_state()
    with preserved(model):
        model.eval()
        model(torch.rand(2, 4)).sum().backward()
        assert counter.replaced.item() == counter.written.item() == 1

    assert counter.replaced is replaced
    assert counter.replaced.item() == counter.written.item() == 0
    assert (counter.training, dropout.training) == (True, False)
    assert counter.linear.bias.grad is gradient
    assert counter.linear.weight.grad is None
    assert torch.equal(torch.get_rng_state(), random)


def test_a_run_is_repeatable_and_tells_which_buffers_it_changed() -> None:
    model = Counter()
    arguments = bind(model, (torch.rand(2, 4),), {})
    first, second = (
        run_one_step(model, lambda c: model(*c.args), arguments, train=True, grad=True)
        for _ in range(2)
    )

    assert compare(second, first) == ""
    assert set(first.changed) == {"replaced", "written"}
    assert set(first.gradients) == {"linear.weight", "linear.bias", "input 0"}


@pytest.mark.parametrize(
    ("value", "reference", "error"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 2.2], [1.0, 2.0], 0.1),
        ([0.5, 0.0], [0.0, 0.0], 0.5),
        ([float("nan"), 2.0], [float("nan"), 2.0], 0.0),
        ([float("nan"), 2.0], [1.0, 2.0], float("inf")),
        ([float("inf")], [float("inf")], 0.0),
        ([], [], 0.0),
    ],
)
def test_errors_are_relative_to_the_largest_magnitude(
    value: list[float], reference: list[float], error: float
) -> None:
    assert relative_error(torch.tensor(value), torch.tensor(reference)) == pytest.approx(error)


def test_integers_are_equal_or_infinitely_wrong() -> None:
    assert relative_error(torch.tensor([1, 2]), torch.tensor([1, 2])) == 0
    assert relative_error(torch.tensor([1, 3]), torch.tensor([1, 2])) == float("inf")


def test_infinities_of_opposite_sign_differ() -> None:
    plus, minus = torch.tensor([float("inf"), 1.0]), torch.tensor([-float("inf"), 1.0])
    assert relative_error(minus, plus) == float("inf")


def one_run(**changes: object) -> StepResult:
    fields: dict[str, object] = {
        "outputs": [torch.ones(2), 3],
        "gradients": {"w": torch.ones(2), "unused": None},
        "changed": {"b": torch.ones(1)},
        "written": frozenset(),
    }
    return StepResult(**(fields | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("candidate", "reason"),
    [
        (one_run(), ""),
        (one_run(gradients={"w": torch.ones(2)}), ""),
        (one_run(gradients={"w": torch.ones(2), "unused": torch.zeros(2)}), ""),
        (one_run(outputs=[torch.ones(2)]), "1 outputs instead of 2"),
        (one_run(outputs=[torch.ones(2), 4]), "output 1 differs: 4 instead of 3"),
        (one_run(outputs=[torch.ones(2, 1), 3]), r"output 0 differs: \[2, 1\] .* instead of \[2\]"),
        (one_run(outputs=[torch.ones(2).double(), 3]), "torch.float64 instead of"),
        (one_run(outputs=[torch.full((2,), 1.1), 3]), r"relative error 1.0e-01 \(limit 1e-05\)"),
        (one_run(gradients={}), "gradient of w differs: relative error 1.0e"),
        (one_run(gradients={"w": torch.zeros(2)}), "gradient of w differs: relative error 1.0e"),
        (
            one_run(gradients={"w": torch.ones(2), "unused": torch.ones(2)}),
            "gradient of unused differs",
        ),
        (one_run(changed={}), "the step does not change buffer b"),
        (one_run(changed={"b": torch.ones(1), "c": torch.ones(1)}), "the step changes buffer c"),
        (one_run(changed={"b": torch.zeros(1)}), "buffer b differs after the step"),
    ],
)
def test_a_difference_is_named(candidate: StepResult, reason: str) -> None:
    difference = compare(candidate, one_run())

    assert re.search(reason, difference)
    assert bool(difference) == bool(reason)


def reference(model: nn.Module, *args: Tensor, dynamic: tuple[str, ...] = ("batch",)) -> Reference:
    return Reference(model, bind(model, args, {}).with_dynamic(dynamic))


def test_a_candidate_is_held_against_both_modes_and_two_inputs() -> None:
    class Half(nn.Module):
        def forward(self, input: Tensor) -> Tensor:  # named as in Dropout
            return input if self.training else 0.5 * input

    class OneSize(nn.Module):
        def forward(self, input: Tensor) -> Tensor:
            return input + torch.zeros(2, 4)

    identity = reference(nn.Identity(), torch.rand(2, 4))

    assert identity.mismatch(nn.Identity()) == ""
    assert "in evaluation mode, output 0 differs" in identity.mismatch(Half())
    assert "fails in evaluation mode on a second input" in identity.mismatch(OneSize())
    assert "in training mode, output 0 differs" in identity.mismatch(nn.Dropout())


def test_a_model_that_cannot_train_on_the_example_is_noted() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    assert not reference(model, torch.rand(1, 4)).notes  # a second sample makes it train
    result = reference(model, torch.rand(1, 4), dynamic=())

    assert result.notes == [
        "training mode was not compared: the model fails in it (ValueError: Expected more than 1 "
        "value per channel when training, got input size torch.Size([1, 4])); give an example that "
        "it can train on"
    ]


def test_a_model_that_fails_says_so_with_the_shapes() -> None:
    with pytest.raises(CaptureError, match=r"Linear itself fails .* \(input \[2, 3\]\): Runtime"):
        reference(nn.Linear(4, 4), torch.rand(2, 3))


def test_every_input_is_varied_by_itself() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x * 2 + y

    class Confused(nn.Module):  # right only where both inputs are alike, as in `labels=ids`
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return y * 2 + x

    ids = torch.arange(12).reshape(3, 4)
    reference = Reference(Pair(), bind(Pair(), (ids, ids), {}))
    assert reference.mismatch(Pair()) == ""
    reason = reference.mismatch(Confused())
    assert reason.startswith("where one input is changed by itself, output 0 differs")


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "uint16", "uint32"])
def test_inputs_of_types_without_arithmetic_are_varied_and_compared(dtype: str) -> None:
    class Scales(nn.Module):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return x * scale.to(torch.complex64).real

    scale = torch.arange(1, 9).view(2, 4).to(getattr(torch, dtype))
    reference = Reference(Scales(), bind(Scales(), (X, scale), {}))
    assert reference.mismatch(Scales()) == ""
    assert "output 0 differs" in reference.mismatch(Unscaled())


class Unscaled(nn.Module):
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return x * scale.to(torch.complex64).real.mean()


X = torch.rand(2, 4)
