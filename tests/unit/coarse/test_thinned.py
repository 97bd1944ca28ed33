"""Family `thinned`, and the statistics of a copied network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pnn_compile as pnn
from examples import decoder, resnet110
from passes.coarse.copied_blocks import Units
from passes.coarse.spec import CoarseSpec, Site
from passes.coarse.thinned_blocks import ThinnedOptions, build_thinned, recalibrate, thin
from passes.errors import ArtifactError, OptionError, SynthesisError
from passes.plan.schema import Plan
from passes.plan.validate import check_plan
from pnn_compile.cli import main
from tests.support.parameters import grid
from tests.support.programs import compiled, copies, program

UNITS = 4
"""Residual units per group of the network below."""


def trained_model() -> resnet110.PreActivationResNet:
    """A small ResNet whose statistics are not those of initialization, the same each time."""
    torch.manual_seed(0)
    model = resnet110.build_model(UNITS, 4)
    for _ in range(3):
        model(torch.randn(8, 3, 16, 16))
    return model.eval()


@copies
def trained(**options: Any) -> pnn.Compiled:
    """The same, compiled in two stages unless the options say otherwise."""
    options = {"cuts": ("trunk.2",), "coarse": "thinned"} | options
    return pnn.compile(trained_model(), torch.randn(2, 3, 16, 16), **options)


def coarse_of(network: pnn.Compiled, stage: int = 1) -> tuple[Units, CoarseSpec]:
    spec, module = network.plan.stages[stage].coarse, network.operators.coarse[stage]
    assert spec is not None
    module = getattr(module, "coarse", module)  # of a difference
    assert isinstance(module, Units)
    return module, spec


def options_of(spec: CoarseSpec) -> ThinnedOptions:
    assert isinstance(spec.options, ThinnedOptions)
    return spec.options


# --- which blocks ---------------------------------------------------------------------------------


def kept(letters: str, count: int, changing: str = "") -> list[tuple[str, int]]:
    """Thin a stage given by one letter a block; those of `changing` change the shape."""
    blocks = [_Named(i, letter, letter in changing) for i, letter in enumerate(letters)]
    steps = thin(blocks, 0, len(letters), count)  # type: ignore[arg-type]
    return [("".join(f"{b.signature}{b.start.index}" for b in group), n) for group, n in steps]


class _StubPosition:
    def __init__(self, index: int) -> None:
        self.index = index


class _Named:
    """What `thin` reads of a block."""

    def __init__(self, index: int, signature: str, changes: bool) -> None:
        self.start, self.stop = _StubPosition(index), _StubPosition(index + 1)
        self.signature = signature
        self.entering, self.leaving = "small", "large" if changes else "small"


@pytest.mark.parametrize(
    ("letters", "changing", "count", "expected"),
    [
        ("AAAAA", "", 1, [("A2", 5)]),  # the middle one stands for all
        ("AAAAA", "", 2, [("A0", 2), ("A3", 3)]),
        ("AAAAAA", "", 3, [("A0", 2), ("A2", 2), ("A4", 2)]),
        ("AAA", "", 3, [("A0", 1), ("A1", 1), ("A2", 1)]),
        ("AAA", "", 9, [("A0", 1), ("A1", 1), ("A2", 1)]),  # no more than there are
        ("AAADBBB", "D", 1, [("A1", 3), ("D3", 1), ("B5", 3)]),  # each run keeps one
        ("AAAAADBBB", "D", 3, [("A0", 2), ("A3", 3), ("D5", 1), ("B7", 3)]),
        ("ADADAD", "D", 1, [(f"{'AD'[i % 2]}{i}", 1) for i in range(6)]),  # nothing to thin
        ("AADAA", "", 1, [("A0", 2), ("D2", 1), ("A3", 2)]),  # D repeats nowhere
        ("ABABABAB", "", 1, [("A2B3", 4)]),  # alternating blocks are thinned in pairs
        ("ABABAB", "", 2, [("A0B1", 1), ("A2B3", 2)]),
        ("AABB", "", 1, [("A0", 2), ("B2", 2)]),
        ("AXAXBBB", "", 2, [("A0X1", 2), ("B5", 3)]),
        ("XAAAAX", "", 2, [("X0", 1), ("A1", 2), ("A3", 2), ("X5", 1)]),  # X counts for nothing
        ("DD", "D", 1, [("D0", 1), ("D1", 1)]),
        ("", "", 1, []),
    ],
)
def test_the_middle_of_every_run_is_kept_and_the_steps_add_up(
    letters: str, changing: str, count: int, expected: list[tuple[str, int]]
) -> None:
    actual = kept(letters, count, changing)

    assert actual == expected
    # Every group of letters with its digits is one block; steps count all blocks of the stage.
    assert sum(len(name) // 2 * step for name, step in actual) == len(letters)


def test_a_stage_that_is_not_made_of_whole_blocks_has_none() -> None:
    blocks = [_Named(i, "A", False) for i in range(1, 4)]

    assert thin(blocks, 0, 4, 1) == []  # type: ignore[arg-type]


# --- the network ----------------------------------------------------------------------------------


def test_a_kept_block_takes_the_step_of_all_it_stands_for() -> None:
    network = trained()
    module, spec = coarse_of(network)
    # Stage 1 is units 2, 3 of the first group, and four of each other: the first one widens.
    assert [block.step for block in options_of(spec).blocks] == [2, 1, 3, 1, 3]
    assert module.steps == (2, 1, 3, 1, 3)
    trunk = trained_model().trunk
    x = torch.randn(3, 4, 16, 16)
    expected = x
    with torch.no_grad():
        for number, step in ((2, 2), (4, 1), (6, 3), (8, 1), (10, 3)):
            y = trunk[number](expected)
            expected = y if step == 1 else expected + step * (y - expected)
        torch.testing.assert_close(module.eval()(x), expected)


@pytest.mark.parametrize("kind", ["resnet", "decoder", "alternating"])
def test_with_every_block_kept_the_difference_form_is_the_original(kind: str) -> None:
    torch.manual_seed(0)
    model: nn.Module
    if kind == "resnet":
        model, x = resnet110.build_model(3, 4), torch.randn(4, 3, 16, 16)
        cuts = ("trunk.2", "trunk.6")
    elif kind == "decoder":
        model = decoder.build_model(layers=6, width=16, heads=2, context=8)
        (x,) = decoder.example_inputs(batch=2)[:1]
        x = x[:, :8] % 16
        cuts = ("blocks.2", "blocks.4")
    else:
        model, x, cuts = Alternating(), torch.randn(4, 6), ("blocks.2", "blocks.4")
    model.eval()
    network = pnn.compile(model, x, cuts=cuts, coarse="thinned", units=99, correction="difference")
    assert all(set(coarse_of(network, n)[0].steps) == {1} for n in (1, 2))
    torch.testing.assert_close(network.module.eval()(x), model(x), rtol=1e-4, atol=1e-5)


class Alternating(nn.Module):
    """Residual blocks of two kinds by turns, as windows that shift every other time."""

    def __init__(self, spread: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            _Branch(nn.Tanh() if i % 2 else nn.Sigmoid()) for i in range(12)
        )
        with torch.no_grad():
            for block in self.blocks:  # from all their own to all the same
                for parameter, first in zip(
                    block.parameters(), self.blocks[0].parameters(), strict=True
                ):
                    parameter.lerp_(first, 1 - spread)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class _Branch(nn.Module):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * self.activation(self.linear(x))


def test_blocks_of_two_kinds_by_turns_are_thinned_in_pairs() -> None:
    model = Alternating().eval()
    x = torch.randn(4, 6)
    network = pnn.compile(model, x, cuts=("blocks.4",), coarse="thinned")
    module, _ = coarse_of(network)
    assert module.steps == (4,)
    with torch.no_grad():
        expected = x + 4 * (model.blocks[7](model.blocks[6](x)) - x)
        torch.testing.assert_close(module(x), expected)


def test_larger_steps_approximate_the_trunk_of_small_ones() -> None:
    """The point of the family: without training the answer is near the fine stage's."""
    model = Alternating(spread=0.1).eval()
    x = torch.randn(16, 6)
    errors = []
    for units in (1, 2, 4):
        network = pnn.compile(model, x, cuts=("blocks.4",), coarse="thinned", units=units)
        with torch.no_grad():
            fine = network.stages.fine[1](x)
            errors.append(((coarse_of(network)[0](x) - fine).norm() / (fine - x).norm()).item())
    assert errors[0] < 0.3
    assert errors[2] < 1e-5 < errors[1] < errors[0]


