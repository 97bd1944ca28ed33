from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from examples import amoebanet, decoder, resnet1001
from passes.analysis.analysis import Analysis, analyze
from passes.capture.ladder import capture
from passes.cost.measured import Seconds
from passes.cost.node_facts import observe
from passes.errors import PartitionError
from passes.ir.program import Program
from passes.options import Options
from passes.partition.choose_cuts import Cut, choose_cut, next_best_moves
from passes.partition.problem import CutProblem, makespan, serial
from passes.partition.search import DoesNotFit, solve
from passes.plan.build import make_plan
from passes.plan.num_stages import cut_and_plan
from passes.plan.schema import Plan
from tests.models.builders import linear_chain
from tests.support.programs import analysis, analyze_model
from tests.unit.partition.test_search import tight_problems


def small_decoder() -> Analysis:
    model = decoder.build_model(layers=8, width=32, heads=2, vocabulary=64, context=16)
    return analyze_model(model, torch.randint(64, (2, 16)))


def small_resnet() -> Analysis:
    return analyze_model(resnet1001.build_model(4), torch.randn(2, 3, 16, 16))


def plan_of(facts: Analysis, **options: object) -> Plan:
    return cut_and_plan(facts, Options(**options))[1]  # type: ignore[arg-type]


def starts(plan: Plan) -> list[str]:
    return [interface.before for interface in plan.interfaces]


# --- the search -----------------------------------------------------------------------------------


def test_a_decoder_is_cut_evenly_between_its_blocks() -> None:
    facts = small_decoder()
    for stages, blocks in ((2, [4]), (4, [2, 4, 6])):
        plan = plan_of(facts, stages=stages)
        cuts = [f"blocks_{block}_attention_norm" for block in blocks]
        assert starts(plan) == [*cuts, "norm"]
        assert plan.forecast.imbalance < 1.01


def test_a_resnet_is_cut_between_its_units_through_one_tensor() -> None:
    plan = plan_of(small_resnet(), stages=3)

    assert all(start.endswith("norm1") for start in starts(plan)[:-1])
    assert [len(interface.state) for interface in plan.interfaces] == [1, 1, 1]


def _layers(count: int) -> Analysis:
    """Blocks of three layers of one cost each, in a flat sequence, beside cheap operators."""
    blocks = [
        (nn.Conv1d(16, 16, 7, padding=3), nn.BatchNorm1d(16), nn.ReLU()) for _ in range(count)
    ]
    model = nn.Sequential(*itertools.chain.from_iterable(blocks))
    captured = capture(model, (torch.randn(2, 16, 16),))
    return analyze(captured, observe(captured), lambda node, flops: 1.0)


def test_cuts_lie_where_blocks_begin_and_the_price_is_told() -> None:
    facts = _layers(5)
    options = Options(stages=2, coarse="linear", preprocess="linear")
    between = choose_cut(facts, options)
    anywhere = choose_cut(facts, dataclasses.replace(options, cut_inside_blocks=True))
    assert (between.positions[0].index, anywhere.positions[0].index) == (9, 8)
    assert between.positions[0].boundary
    assert anywhere.note == ""
    assert "takes 12.5% longer" in between.note  # nine layers of fifteen instead of eight
    assert between.note in make_plan(facts, between, options).notes


def test_too_few_blocks_are_cut_inside_unless_the_number_is_free() -> None:
    facts = _layers(2)
    cut = choose_cut(facts, Options(stages=4, coarse="linear"))
    assert cut.inside_blocks
    assert cut.note.startswith("a cut lies inside a block")
    assert not all(position.boundary for position in cut.positions)
    assert len(plan_of(facts, stages="auto", coarse="linear").stages) <= 2
    named = plan_of(facts, cuts=["1"], coarse="linear")  # in front of the first normalization
    assert starts(named)[0] == "_1"


def objective(facts: Analysis, plan: Plan) -> float:
    """What the search minimises: the predicted time, and a FLOP per byte that crosses."""
    crossing = sum(interface.bytes for interface in plan.interfaces[:-1])
    return plan.forecast.time + crossing * facts.scale


