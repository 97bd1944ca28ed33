from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from examples import decoder
from passes.errors import OptionError
from passes.plan.schema import Plan
from tests.models.builders import linear_chain
from tests.support.parameters import quick
from tests.support.programs import analysis, compile_model, compile_program, compiled, program


def plan_of(name: str, **options: Any) -> Plan:
    plan = compiled(name, **options).plan
    assert plan is not None
    return plan


# --- stages and head ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", quick())
def test_stages_and_head_cover_the_program_once(name: str) -> None:
    plan, order = plan_of(name, stages=3), program(name).order
    names = [node.name for node in order]
    starts = [names.index(stage.first) for stage in plan.stages]
    stops = [names.index(stage.last) + 1 for stage in plan.stages]

    assert starts == [0, *stops[:-1]]
    assert [stage.nodes for stage in plan.stages] == [
        b - a for a, b in zip(starts, stops, strict=True)
    ]
    assert stops[-1] + plan.head.nodes == len(order)
    for stage, face in zip(plan.stages, plan.interfaces, strict=True):
        assert stage.last == face.after
    costs = analysis(name).costs.values()
    flops = sum(stage.flops for stage in plan.stages) + plan.head.flops
    assert flops == sum(cost.flops for cost in costs)
    for stage, (before, after) in zip(
        plan.stages[1:], itertools.pairwise(plan.interfaces), strict=True
    ):
        entering = {value.name for value in before.state}
        leaving = {value.name for value in after.state}
        assert set(stage.consumes) <= entering
        assert set(stage.produces) == leaving - entering


def test_a_stage_is_described() -> None:
    plan = plan_of("unet", cuts=("down.1", "up.1"))
    first, second, _ = plan.stages

    assert (first.first, first.last, first.nodes) == ("down_0_0", "max_pool2d", 4)
    assert (first.first_module, first.last_module) == ("down.0.0", "down.0.2")
    assert (first.inputs, first.sides, first.consumes) == (("x",), (), ())
    assert first.produces == ("down_0_2", "max_pool2d")
    assert first.parameters == 8 * 9 + 2 * 8
    assert first.parameter_bytes == 4 * first.parameters
    # Convolution, normalization, activation of [2, 8, 16, 16] and the pooled image.
    assert first.activation_bytes == 4 * (3 * 2 * 8 * 256 + 2 * 8 * 64)
    assert first.flops < first.backward_flops <= 2 * first.flops
    assert first.seconds is None
    assert (first.preprocess, first.coarse) == (None, None)

    assert plan.interfaces[0].module == "down.1.0"
    assert [str(value.spec) for value in plan.interfaces[0].state] == [
        "[B, 8, 16, 16] float32",
        "[B, 8, 8, 8] float32",
    ]
    # The first skip passes through; the second one is made and used inside.
    assert (second.consumes, second.produces) == (("max_pool2d",), ("cat_1",))
    assert [value.name for value in plan.interfaces[1].state] == ["down_0_2", "cat_1"]


def test_side_values_and_inputs_are_named_where_they_are_read() -> None:
    plan = plan_of("float_mask_encoder", cuts=("blocks.1", "blocks.2"))

    assert [stage.inputs for stage in plan.stages] == [("tokens",)] * 3
    assert [stage.sides for stage in plan.stages] == [
        (),
        ("ne", "getitem", "to", "sub", "mul"),
        ("ne", "getitem", "to", "sub", "mul"),
    ]
    assert plan.head.inputs == ()


def test_the_head_is_given_what_it_needs() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = linear_chain(4, 8)

        def forward(self, x: Tensor, late: Tensor) -> Tensor:
            return self.trunk(x).mean(dim=1) + late

    plan = compile_model(Late(), torch.randn(2, 8), torch.randn(2), stages=2).plan
    assert plan is not None

    assert (plan.head.nodes, plan.head.inputs, plan.head.first_module) == (2, ("late",), "")
    assert plan.head.flops == 4


