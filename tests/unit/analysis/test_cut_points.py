from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from passes.analysis.analysis import Analysis
from passes.analysis.cut_points import Position, requirements
from passes.ir.program import extract
from tests.models.builders import ResidualMLP
from tests.support.parameters import quick
from tests.support.parity import assert_same_step, step
from tests.support.programs import analysis, analyze_model, program

WIDTH = 32
FLOAT = "a value that is not a floating-point tensor crosses"
BATCH = "a tensor without a batch axis crosses"
MEMORY = "memory written on one side is used on the other"
NOTHING = "nothing crosses"


class Net(nn.Module):
    """Three wide layers, for forwards that differ."""

    buffer: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.norm = nn.BatchNorm1d(WIDTH)
        self.register_buffer("buffer", torch.zeros(WIDTH))


class Chain(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(self.a(x))))


class Residual(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.c(x + self.b(torch.tanh(x)))


class UNet(Net):
    def forward(self, x: Tensor) -> Tensor:
        outer = self.a(x)
        inner = self.b(outer[:, ::2].repeat(1, 2))
        middle = torch.tanh(inner)
        return self.c(outer * (inner + middle))


class Mask(Net):
    def forward(self, x: Tensor) -> Tensor:
        mask = x[:, :1] > 0
        gate = mask.float()
        return self.c(self.b(self.a(x) * gate) * gate)


class Choice(Net):
    """Picks features by an index that is computed from activations."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        index = x.argmax(dim=1)
        x = self.b(x)
        return self.c(x * F.one_hot(index, WIDTH))


class InPlace(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(F.relu(self.a(x), inplace=True)), inplace=True))


class ViewWrite(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        first = x[:, 0]
        y = self.b(x)
        first.add_(1.0)
        return self.c(x + y)


class InputWrite(Net):
    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2.0)
        return self.c(self.b(self.a(x)) + x)


class BufferUpdate(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        self.buffer.add_(1.0)
        x = self.b(x)
        return self.c(x) + self.buffer


class SharedNorm(Net):
    """Two calls of one BatchNorm: both write its statistics."""

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.norm(self.b(self.norm(self.a(x)))))


class DropoutWrite(Net):
    """Writes to the result of dropout: a new tensor in training mode, else its argument."""

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(F.dropout(self.a(x), 0.5, self.training).add_(1.0)))


class FlattenWrite(Net):
    """Writes to the result of flatten: a copy for these strides, a view for others."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).view(-1, 4, WIDTH // 4)
        y = x.transpose(1, 2).flatten(1)
        first = y[:, 0]
        first.add_(1.0)
        return self.c(y)


class BatchMean(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        mean = x.mean(dim=0)
        return self.c(self.b(x) - mean)


class EarlyOutput(Net):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        early = self.a(x)
        return early, self.c(self.b(early))


@pytest.mark.parametrize(
    ("model", "legal", "refused"),
    [
        (Chain(), {1: "a", 2: "b", 3: "tanh", 4: "c"}, {}),
        (Residual(), {1: "a", 2: "a tanh", 3: "a b", 4: "add", 5: "c"}, {}),
        (
            UNet(),
            {1: "a", 2: "a getitem", 3: "a repeat", 4: "a b", 5: "a b tanh", 6: "a add", 7: "mul",
             8: "c"},
            {},
        ),
        (Mask(), {4: "a", 5: "mul", 6: "b", 7: "mul_1", 8: "c"}, {NOTHING: 3}),
        (Choice(), {1: "a", 5: "mul", 6: "c"}, {FLOAT: 3}),
        (InPlace(), {2: "relu", 4: "relu_1", 5: "c"}, {MEMORY: 2}),
        (ViewWrite(), {4: "a b", 5: "add", 6: "c"}, {MEMORY: 3}),
        (InputWrite(), {2: "clone", 3: "clone a", 4: "clone b", 5: "add", 6: "c"}, {MEMORY: 1}),
        (BufferUpdate(), {1: "a", 5: "add"}, {MEMORY: 3}),
        (SharedNorm(), {1: "a", 4: "norm_1", 5: "c"}, {MEMORY: 2}),
        (DropoutWrite(), {3: "add_", 4: "b", 5: "c"}, {MEMORY: 2}),
        (FlattenWrite(), {6: "flatten", 7: "c"}, {MEMORY: 5}),
        (BatchMean(), {1: "a", 4: "sub", 5: "c"}, {BATCH: 2}),
        (EarlyOutput(), {1: "a", 2: "a b", 3: "a c"}, {}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)  # fmt: skip
def test_the_legal_cuts_and_their_states(
    model: nn.Module, legal: dict[int, str], refused: dict[str, int]
) -> None:
    frontiers = analyze_model(model, torch.randn(4, WIDTH)).frontiers
    states = {p.index: " ".join(node.name for node in p.state) for p in frontiers.positions}

    assert states == legal
    assert frontiers.refused == refused
    for position in frontiers.positions:
        assert [spec.shape[0] for spec in position.specs] == [4] * len(position.state)


def test_side_values_are_recomputed_where_they_are_read() -> None:
    result = analyze_model(Mask(), torch.randn(4, WIDTH))
    order = result.frontiers.order
    recomputable = {
        n.name: [m.name for m in subgraph] for n, subgraph in result.frontiers.recomputable.items()
    }

    assert recomputable == {
        "getitem": ["getitem"],
        "gt": ["getitem", "gt"],
        "float_1": ["getitem", "gt", "float_1"],
    }
    assert requirements(result.program, order[:5], result.frontiers.recomputable) == (("x",), ())
    later = requirements(result.program, order[5:], result.frontiers.recomputable)
    assert later == (("x",), ("getitem", "gt", "float_1"))
    assert requirements(result.program, order[7:], result.frontiers.recomputable) == ((), ())


def test_what_is_dear_or_impure_is_no_side_value() -> None:
    class Expensive(Net):
        def forward(self, x: Tensor) -> Tensor:
            noise = F.dropout(x[:, :1], 0.5, self.training)
            return self.c(self.b(self.a(x) * noise))

    result = analyze_model(Expensive(), torch.randn(4, WIDTH))

    assert [node.name for node in result.frontiers.recomputable] == ["getitem"]
    assert "a" not in [node.name for node in result.frontiers.recomputable]


def test_statistics_are_updated_once_though_what_they_are_of_is_cheap() -> None:
    class Early(Net):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(1)

        def forward(self, x: Tensor) -> Tensor:
            factor = self.norm(x[:, :1])
            return self.c(self.b(self.a(x) * factor) * factor)

    result = analyze_model(Early().train(), torch.randn(4, WIDTH))

    assert [node.name for node in result.frontiers.recomputable] == ["getitem"]


# --- the oracle -----------------------------------------------------------------------------------


def halves(result: Analysis, position: Position) -> Callable[..., Any]:
    """Return a function that runs the program in two pieces, cut at a position."""
    captured, order, recomputable = (
        result.program,
        result.frontiers.order,
        result.frontiers.recomputable,
    )
    first, last = order[: position.index], order[position.index :]
    names = [node.name for node in position.state]
    inputs, sides = requirements(captured, first, recomputable)
    later_inputs, later_sides = requirements(captured, [*last, captured.output], recomputable)
    before = extract(captured, first, [], names, inputs=inputs, sides=sides, name="Before")
    after = extract(
        captured, last, names, None, inputs=later_inputs, sides=later_sides, name="After"
    )
    targets = {node.name: str(node.target) for node in captured.inputs}

    def forward(**inputs_by_name: Any) -> Any:
        state = before(*(inputs_by_name[targets[name]] for name in inputs))
        state = state if len(names) > 1 else (state,)
        versions = [tensor._version for tensor in state]
        result = after(*state, *(inputs_by_name[targets[name]] for name in later_inputs))
        # A parareal network reads the state of an interface again, to correct it.
        assert [tensor._version for tensor in state] == versions, "the state was written"
        return result

    return forward


@pytest.mark.parametrize("name", quick())
def test_cutting_anywhere_legal_reproduces_the_model(name: str) -> None:
    captured, result = program(name), analysis(name)
    args = dict(captured.args)
    expected = step(captured.module, (), args, train=True)

    assert result.frontiers.positions
    for position in result.frontiers.positions:
        forward = halves(result, position)
        actual = step(captured.module, (), args, train=True, forward=forward)
        assert_same_step(actual, expected)


def test_the_oracle_sees_an_illegal_cut() -> None:
    result = analyze_model(InPlace(), torch.randn(4, WIDTH))
    (node,) = (n for n in result.frontiers.order if n.name == "a")
    forward = halves(result, Position(1, (node,), (), boundary=True))

    with pytest.raises(AssertionError, match="the state was written"):
        forward(**result.program.args)


# --- boundaries, blocks and sources ---------------------------------------------------------------


def boundaries(result: Analysis) -> set[str]:
    return {
        result.frontiers.order[p.index].name
        for p in result.frontiers.positions
        if p.boundary and p.index < len(result.frontiers.order)
    }


class Trunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResidualMLP(8, 8, nn.Tanh) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_a_boundary_leaves_no_repeated_block_open() -> None:
    result = analyze_model(Trunk(), torch.randn(4, 8))

    assert boundaries(result) == {"blocks_1_mlp_0", "blocks_2_mlp_0"}


def _flat(*layers: nn.Module) -> set[str]:
    """The layers of a flat sequence, by number, at which a block begins."""
    return boundaries(analyze_model(nn.Sequential(*layers), torch.randn(2, 4, 8)))


def test_a_convolution_keeps_its_normalization_activation_and_dropout() -> None:
    def layers() -> list[nn.Module]:
        return [nn.Conv1d(4, 4, 3, padding=1), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.1)]

    assert _flat(*layers(), *layers()) == {"_4"}
    # A pooling is a block of its own, and so is a normalization that follows it.
    assert _flat(*layers(), nn.MaxPool1d(2), nn.BatchNorm1d(4), *layers()) == {"_4", "_5", "_6"}
    # Without a layer in front of it, an activation completes nothing.
    assert _flat(nn.Tanh(), nn.Sigmoid(), nn.Tanh()) == {"_1", "_2"}


class PreNorm(nn.Module):
    """Two residual branches written as functions: x + W relu(norm(x))."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ParameterList(torch.ones(8) for _ in range(2))
        self.weights = nn.ParameterList(torch.eye(8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for norm, weight in zip(self.norms, self.weights, strict=True):
            x = x + F.linear(F.relu(F.layer_norm(x, (8,), norm)), weight)
        return x


def test_a_normalization_of_a_sum_begins_a_block_in_functions_too() -> None:
    result = analyze_model(PreNorm(), torch.randn(4, 8))
    single = {
        result.frontiers.order[p.index].name
        for p in result.frontiers.positions[:-1]
        if p.boundary and len(p.state) == 1
    }
    # The first x is an input, which crosses no cut: a branch of it passes as one tensor.
    assert single == {"relu", "linear", "add", "layer_norm_1"}


def test_a_numbered_block_begins_with_its_normalization() -> None:
    blocks = [
        nn.Sequential(nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 4, 1, bias=False))
        for _ in range(3)
    ]
    assert _flat(*blocks) == {"_1_0", "_2_0"}


def test_a_container_in_a_sequence_does_not_hide_its_blocks() -> None:
    model = nn.Sequential(nn.Linear(8, 8), Trunk(), nn.Linear(8, 8))
    result = analyze_model(model, torch.randn(4, 8))
    starts = {f"_1_blocks_{index}_mlp_0" for index in range(3)}

    assert boundaries(result) == {*starts, "_2"}
    assert [len(b.start.state) for b in result.blocks] == [1] * len(result.blocks)
    signatures = [block.signature for block in result.blocks]
    assert len(signatures) == 4  # three blocks and the last layer
    assert signatures[0] == signatures[1] == signatures[2] != signatures[3]


def test_equal_blocks_have_equal_signatures_whatever_their_names() -> None:
    result = analysis("resnet")
    kinds: dict[str, list[str]] = {}
    for block in result.blocks:
        first = result.frontiers.order[block.start.index].name
        kinds.setdefault(block.signature, []).append(first)

    assert ["_1_conv1", "_2_conv1"] in kinds.values()  # eight channels
    assert ["_3_conv1"] in kinds.values()  # down-sampling
    assert ["_4_conv1", "_5_conv1", "_6_conv1"] in kinds.values()  # sixteen channels
    trunk = [result.frontiers.order[block.start.index].name for block in result.trunk_blocks]
    assert trunk == ["_1_conv1", "_2_conv1", "_4_conv1", "_5_conv1", "_6_conv1"]


@pytest.mark.parametrize(
    ("name", "sources"),
    [
        ("mlp", ["input_1"]),
        ("many_inputs_outputs", ["x", "y", "late"]),
        ("keyword_arguments", ["x", "context", "gain"]),
        ("tied_language_model", ["add"]),  # tokens and positions together
        ("float_mask_encoder", ["embedding"]),
        ("encoder_decoder", ["source_embedding", "target_embedding"]),
    ],
)
def test_guesses_are_made_from_floats_or_the_first_learned_value(
    name: str, sources: list[str]
) -> None:
    assert [source.node.name for source in analysis(name).sources] == sources


def test_a_nested_input_gives_its_tensors() -> None:
    class Nested(Net):
        def forward(self, batch: dict[str, Any]) -> Tensor:
            return self.c(self.b(self.a(batch["x"]) + batch["more"][0]))

    x = torch.randn(4, WIDTH)
    result = analyze_model(Nested(), {"x": x, "more": [x], "ids": torch.zeros(4, dtype=torch.long)})

    names = [source.node.name for source in result.sources]
    assert names == ["getitem", "getitem_2"]


def test_without_a_learned_value_of_its_own_the_first_values_are_the_source() -> None:
    class Expensive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Linear(4, WIDTH)
            self.b, self.c = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, ids: Tensor) -> Tensor:
            return self.c(self.b(self.table(F.one_hot(ids, 4).float())))

    (source,) = analyze_model(Expensive(), torch.tensor([0, 1, 3])).sources
    assert source.node.name == "float_1"


class PositionBias(nn.Module):
    """Adds a learned table of positions, masked where the tokens are padded, to every block."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 8)
        self.embedding = nn.Embedding(20, 8)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))
        self.register_buffer("positions", torch.arange(7))

    def forward(self, ids: Tensor) -> Tensor:
        padded = torch.finfo(torch.float32).min * (ids == 0)
        bias = self.table(self.positions) + padded.unsqueeze(-1)
        h = self.embedding(ids)
        for block in self.blocks:
            h = torch.tanh(block(h)) + bias.clamp(min=-1)
        return h


def test_a_masked_table_of_positions_is_no_source_of_guesses() -> None:
    result = analyze_model(PositionBias(), torch.randint(1, 20, (2, 7)))
    assert [source.node.name for source in result.sources] == ["embedding"]


# --- blocks ---------------------------------------------------------------------------------------


class Sampler(nn.Module):
    """Applies one step at several times, which are an input."""

    def __init__(self, by_index: bool) -> None:
        super().__init__()
        self.stem, self.out = nn.Linear(16, 16), nn.Linear(16, 4)
        self.first, self.last = nn.Linear(17, 32), nn.Linear(32, 16)
        self.by_index = by_index

    def step(self, x: Tensor, time: Tensor) -> Tensor:
        h = torch.cat([x, time.expand(x.shape[0], 1)], 1)
        return x + self.last(torch.tanh(self.first(h)))

    def forward(self, x: Tensor, times: Tensor) -> Tensor:
        x = self.stem(x)
        for time in (times[i] for i in range(4)) if self.by_index else times:
            x = self.step(x, time)
        return self.out(x)


@pytest.mark.parametrize("by_index", [False, True])
def test_what_does_no_work_is_no_block(by_index: bool) -> None:
    facts = analyze_model(Sampler(by_index), torch.randn(3, 16), torch.linspace(0, 1, 4))

    steps = facts.trunk_blocks
    assert len(steps) == 4
    assert len({block.signature for block in steps}) == 1
    assert all(facts.block_flops(block) for block in facts.blocks)
    assert [block.leaving.shape for block in steps] == [(3, 16)] * 4