@pytest.mark.parametrize("name", ["mlp", "conv_inplace", "conv1d", "deep_batchnorm", "segnet"])
@pytest.mark.parametrize("stages", [2, 3])
def test_no_other_cut_is_predicted_to_be_faster(name: str, stages: int) -> None:
    facts = analysis(name)
    options = Options(stages=stages, coarse="linear")
    chosen = choose_cut(facts, options)
    head = chosen.positions[-1]
    candidates = [p for p in facts.frontiers.positions if p.index < head.index]
    least = min(
        objective(facts, make_plan(facts, Cut((*cuts, head), 0.0), options))
        for cuts in itertools.combinations(candidates, stages - 1)
    )

    # The search knows the operators by estimates; a cut inside a block must be a little cheaper.
    assert objective(facts, make_plan(facts, chosen, options)) <= 1.05 * least


@pytest.mark.parametrize("name", ["mlp", "conv_inplace", "unrolled_lstm", "dict_output"])
def test_auto_takes_the_fewest_stages_that_are_nearly_best(name: str) -> None:
    facts = analysis(name)
    anywhere: dict[str, Any] = {"coarse": "linear", "cut_inside_blocks": True}
    chosen = len(plan_of(facts, stages="auto", **anywhere).stages)
    times = {}
    for stages in range(1, chosen + 4):
        try:
            plan = plan_of(facts, stages=stages, **anywhere)
        except PartitionError:
            break
        times[stages] = objective(facts, plan)
    best = min(times.values())

    assert times[chosen] <= 1.10 * best
    assert all(times[fewer] > 1.02 * best for fewer in range(1, chosen))


def test_auto_grows_with_the_depth_and_is_one_where_nothing_is_gained() -> None:
    def trunk(blocks: int) -> Analysis:
        layers = [(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 16)) for _ in range(blocks)]
        chain = [layer for block in layers for layer in block]
        return analyze_model(nn.Sequential(*chain), torch.randn(4, 16))

    shallow, deep = (len(plan_of(trunk(blocks), stages="auto").stages) for blocks in (12, 48))

    assert 1 < shallow < deep
    anywhere = plan_of(analysis("dict_output"), stages="auto", cut_inside_blocks=True)
    assert len(anywhere.stages) == 1


def test_units_are_cut_at_the_ends_of_whole_blocks() -> None:
    for name in ("mixer", "container_transformer", "float_mask_encoder"):
        plan = plan_of(analysis(name), stages=3, coarse="units")
        assert [stage.coarse.family for stage in plan.stages[1:] if stage.coarse] == ["units"] * 2


def with_seconds(facts: Analysis, *phases: tuple[float, float]) -> Analysis:
    """The analysis with these seconds, forward and backward, of its nodes."""
    seconds = dict(zip(facts.frontiers.order, phases, strict=True))
    costs = {
        node: dataclasses.replace(cost, cost=sum(seconds[node]), backward=seconds[node][1])
        for node, cost in facts.costs.items()
    }
    return dataclasses.replace(facts, costs=costs, unit="seconds")


def test_a_training_step_balances_each_phase() -> None:
    layers = [layer for _ in range(6) for layer in (nn.Linear(4, 512), nn.Linear(512, 4))]
    facts = analyze_model(nn.Sequential(*layers), torch.randn(8, 4))
    # After two blocks the sums are equal, 14 and 14, but no stage starts its backward before both
    # are done with forward: 10 + 12. After the first block it is 11 + 10.
    blocks = ((1, 6), (1, 6), (1, 1), (1, 1), (4, 1), (4, 1))
    weighed = with_seconds(facts, *(pair for block in blocks for pair in (block, (0, 0))))
    plan = plan_of(weighed, stages=2, coarse="linear")

    assert [stage.nodes for stage in plan.stages] == [2, 10]
    assert [stage.seconds for stage in plan.stages] == [7, 21]
    assert [stage.backward_seconds for stage in plan.stages] == [6, 10]
    guess = plan.stages[1].preprocess
    assert guess is not None
    assert guess.seconds is not None
    assert plan.forecast.makespan == pytest.approx(11 + 10 + guess.seconds)
    assert plan.forecast.bound == pytest.approx(28 / 21)