def test_measured_plans_have_seconds() -> None:
    plan = compile_program(program("deep_batchnorm"), stages=2, cost="measured").plan
    assert plan is not None
    seconds = [stage.seconds for stage in plan.stages]
    assert all(second is not None and second > 0 for second in seconds)
    assert plan.head.seconds is not None
    total = sum(second or 0.0 for second in seconds) + plan.head.seconds

    assert (plan.cost, plan.forecast.unit) == ("measured", "seconds")
    assert plan.forecast.sequential == pytest.approx(total)
    slowest = max(second or 0.0 for second in seconds)
    assert plan.forecast.makespan >= slowest * (1 - 1e-9)  # sums in another order


def test_a_callable_is_named_and_balanced() -> None:
    def first_layers_only(node: fx.Node, flops: int) -> float:
        return 1.0 if node.name in ("_0", "_1", "_2", "_3") else 0.0

    plan = compile_program(program("mlp"), stages=2, cost=first_layers_only).plan
    assert plan is not None

    assert plan.cost.endswith("first_layers_only")
    assert plan.forecast.unit == "cost"
    assert plan.forecast.sequential == 4.0
    assert plan.interfaces[0].before in ("_1", "_2", "_3")


# --- ties -----------------------------------------------------------------------------------------


def test_parameters_that_several_stages_read_are_recorded() -> None:
    assert plan_of("tied_linear", cuts=("6",)).ties == {"2.weight": (0, 1)}
    assert plan_of("tied_linear", cuts=("12",)).ties == {}
    shared = plan_of("reused_module", cuts=("middle",)).ties
    assert shared == {"shared.0.weight": (0, 1), "shared.0.bias": (0, 1)}


def test_the_tied_vocabulary_of_a_decoder_is_in_the_first_stage_and_in_the_head() -> None:
    model = decoder.build_model(layers=4, width=16, heads=2, vocabulary=32, context=8)
    plan = compile_model(model, torch.randint(32, (2, 8)), stages=3).plan
    assert plan is not None

    assert plan.ties == {"token_embedding.weight": (0, 3)}  # three stages; the head is the fourth


def test_a_recomputed_embedding_is_a_tie() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(4, 64)
            self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))

        def forward(self, x: Tensor, kind: Tensor) -> Tensor:
            condition = self.embedding(kind)
            for layer in self.layers:
                x = torch.tanh(layer(x + condition))
            return x

    inputs = (torch.randn(8, 64), torch.randint(4, (8,)))
    plan = compile_model(Late(), *inputs, cuts=("layers.1", "layers.2")).plan
    assert plan is not None

    assert [stage.sides for stage in plan.stages] == [(), ("embedding",), ("embedding",)]
    assert plan.ties == {"embedding.weight": (0, 1, 2)}


# --- forecast and notes ---------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"correction": "difference"}, {"iterations": 2}])
def test_the_forecast_is_the_step_time_model(options: dict[str, Any]) -> None:
    plan = plan_of("resnet", stages=3, coarse="units", **options)
    fine = [stage.flops for stage in plan.stages]
    preprocess = [stage.preprocess.flops if stage.preprocess else 0 for stage in plan.stages]
    calls = 2 if plan.correction == "difference" else 1
    sweep = calls * sum(stage.coarse.flops if stage.coarse else 0 for stage in plan.stages)
    makespan = max(a + b for a, b in zip(fine, preprocess, strict=True))
    iterations = plan.iterations
    time = makespan + (iterations - 1) * max(fine) + iterations * sweep + plan.head.flops
    forecast = plan.forecast

    assert forecast.sequential == sum(fine) + plan.head.flops
    assert forecast.makespan == pytest.approx(makespan)
    assert forecast.serial == pytest.approx(iterations * sweep + plan.head.flops)
    assert forecast.time == pytest.approx(time)
    assert forecast.speedup == pytest.approx(forecast.sequential / time)
    assert forecast.imbalance == pytest.approx(3 * max(fine) / sum(fine))
    assert forecast.serial_share == pytest.approx(forecast.serial / forecast.sequential)
    assert forecast.bound >= forecast.speedup