def test_weights_and_statistics_are_copied_and_trainable_and_the_model_is_not_touched() -> None:
    network = trained(units=2)
    module, spec = coarse_of(network)
    originals = dict(network.program.module.state_dict())
    before = {key: value.clone() for key, value in originals.items()}
    moved = 0
    for key, value in module.state_dict().items():
        name = key.split(".", 2)[2]
        assert torch.equal(value, originals[name]), key
        assert value.data_ptr() != originals[name].data_ptr()
        moved += "running_mean" in name and bool(value.abs().sum() > 0)
    assert moved >= 4
    assert spec.parameters == sum(p.numel() for p in module.parameters())
    assert not spec.linear
    assert all(p.requires_grad for p in module.parameters())
    module.train()(torch.randn(3, 4, 16, 16)).sum().backward()
    with torch.no_grad():
        for parameter in module.parameters():
            assert parameter.grad is not None
            parameter.add_(1.0)
    after = network.program.module.state_dict()
    assert all(torch.equal(value, before[key]) for key, value in after.items())


def test_a_kept_block_is_given_the_inputs_that_it_reads() -> None:
    plan = compiled("float_mask_encoder", coarse="thinned", cuts=("blocks.2",)).plan
    assert plan is not None
    spec = plan.stages[1].coarse
    assert spec is not None
    module = build_thinned(options_of(spec), Site(program("float_mask_encoder"), [], [])).eval()
    ids, x = torch.randint(1, 9, (3, 10)), torch.randn(3, 10, 16)
    masked = ids.clone()
    masked[:, 5:] = 0

    assert spec.options.inputs == ("tokens",)
    assert not torch.allclose(module(x, ids), module(x, masked))