def test_measured_seconds_may_be_balanced() -> None:
    slow = linear_chain(6, 256)
    facts = analyze_model(slow, torch.randn(64, 256))
    by_flops = plan_of(facts, stages=3)

    assert by_flops.stages[0].seconds is None
    assert [stage.nodes for stage in by_flops.stages] == [2, 2, 2]


def test_a_stage_heavy_in_parameters_gets_fewer_layers() -> None:
    """Layers of equal FLOPs, of which the later ones have 64 times the parameters."""
    narrow = [nn.Conv2d(8, 8, 1, bias=False) for _ in range(4)]
    wide = [nn.Conv2d(64, 64, 1, bias=False) for _ in range(4)]
    join = [nn.AvgPool2d(8), nn.Conv2d(8, 64, 1, bias=False)]
    captured = capture(nn.Sequential(*narrow, *join, *wide), (torch.randn(2, 8, 64, 64),))
    facts = observe(captured)
    costs = analyze(captured, facts, "flops").costs

    def layers_of_last_stage(optimizer: float) -> int:
        def measure(program: Program, segments: Any, *, backward: bool = False) -> list[Seconds]:
            flops = [sum(costs[node].flops for node in segment) for segment in segments]
            sizes = [sum(costs[node].parameter_bytes for node in segment) for segment in segments]
            return [Seconds(f, 2.0 * f, optimizer * b) for f, b in zip(flops, sizes, strict=True)]

        weighed = analyze(captured, facts, "measured", measure=measure)
        options = {"cost": "measured", "coarse": "zero", "preprocess": "linear"}
        return plan_of(weighed, stages=2, **options).stages[1].nodes

    per_byte = costs[captured.order[-1]].flops / costs[captured.order[-1]].parameter_bytes
    assert layers_of_last_stage(0.0) == 5
    assert layers_of_last_stage(3.0 * per_byte) == 3


# --- next best cuts ------------------------------------------------------------------------------


@settings(max_examples=40)
@given(problem=tight_problems())
def test_each_cut_alone_goes_where_it_costs_least(problem: CutProblem) -> None:
    try:
        cuts = solve(problem, gap=0).cuts
    except DoesNotFit:
        return
    moves = next_best_moves(problem, cuts)

    assert len(moves) == problem.stages - 1
    for number, move in enumerate(moves):
        times = {}
        for place in range(cuts[number - 1] + 1 if number else 0, cuts[number + 1]):
            moved = (*cuts[:number], place, *cuts[number + 1 :])
            begins = (None, *moved)
            if place != cuts[number] and all(
                device.fits(begin, end, last=stage == problem.stages - 1)
                for stage, (device, begin, end) in enumerate(
                    zip(problem.devices, begins, moved, strict=False)
                )
            ):
                times[place] = makespan(problem, moved) + serial(problem, moved)
        if move is None:
            assert not times
        else:
            assert move.time == pytest.approx(min(times.values()), rel=1e-9)
            assert times[move.candidate] == pytest.approx(move.time, rel=1e-9)


# --- the head -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "before"),
    [
        ("resnet", "_7"),  # pooling, flatten, classifier
        ("deep_batchnorm", "_24"),
        ("vision_transformer", "reshape"),
        ("mlp", "_14"),  # the small last layer
        ("deep_linear", "output"),  # nothing is left
    ],
)
def test_the_head_begins_where_the_trunk_ends(name: str, before: str) -> None:
    assert starts(plan_of(analysis(name), stages=2))[-1] == before


def test_the_head_of_a_decoder_is_its_norm_and_its_vocabulary() -> None:
    plan = plan_of(small_decoder(), stages=2)

    assert (plan.head.first_module, plan.head.nodes) == ("norm", 2)


# --- cuts by name ---------------------------------------------------------------------------------


def test_cuts_may_be_named_by_module_or_by_node() -> None:
    facts = analysis("resnet")

    assert starts(plan_of(facts, cuts=("3", "5"))) == ["_3_conv1", "_5_conv1", "_7"]
    assert starts(plan_of(facts, cuts=("_3_conv1",))) == ["_3_conv1", "_7"]
    assert starts(plan_of(facts, cuts=())) == ["_7"]