def test_more_iterations_than_stages_are_not_counted() -> None:
    times = [plan_of("mlp", stages=2, iterations=k).forecast.time for k in (1, 2, 5)]

    assert times[0] < times[1] == times[2]


def test_a_plan_that_is_over_budget_or_slower_says_so() -> None:
    cheap, over, slow, copied = (
        plan_of(name, **options).notes
        for name, options in (
            ("resnet", {"stages": 2, "coarse_budget": 0.05}),
            ("mlp", {"stages": 3, "coarse_budget": 0.05}),
            ("dict_output", {"stages": 3}),
            ("resnet", {"stages": 2}),
        )
    )

    assert cheap == ()
    share, cheaper = copied
    assert share.endswith("fewer stages would shorten it")
    assert cheaper.startswith("cheaper corrections, which may keep less accuracy, would give: ")
    given = plan_of("resnet", stages=2, coarse="linear", sweep="collapsed").forecast.speedup
    assert f"coarse='linear' with sweep='collapsed' {given:.2f} times" in cheaper
    assert len(over) == 1
    assert over[0].startswith("the serial part takes ")
    assert "more than the coarse budget of 5.0%" in over[0]
    assert any(note.startswith("no gain: the parareal network needs 1.") for note in slow)
    assert plan_of("mlp", stages=3, coarse_budget=1.0).notes == ()
    assert plan_of("resnet", stages=2, coarse="exact").notes[-1].startswith("no gain")


def test_more_stages_than_pay_say_how_many_would_do() -> None:
    six, three, two = (plan_of("mlp", stages=count) for count in (6, 3, 2))
    assert six.forecast.speedup < three.forecast.speedup
    note = f"3 stages would do ({three.forecast.speedup:.2f} times the original's speed, these 6 "
    assert sum(text.startswith(note) for text in six.notes) == 1
    assert not any("would do" in text for text in two.notes)


def test_what_a_narrower_copy_gives_is_what_its_width_gives() -> None:
    class Block(nn.Module):
        def __init__(self, entering: int, width: int) -> None:
            super().__init__()
            stride = width // entering
            self.first = nn.Conv2d(entering, width, 3, stride, 1, groups=4)
            self.second = nn.Conv2d(width, width, 3, 1, 1, groups=4)
            self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(2))
            self.short = nn.Conv2d(entering, width, 1, 2) if stride > 1 else nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.norms[1](self.second(self.norms[0](self.first(x)).relu()))
            return (y + self.short(x)).relu()

    widths = [(8, 8)] * 3 + [(8, 16)] + [(16, 16)] * 2
    layers = [nn.Conv2d(3, 8, 3, 1, 1), *(Block(*pair) for pair in widths)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)]

    def plan(**more: object) -> Plan:
        network, images = nn.Sequential(*layers, *head), torch.randn(2, 3, 16, 16)
        plan = compile_model(network, images, stages=4, sweep="auto", **more).plan
        assert plan is not None
        return plan

    copied, narrow = plan(), plan(coarse_width=0.25)
    [note] = [note for note in copied.notes if note.startswith("cheaper")]
    assert f"coarse_width=0.25 {narrow.forecast.speedup:.2f}, " in note


def test_a_stage_of_less_than_half_the_mean_work_is_named() -> None:
    layers = nn.Sequential(*(nn.Linear(8, 8) for _ in range(9)))

    def notes(*cuts: str) -> str:
        plan = compile_model(layers, torch.randn(2, 8), cuts=cuts).plan
        assert plan is not None
        return " ".join(plan.notes)

    assert "less than half" not in notes("3", "6")
    given = compile_model(layers, torch.randn(2, 8), stages=2).plan
    assert given is not None
    assert (
        "stage 1 (33%) has less than half the mean work: 2 stages with other cuts would do "
        f"({given.forecast.speedup:.2f} times the original's speed, these 3 1.27)"
    ) in notes("4", "5")
    assert "stages 0 (33%), 1 (33%) have less" in notes("1", "2")


