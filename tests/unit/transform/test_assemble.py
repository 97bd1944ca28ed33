from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from passes.capture.ladder import capture
from tests.models.builders import linear_chain
from tests.models.zoo import CAPTURABLE, by_name
from tests.support.parameters import quick
from tests.support.parity import step
from tests.support.programs import call, compile_model, compile_program, compiled, parts, program

# Their buffers are others after every call, so that no stage can be computed twice;
# test_planning.py has the error.
CHANGING = ("running_mean", "step_counter")
REPEATABLE = tuple(name for name in CAPTURABLE if name not in CHANGING)


def network(name: str, **options: Any) -> fx.GraphModule:
    return parts(compiled(name, **options))[2]


def evaluate(name: str, module: nn.Module, inputs: dict[str, Any]) -> Any:
    """Call a network in evaluation mode and leave the weights' owner as it was."""

    def forward(**arguments: Any) -> Any:
        return module.eval()(**arguments)

    return step(program(name).module, (), inputs, train=False, forward=forward).output


def assert_equal(actual: Any, expected: Any, limit: float = 1e-4) -> None:
    """Assert that outputs agree, relative to the largest magnitude."""
    pairs = zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True)
    for actual, expected in pairs:
        scale = max(1.0, float(expected.abs().max()))
        assert float((actual - expected).abs().max()) <= limit * scale


# --- the oracles ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", quick(REPEATABLE))
def test_with_the_fine_stages_as_coarse_networks_the_difference_form_is_exact(name: str) -> None:
    module = network(name, stages=3, coarse="exact", correction="difference")
    inputs = call(name, 3)

    assert_equal(evaluate(name, module, inputs), evaluate(name, program(name).module, inputs))


@pytest.mark.parametrize("name", quick(REPEATABLE))
def test_as_many_iterations_as_stages_give_the_model(name: str) -> None:
    module = network(name, stages=3, iterations=3)
    inputs = call(name, 3)
    actual = evaluate(name, module, inputs)

    # Iteration k takes over the k stages that are exact by then: no rounding at all.
    assert_equal(actual, evaluate(name, program(name).module, inputs), limit=0.0)


@pytest.mark.parametrize("stages", [2, 3, 5])
def test_a_linear_network_equals_the_original(stages: int) -> None:
    """The consistency theorem of Lee, Lee, Park (2022): F = g, linear, without bias."""
    model = by_name("deep_linear").build().double()
    (x,) = by_name("deep_linear").args(4)
    captured = capture(model, (x.double(),))
    exact = compile_program(captured, stages=stages, coarse="exact", correction="residual")
    other = compile_program(captured, stages=stages, coarse="linear", correction="residual")
    with torch.no_grad():
        expected, actual, wrong = (
            model(x.double()),
            parts(exact)[2](x.double()),
            parts(other)[2](x.double()),
        )

    assert float((actual - expected).abs().max() / expected.abs().max()) < 1e-10
    assert float((wrong - expected).abs().max() / expected.abs().max()) > 1e-2


def test_a_nonlinear_network_does_not_equal_the_original_in_residual_form() -> None:
    module = network("mlp", stages=2, coarse="exact", correction="residual")
    inputs = call("mlp", 3)

    expected = evaluate("mlp", program("mlp").module, inputs)
    assert (evaluate("mlp", module, inputs) - expected).abs().max() > 1e-2


def test_each_iteration_makes_one_more_stage_exact() -> None:
    inputs = call("resnet", 3)
    expected = evaluate("resnet", program("resnet").module, inputs)
    errors = []
    for iterations in (1, 2, 3, 4, 5):
        module = network("resnet", stages=4, iterations=iterations)
        errors.append(float((evaluate("resnet", module, inputs) - expected).abs().max()))

    assert min(errors[:3]) > 1e-3
    assert errors[3:] == [0.0, 0.0]


def test_without_a_correction_the_head_reads_the_last_stage() -> None:
    compilation = compiled("resnet", stages=3, coarse="zero")
    stages, _, module = parts(compilation)
    assert compilation.operators is not None
    inputs = call("resnet", 3)
    last, guess = stages.fine[-1], compilation.operators.preprocess[2]

    def only_last(input: Tensor) -> Tensor:
        return stages.head.eval()(last.eval()(guess.eval()(input)))

    alone = step(program("resnet").module, (), inputs, train=False, forward=only_last).output
    assert torch.equal(evaluate("resnet", module, inputs), alone)


# --- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("correction", ["residual", "difference"])
@pytest.mark.parametrize("name", quick())
def test_every_parameter_of_the_network_is_trained(name: str, correction: str) -> None:
    module = copy.deepcopy(network(name, stages=3, correction=correction)).train()
    outputs = pytree.tree_leaves(module(**call(name, 5)))  # another batch size than the example's
    loss = torch.stack([o.square().mean() for o in outputs if o.requires_grad]).sum()
    loss.backward()
    gradients = {key: parameter.grad for key, parameter in module.named_parameters()}

    assert gradients
    assert [key for key, gradient in gradients.items() if gradient is None] == []
    assert all(bool(g.isfinite().all()) for g in gradients.values() if g is not None)
    operators = [g for key, g in gradients.items() if key.startswith("preprocess_")]
    assert any(bool(g.any()) for g in operators if g is not None)