@pytest.mark.parametrize(
    ("name", "cuts", "message"),
    [
        ("resnet", ("layer9",), r"no node or module is called 'layer9' in Sequential; there"),
        ("resnet", ("5", "3"), r"cuts must be in the order of the graph \('3' comes too late\)"),
        ("resnet", ("3", "3"), r"cuts must be in the order of the graph \('3' comes too late\)"),
        (
            "resnet",
            ("2.relu",),  # in place
            r"cannot be cut in front of '2.relu'; the nearest .* in front of 2\.\w+ \(node _2",
        ),
        ("resnet", ("9",), r"'9' lies in the head"),
        ("mlp", ("0",), r"cannot be cut in front of '0'; the nearest .* in front of 1 \(node _1\)"),
        ("segnet", ("middle",), r"cannot be cut in front of 'middle'; the nearest legal cut"),
    ],
)
def test_a_cut_that_cannot_be_made_is_refused(
    name: str, cuts: tuple[str, ...], message: str
) -> None:
    with pytest.raises(PartitionError, match=message):
        choose_cut(analysis(name), Options(cuts=cuts))


class Branches(nn.Module):
    """Two towers that meet late: the second reads nothing of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.left = linear_chain(3, 8)
        self.right = linear_chain(3, 8)
        self.joint = linear_chain(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.joint(self.left(x) + self.right(x))


class Counts(nn.Module):
    """Makes integers that are too expensive to be side values."""

    def forward(self, x: Tensor) -> Tensor:
        return x.argsort(dim=1).argsort(dim=1)


def test_a_stage_that_is_no_link_of_the_chain_is_refused() -> None:
    facts = analyze_model(Branches(), torch.randn(2, 8))
    with pytest.raises(
        PartitionError, match=r"begins at right\.0 \(node right_0\) would read noth"
    ):
        choose_cut(facts, Options(cuts=("right", "right.2")))
    choose_cut(facts, Options(cuts=("left.1", "joint")))


def test_no_stage_is_put_where_nothing_happens() -> None:
    facts = analysis("unrolled_lstm")  # between its steps it only takes the next input
    with pytest.raises(PartitionError, match=r"UnrolledLSTM has 5 legal cuts"):
        choose_cut(facts, Options(stages=16))
    for stages in (2, 4, 6):
        plan = plan_of(facts, stages=stages)
        assert all(stage.consumes for stage in plan.stages[1:])
        assert all(stage.produces for stage in plan.stages)


# --- too few cuts ---------------------------------------------------------------------------------


def test_too_few_cuts_are_counted_and_named() -> None:
    with pytest.raises(PartitionError) as caught:
        choose_cut(analysis("lstm"), Options(stages=9))

    assert str(caught.value) == (
        "LSTM has 5 legal cuts, but 9 stages need 8: ask for at most 6 stages\n"
        "  legal in front of: lstm1 (node lstm1); node getitem_8; node unsqueeze; node "
        "expand_as; node cat\n"
        "  not legal: 14 where a value that is not a floating-point tensor crosses\n"
        "  widest run without a legal cut: lstm1 to getitem_7 (15 nodes, 95% of the cost)"
    )


def test_a_long_list_of_places_is_shortened() -> None:
    with pytest.raises(PartitionError, match=r"\) and \d+ more\n  not legal: none\n  widest"):
        choose_cut(analysis("mixer"), Options(stages=99))


def test_a_graph_without_any_cut_says_why() -> None:
    facts = analyze_model(Counts(), torch.randn(2, 8))
    with pytest.raises(
        PartitionError, match=r"Counts has no legal cut at all \(2 x a value that is"
    ):
        choose_cut(facts, Options(stages=1))


def test_cells_of_two_states_are_cut_but_not_copied() -> None:
    facts = analyze_model(amoebanet.build_model(3, 16), *amoebanet.example_inputs(size=64))

    plan = plan_of(facts, stages=3, coarse="lowrank", sweep="collapsed")
    assert 2 in {len(face.state) for face in plan.interfaces}
    with pytest.raises(PartitionError, match=r"6 where the state is several tensors, which coarse"):
        plan_of(facts, stages=3, coarse="units")