@pytest.mark.parametrize(
    ("widths", "said"),
    [
        (
            (64, 64, 64, 8, 8, 8),
            "stage 2 (18%) has less than half the mean work: 2 stages would do (",
        ),
        ((8, 64, 64, 8), "have less than half the mean work: 1 stage would be slower (1.00 times"),
    ],
)
def test_what_fewer_stages_give_stands_beside_a_small_one(
    widths: tuple[int, ...], said: str
) -> None:
    layers = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths)))
    plan = compile_model(layers, torch.randn(2, widths[0]), coarse="zero", stages=3).plan
    assert plan is not None
    assert said in " ".join(plan.notes)


@pytest.mark.parametrize(
    ("stages", "windows", "said"),
    [(2, 2, "1 stage a window would do (1.00 times"), (1, 4, "fewer windows may be as fast")],
)
def test_a_small_stage_in_windows_is_set_beside_fewer_stages_a_window(
    stages: int, windows: int, said: str
) -> None:
    layers = nn.Sequential(nn.Linear(8, 64), *(nn.Linear(64, 64) for _ in range(3)))
    x = torch.randn(2, 8)
    plan = compile_model(layers, x, stages=stages, windows=windows, coarse="linear").plan
    assert plan is not None
    assert f"stage 0 (16%) has less than half the mean work: {said}" in " ".join(plan.notes)


def test_fewer_stages_are_those_that_can_be_cut() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.a, self.b = nn.LayerNorm(8), nn.Linear(8, 32), nn.Linear(32, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.b(self.a(self.norm(x)).relu())

    layers = nn.Sequential(*(Block() for _ in range(3)))  # four stages would cut inside a block
    plan = compile_model(layers, torch.randn(2, 4, 8), stages=8).plan
    assert plan is not None
    [note] = [note for note in plan.notes if "less than half the mean work" in note]
    assert re.match(r"stages \d \(\d%\), .* have less than half the mean work: ", note)
    three = compile_model(layers, torch.randn(2, 4, 8), stages=3).plan
    assert three is not None
    eight = plan.forecast.speedup
    speeds = f"({three.forecast.speedup:.2f} times the original's speed, these 8 {eight:.2f})"
    assert f": 3 stages would do {speeds}" in note


def test_what_capture_noted_stands_in_the_plan() -> None:
    class Flagged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

        def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:
            for layer in self.layers:
                x = gain * layer(x)
            return x

    plan = compile_model(Flagged(), torch.randn(2, 4), 2.0, stages=2).plan
    assert plan is not None

    assert plan.notes[0] == "argument 'gain' is fixed at 2.0 and no longer taken"


@pytest.mark.parametrize("name", ["running_mean", "step_counter"])
@pytest.mark.parametrize("options", [{"iterations": 2}, {"coarse": "exact"}])
def test_stages_that_change_at_every_call_are_not_called_twice(
    name: str, options: dict[str, Any]
) -> None:
    message = r"changes 7 buffers at every call, in evaluation mode too \(0\.\w+, 1\.\w+, 2\.\w+\)"
    with pytest.raises(OptionError, match=message):
        compiled(name, stages=2, **options)


def test_batchnorm_may_be_called_twice() -> None:
    assert plan_of("deep_batchnorm", stages=2, iterations=2).iterations == 2


@pytest.mark.parametrize("name", ["resnet", "encoder_decoder"])
def test_the_same_question_gets_the_same_plan(name: str) -> None:
    random = torch.get_rng_state()
    first, second = (
        compile_program(
            program(name), stages=3, coarse="units" if name == "resnet" else "auto"
        ).plan
        for _ in range(2)
    )

    assert first == second
    assert torch.equal(torch.get_rng_state(), random)