@pytest.mark.parametrize("coarse", ["linear", "units", "conv", "lowrank"])
@pytest.mark.parametrize("correction", ["residual", "difference"])
def test_every_family_trains_in_both_forms(coarse: str, correction: str) -> None:
    module = copy.deepcopy(network("resnet", stages=3, coarse=coarse, correction=correction))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    inputs = call("resnet", 8)
    labels = torch.arange(8) % 4
    losses = []
    for _ in range(16):
        loss = nn.functional.cross_entropy(module(**inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    assert losses[-1] < 0.9 * losses[0]
    before = network("resnet", stages=3, coarse=coarse, correction=correction)
    moved = {
        key for key, p in module.named_parameters() if not torch.equal(p, before.get_parameter(key))
    }
    for part in ("preprocess_1.", "preprocess_2.", "coarse_1.", "coarse_2.", "fine_0.", "head."):
        assert any(key.startswith(part) for key in moved), part


# --- the graph ------------------------------------------------------------------------------------


def test_the_code_reads_like_the_algorithm() -> None:
    lines = [
        re.sub(r";.*", "", line).strip() for line in network("mlp", stages=3).code.splitlines()
    ]

    assert [line for line in lines if " = " in line and "None" not in line] == [
        "input_1 = input",
        "x_1 = self.preprocess_1(input_1)",
        "x_2 = self.preprocess_2(input_1)",
        "y_0 = self.fine_0(input_1)",
        "y_1 = self.fine_1(x_1)",
        "y_2 = self.fine_2(x_2)",
        "r_1 = y_0 - x_1",
        "c_1 = self.coarse_1(r_1)",
        "u_1 = y_1 + c_1",
        "r_2 = u_1 - x_2",
        "c_2 = self.coarse_2(r_2)",
        "u_2 = y_2 + c_2",
        "output = self.head(u_2)",
    ]


def test_the_difference_form_is_given_the_guess_and_the_residual() -> None:
    options = {"stages": 2, "coarse": "conv", "correction": "difference"}

    assert "self.coarse_1(x_1, r_1)" in network("mlp", **options).code
    assert "self.coarse_1(r_1)" in network("mlp", **{**options, "coarse": "linear"}).code


def test_exact_stages_are_not_computed_again() -> None:
    graph = network("mlp", stages=3, iterations=3).graph
    calls = [str(node.target) for node in graph.nodes if node.op == "call_module"]

    # What nothing reads is left out: no correction is needed, every stage is exact in its turn.
    assert [calls.count(f"fine_{number}") for number in range(3)] == [1, 1, 1]
    graph = network("mlp", stages=3, iterations=2).graph
    calls = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    assert [calls.count(f"fine_{number}") for number in range(3)] == [1, 2, 1]


def test_keys_say_whose_they_are() -> None:
    keys = network("unet", stages=3).state_dict()
    prefixes = {key.partition(".")[0] for key in keys}

    assert prefixes == {
        "fine_0", "fine_1", "fine_2", "preprocess_1", "preprocess_2", "coarse_1", "coarse_2", "head"
    }  # fmt: skip
    assert "fine_0.down.0.0.weight" in keys


def test_what_passes_through_a_stage_is_exact() -> None:
    name = "dict_output"
    module = copy.deepcopy(network(name, cuts=("blocks.2", "blocks.3")))
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            if key.startswith(("coarse_", "preprocess_")):
                parameter.normal_()
    inputs = call(name, 3)
    actual = evaluate(name, module, inputs)
    expected = evaluate(name, program(name).module, inputs)

    # The first blocks are in the first stage; later stages carry what they gave untouched.
    assert torch.equal(actual["hidden"][0], expected["hidden"][0])
    assert not torch.allclose(actual["logits"], expected["logits"])


def test_a_skip_is_carried_by_identity_until_it_is_read() -> None:
    graph = network("unet", cuts=("down.1", "up.1")).graph
    residuals = {node.name: node for node in graph.nodes if node.name.startswith("r_2")}

    assert set(residuals) == {"r_2_down_0_2", "r_2_cat_1"}
    assert residuals["r_2_down_0_2"].args[0].name == "y_0_down_0_2"
    assert residuals["r_2_cat_1"].args[0].name == "u_1"


# --- seeds ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("coarse", ["linear", "units", "conv"])
def test_weights_follow_from_the_seed(coarse: str) -> None:
    def weights(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(torch.seed() % 1000)  # whatever state the caller's generator is in
        module = parts(compile_program(program("resnet"), stages=2, coarse=coarse, seed=seed))[2]
        return {k: v for k, v in module.state_dict().items() if k.startswith(("coarse", "pre"))}

    first, again, other = weights(0), weights(0), weights(1)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_compiling_leaves_the_random_state_alone() -> None:
    model = linear_chain(4, 4)
    random = torch.get_rng_state()
    compile_model(model, torch.ones(2, 4), stages=2)

    assert torch.equal(torch.get_rng_state(), random)
