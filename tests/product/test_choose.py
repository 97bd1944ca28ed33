"""Measured choice of guesses and corrections, and guesses that copy the first layers."""

import itertools
from pathlib import Path

import pytest
import torch
from torch import nn

import pnn_compile as pnn
from examples import decoder, resnet110
from passes.errors import amount


@pytest.fixture(scope="module")
def samples() -> list[torch.Tensor]:
    """Smooth images, so that there is something to learn from few samples."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(320, 3, 4, 4, generator=generator)
    return list(nn.functional.interpolate(coarse, size=(8, 8), mode="bilinear").split(32))


def _network(units: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return resnet110.build_model(units, 4).eval()


def test_the_plan_says_what_was_tried_and_why_it_was_taken(
    samples: list[torch.Tensor], tmp_path: Path
) -> None:
    budget = 0.4
    compiled = pnn.compile(
        _network(), samples[0][:2], stages=3, coarse_budget=budget, calibration=samples
    )
    assert compiled.calibration is not None
    total = compiled.plan.forecast.sequential
    for stage in compiled.plan.stages[1:]:
        for spec, limit in ((stage.preprocess, 2 * budget), (stage.coarse, budget / 2)):
            assert spec is not None
            errors = {trial.flops: trial.error for trial in spec.tried}
            assert len(errors) > 1
            assert max(errors) <= limit * total
            cheaper = [error for flops, error in errors.items() if flops < spec.flops]
            best = min(errors.values())
            assert errors[spec.flops] <= 1.05 * best
            assert all(error > 1.05 * best for error in cheaper)
            assert f"of {amount(len(errors), 'candidate')}" in spec.why
    assert compiled.plan.forecast.serial_share == pytest.approx(
        (sum(s.coarse.flops for s in compiled.plan.stages if s.coarse) + compiled.plan.head.flops)
        / total
    )
    assert compiled.verify().ok
    again = pnn.compile(
        _network(), samples[0][:2], stages=3, coarse_budget=budget, calibration=samples
    )
    assert again.plan == compiled.plan
    assert again.calibration == compiled.calibration
    loaded = pnn.load(compiled.save(tmp_path / "out"))
    assert loaded.plan == compiled.plan
    with torch.no_grad():
        result, expected = loaded.module.eval()(samples[1]), compiled.module.eval()(samples[1])
    torch.testing.assert_close(result, expected)


def test_what_was_asked_for_is_not_chosen_anew(samples: list[torch.Tensor]) -> None:
    compiled = pnn.compile(
        _network(), samples[0][:2], stages=2, coarse="linear", preprocess="lowrank",
        coarse_budget=0.4, calibration=samples,
    )  # fmt: skip
    stage = compiled.plan.stages[1]
    assert stage.preprocess is not None
    assert stage.coarse is not None
    assert (stage.preprocess.family, stage.coarse.family) == ("lowrank", "linear")
    assert not stage.preprocess.tried
    assert not stage.coarse.tried


def test_calibrated_choice_beats_the_one_without_samples(samples: list[torch.Tensor]) -> None:
    chosen = pnn.compile(
        _network(), samples[0][:2], stages=3, coarse_budget=0.4, calibration=samples
    )
    fixed = pnn.compile(
        _network(), samples[0][:2], stages=3, coarse_budget=0.4, coarse="linear",
        preprocess="linear", calibration=samples,
    )  # fmt: skip
    assert chosen.calibration is not None
    assert fixed.calibration is not None
    assert chosen.calibration.output_error_after < fixed.calibration.output_error_after


def test_a_guess_behind_a_copy_of_the_first_layers(samples: list[torch.Tensor]) -> None:
    options = {"stages": 3, "coarse": "linear", "preprocess": "lowrank+linear", "rank": 16}
    plain = pnn.compile(_network(3), samples[0][:2], **options)  # type: ignore[arg-type]
    copied = pnn.compile(_network(3), samples[0][:2], prologue=0.2, **options)  # type: ignore[arg-type]
    spec, without = copied.plan.stages[1].preprocess, plain.plan.stages[1].preprocess
    assert spec is not None
    assert without is not None
    assert spec.options.copied is not None
    assert without.flops < spec.flops <= 0.3 * copied.plan.forecast.sequential
    assert copied.plan.forecast.speedup < plain.plan.forecast.speedup
    reports = [pnn.calibrate(network, samples) for network in (plain, copied)]
    for before, after in zip(*(report.interfaces for report in reports), strict=True):
        assert after.guess_after < before.guess_after
    # The copies train on their own: no parameter is shared with the fine stages.
    guess = copied.operators.preprocess[1]
    own = {id(p) for p in guess.parameters()}
    assert own.isdisjoint(id(p) for p in copied.stages.fine[0].parameters())
    assert sum(p.numel() for p in guess.parameters()) == spec.parameters
    assert copied.verify().ok
    copied.module.train()(samples[0]).sum().backward()
    assert all(p.grad is not None for p in guess.parameters())


def test_a_guess_behind_the_first_layers_of_a_decoder() -> None:
    torch.manual_seed(0)
    model = decoder.build_model(layers=6, width=16, context=16).eval()
    tokens = torch.randint(256, (64, 16))
    compiled = pnn.compile(
        model, tokens[:2], stages=2, prologue=0.2, coarse_budget=0.2,
        calibration=lambda program: tokens.split(16),
    )  # fmt: skip
    spec = compiled.plan.stages[1].preprocess
    assert spec is not None
    assert any("copy" in trial.name for trial in spec.tried)
    assert compiled.verify().ok


@pytest.mark.parametrize("share", [-0.1, 1.0, "much"])
def test_a_prologue_is_a_share(share: object) -> None:
    with pytest.raises(pnn.OptionError, match="prologue must be a share"):
        pnn.compile(nn.Linear(4, 4), torch.randn(2, 4), prologue=share)  # type: ignore[arg-type]


def test_notes_on_the_speed_say_that_they_are_of_before_the_calibration(
    samples: list[torch.Tensor],
) -> None:
    widths = (8, 8, 8, 2, 2)
    network = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths)))
    rows = [batch[:, 0, 0, :] for batch in samples]
    plan = pnn.compile(network, rows[0][:2], calibration=rows, stages=3, validate="off").plan
    speeds = [note for note in plan.notes if "times the original's speed" in note]
    assert speeds
    assert all(note.endswith("before the calibration)") for note in speeds)
