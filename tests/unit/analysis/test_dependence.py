"""What depends on which input: a compiled network on no more than its model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import pnn_compile as pnn
from passes.errors import PnnError
from tests.models.builders import LanguageModel, block_chain, block_list
from tests.models.zoo import CASES, by_name
from tests.support.parameters import grid, quick

WIDTH = 8


def _vary(value: Tensor) -> Tensor:
    return value + 0.5 if value.is_floating_point() else value.flip(-1).roll(1, 0)


def dependence(network: nn.Module, kwargs: Mapping[str, Any]) -> set[tuple[int, int]]:
    """Pairs of an output and an input tensor such that changing the input moves the output."""
    network.eval()
    leaves, spec = pytree.tree_flatten(dict(kwargs))

    def outputs(values: list[Tensor]) -> list[Tensor]:
        values = [value.clone() for value in values]
        with torch.no_grad():
            return pytree.tree_leaves(network(**pytree.tree_unflatten(values, spec)))

    before = outputs(leaves)
    pairs = set()
    for number, leaf in enumerate(leaves):
        after = outputs([*leaves[:number], _vary(leaf), *leaves[number + 1 :]])
        pairs |= {
            (output, number)
            for output, (a, b) in enumerate(zip(before, after, strict=True))
            if (a - b).abs().max() > 1e-6
        }
    return pairs


class Target(nn.Module):
    """Predicts from the source alone, and compares with a target."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, 16)
        self.body = block_chain(6, 16)
        self.head = nn.Linear(16, WIDTH)

    def forward(self, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        out = self.head(self.body(self.stem(source)))
        return out, (out - target).square().mean()


class Towers(nn.Module):
    """Two towers that never meet, layer by layer: every state has a part of each."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.ModuleList(block_list(6, 16))
        self.right = nn.ModuleList(block_list(6, 16))
        self.enter = nn.Linear(WIDTH, 16)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.enter(x), self.enter(y)
        for left, right in zip(self.left, self.right, strict=True):
            a, b = left(a), right(b)
        return a, b


class LateTarget(Towers):
    """The right tower reads the left one: it depends on both inputs, the left one on its own."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.enter(x), self.enter(y)
        for left, right in zip(self.left, self.right, strict=True):
            a = left(a)
            b = right(a * b)
        return a, b


class Nested(Towers):
    """The same as two towers, with both inputs in one argument."""

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(batch["x"], batch["y"])


class WrittenState(Towers):
    """The second input reaches the right tower through memory that is written in place."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.enter(x), self.enter(x) * 1
        b[:, :WIDTH].add_(y)
        for left, right in zip(self.left, self.right, strict=True):
            a, b = left(a), right(b)
        return a, b


class Labels(LanguageModel):
    """A language model that embeds its labels too, token ids as its input is."""

    def __init__(self) -> None:
        super().__init__(block_chain(6, 16), 16)

    def forward(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits, loss = super().forward(ids, labels)
        return logits, loss + self.embedding(labels).mean()


class Sized(Target):
    """Takes the sizes of its target, and nothing else of it, before the last layer."""

    def forward(self, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        start = torch.zeros_like(target) + source.reshape(target.shape[0], -1)
        return super().forward(start, target)


class Table(nn.Module):
    """Takes samples and their labels in one tensor."""

    def __init__(self, take: Any) -> None:
        super().__init__()
        self.take, self.target = take, Target()

    def forward(self, table: Tensor) -> tuple[Tensor, Tensor]:
        return self.target(*self.take(table))


def _floats(*names: str) -> dict[str, Tensor]:
    return {name: torch.randn(4, WIDTH) for name in names}


def _ids(*names: str) -> dict[str, Tensor]:
    return {name: torch.randint(0, 20, (4, 6)) for name in names}


MODELS: tuple[tuple[type[nn.Module], Any], ...] = (
    (Target, lambda: _floats("source", "target")),
    (Towers, lambda: _floats("x", "y")),
    (LateTarget, lambda: _floats("x", "y")),
    (Nested, lambda: {"batch": _floats("x", "y")}),
    (WrittenState, lambda: _floats("x", "y")),
    (Labels, lambda: _ids("ids", "labels")),
    (Sized, lambda: _floats("source", "target")),
)
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"stages": 2, "coarse": "units"},
    {"correction": "difference", "coarse": "lowrank+linear+conv"},
    {"sweep": "collapsed", "coarse": "linear"},
    {"preprocess": "lowrank+linear", "prologue": 0.3},
    {"iterations": 2},
)


@pytest.mark.parametrize(("build", "inputs", "options"), grid(MODELS, OPTIONS))
def test_an_output_depends_on_the_inputs_of_the_original(
    build: type[nn.Module], inputs: Any, options: dict[str, Any]
) -> None:
    model, kwargs = build(), inputs()
    try:
        compiled = pnn.compile(
            model, kwargs=kwargs, **{"stages": 3, "coarse_budget": 1.0, **options}
        )
    except PnnError:
        assert options.get("coarse") == "units"  # a state of several parts has no block to copy
        return
    assert dependence(compiled.module, kwargs) == dependence(model, kwargs)


@pytest.mark.parametrize("build", [Target, Towers, LateTarget])
def test_a_fitted_network_depends_on_no_more_inputs(build: type[nn.Module]) -> None:
    model = build()
    names = ("source", "target") if build is Target else ("x", "y")
    batches = [_floats(*names) for _ in range(6)]
    compiled = pnn.compile(model, kwargs=batches[0], stages=3, calibration=batches)
    assert dependence(compiled.module, batches[0]) <= dependence(model, batches[0])
    assert compiled.calibration is not None
    errors = [face.guess_after for face in compiled.calibration.interfaces]
    assert max(errors) < 1.0


def test_a_missing_target_does_not_reach_the_prediction() -> None:
    model, kwargs = Target(), _floats("source", "target")
    network = pnn.compile(model, kwargs=kwargs, stages=3).module.eval()
    predicted, _ = network(kwargs["source"], torch.full((4, WIDTH), torch.nan))
    assert torch.equal(predicted, network(**kwargs)[0])


@pytest.mark.parametrize(
    "take",
    [
        lambda table: (table[:, :WIDTH], table[:, WIDTH:]),
        lambda table: table.split(WIDTH, dim=1),
        lambda table: table.unflatten(1, (2, WIDTH)).unbind(1),
        lambda table: table.chunk(2, dim=-1),
    ],
)
def test_labels_in_a_part_of_an_input_do_not_reach_the_prediction(
    take: Any, tmp_path: Path
) -> None:
    table = torch.randn(4, 2 * WIDTH)
    compiled = pnn.compile(Table(take), table, stages=3)
    other = torch.cat([table[:, :WIDTH], torch.randn(4, WIDTH)], 1)
    for network in (compiled.module, pnn.load(compiled.save(tmp_path / "out")).module):
        network.eval()
        assert torch.equal(network(other)[0], network(table)[0])
        assert not torch.equal(network(other)[1], network(table)[1])


def test_a_guess_takes_no_argument_that_its_state_does_not_depend_on() -> None:
    plan = pnn.compile(Target(), kwargs=_floats("source", "target"), stages=3).plan
    for stage in plan.stages[1:]:
        assert stage.preprocess is not None
        assert stage.preprocess.options.inputs == ("source",)


COMPILED = (
    case.name for case in CASES if not {"uncapturable", "fx-opaque", "custom-gradient"} & case.tags
)


@pytest.mark.parametrize("name", quick(COMPILED))
def test_the_zoo_depends_on_the_inputs_of_the_original(name: str) -> None:
    case = by_name(name)
    model = case.build()
    compiled = pnn.compile(model, args=case.args(3), kwargs=case.kwargs(3), stages=2)
    kwargs = dict(zip(compiled.program.args, case.args(3), strict=False)) | case.kwargs(3)
    assert dependence(compiled.module, kwargs) == dependence(model, kwargs)