# --- around it ------------------------------------------------------------------------------------


def test_a_state_of_several_components_is_refused() -> None:
    with pytest.raises(SynthesisError, match=r"'thinned' does not fit .* several components"):
        compiled(coarse="thinned", name="dict_output", stages=2)


def test_it_stands_alone_in_either_sweep() -> None:
    with pytest.raises(OptionError, match="coarse can only sum different ones of: linear"):
        trained(coarse="thinned+linear")
    assert trained(sweep="collapsed").verify().ok


@pytest.mark.parametrize(("correction", "stages"), grid(("residual", "difference"), (3, 4)))
def test_it_verifies_and_is_loaded_as_it_was_saved(
    correction: Any, stages: int, tmp_path: Path
) -> None:
    network = trained(cuts=None, stages=stages, correction=correction)
    assert {s.coarse.family for s in network.plan.stages[1:] if s.coarse} == {"thinned"}
    assert "thinned" in network.report()
    network.verify(strict=True)
    with torch.no_grad():
        for parameter in coarse_of(network)[0].parameters():
            parameter.mul_(1.5)  # as after training
    network.save(tmp_path / "it")
    again = pnn.load(tmp_path / "it")
    x = torch.randn(5, 3, 16, 16)
    assert again.plan == network.plan
    assert torch.equal(again.module.eval()(x), network.module.eval()(x))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("step", 0, r"blocks\[0\]\.step is 0: it should be a whole number of at least 1"),
        ("step", 1.5, r"blocks\[0\]\.step should be int, found float"),
        ("step", None, r"blocks\[0\]\.step should be int, found NoneType"),
        ("last", "nowhere", r"blocks\[0\]\.last is 'nowhere'; possible here"),
    ],
)
def test_its_plan_is_checked_before_it_is_replayed(field: str, value: Any, message: str) -> None:
    network = trained()
    data = json.loads(network.plan.to_json())
    blocks = data["stages"][1]["coarse"]["options"]["blocks"]
    blocks[0][field] = value
    with pytest.raises(ArtifactError, match=message):
        check_plan(network.program, Plan.from_json(json.dumps(data)))
    del blocks[0]["step"]
    with pytest.raises(ArtifactError, match=r"blocks\[0\]\.step is missing"):
        check_plan(network.program, Plan.from_json(json.dumps(data)))
    blocks.clear()
    with pytest.raises(
        ArtifactError, match=r"coarse\.options\.blocks is empty: it needs at least one item"
    ):
        check_plan(network.program, Plan.from_json(json.dumps(data)))


def test_the_command_line_takes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.py").write_text(
        "from examples import resnet110\n"
        "build_model = lambda: resnet110.build_model(units_per_group=3, width=4)\n"
        "example_inputs = lambda: resnet110.example_inputs(size=16)\n"
    )
    arguments = [str(tmp_path / "model.py"), "-n", "3", "--coarse", "thinned", "--units", "1"]
    assert main([*arguments, "--correction", "difference"]) == 0
    assert "thinned" in capsys.readouterr().out


# --- statistics -----------------------------------------------------------------------------------


class Normed(nn.Module):
    """Two layers of statistics one after another, noise between, and one without statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm1d(4, momentum=0.3)
        self.noise = nn.Dropout(0.5)
        self.linear = nn.Linear(4, 4)
        self.second = nn.BatchNorm1d(4)
        self.bare = nn.BatchNorm1d(4, track_running_stats=False)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        x = self.second(self.linear(self.noise(self.first(x * scale))))
        return self.bare(x)


def test_statistics_become_the_average_of_the_calls() -> None:
    torch.manual_seed(0)
    network = Normed().train()
    network.noise.eval()
    calls = [(torch.randn(16, 4) * (1 + i) + i, torch.tensor(2.0)) for i in range(4)]
    weights = [p.detach().clone() for p in network.parameters()]
    state = torch.get_rng_state()

    assert recalibrate(network, iter(calls)) == 2

    inputs = torch.stack([x * scale for x, scale in calls])
    first = network.first
    torch.testing.assert_close(first.running_mean, inputs.mean(1).mean(0))
    torch.testing.assert_close(first.running_var, inputs.var(1).mean(0))
    with torch.no_grad():
        normed = [nn.functional.batch_norm(x, None, None, training=True) for x in inputs]
        outputs = torch.stack([network.linear(x) for x in normed])
    torch.testing.assert_close(network.second.running_var, outputs.var(1).mean(0))
    assert (first.momentum, network.second.momentum) == (0.3, 0.1)
    assert first.training
    assert network.training
    assert not network.noise.training
    assert all(map(torch.equal, weights, network.parameters()))
    assert all(p.grad is None for p in network.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_without_calls_or_layers_nothing_changes() -> None:
    network = Normed()
    before = {key: value.clone() for key, value in network.state_dict().items()}

    assert recalibrate(network, []) == 0
    assert recalibrate(nn.Linear(2, 2), [(torch.ones(1, 2),)]) == 0
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_modes_come_back_after_an_error() -> None:
    network = Normed().eval()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        recalibrate(network, [(torch.ones(1, 4), torch.ones(()))])

    assert not network.first.training
    assert network.first.momentum == 0.3


def test_it_mends_a_thinned_network_with_batchnorm() -> None:
    network = trained()
    module, _ = coarse_of(network)
    module.eval()
    x = 3 * torch.randn(64, 4, 16, 16) + 1  # not what the trunk was trained on
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    deviations: list[float] = []
    for norm in norms:
        norm.register_forward_hook(
            lambda layer, inputs, _: deviations.append(
                ((inputs[0].var((0, 2, 3)) / layer.running_var).log().abs().max()).item()
            )
        )
    with torch.no_grad():
        module(x)
        before = max(deviations)
        assert recalibrate(module, [(x,)]) == len(norms)
        deviations.clear()
        module(x)
    assert max(deviations) < 0.1 < 0.5 < before
