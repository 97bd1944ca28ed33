"""Loops in time from the user's side: tolerance, ranks, artifact, ONNX, command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import pnn_compile as pnn
from examples.coverage.operators import declare
from passes.errors import OptionError, RuntimeFault
from passes.schedule.instruction import Kind
from passes.schedule.verify import check
from pnn_compile.cli import main
from pnn_compile.inputs import named_batch
from pnn_compile.runtime.engine import run_in_one_process
from pnn_compile.runtime.rank_pieces import RankPieces
from tests.models import loops


def _compiled(
    steps: int = 12, **options: Any
) -> tuple[loops.DDIM, tuple[torch.Tensor, ...], pnn.Compiled]:
    torch.manual_seed(0)
    model, inputs = loops.DDIM(steps).eval(), loops.inputs(loops.DDIM)
    return model, inputs, pnn.compile(model, inputs, **{"stages": 4, **options})


def test_tolerance() -> None:
    model, inputs, compiled = _compiled(tolerance=1e-3)
    assert compiled.plan.tolerance == 1e-3
    assert 1 < compiled.plan.iterations < 4
    target = model(*inputs)
    assert ((compiled(*inputs) - target).norm(dim=1) / target.norm(dim=1)).max() < 1e-3
    assert compiled(noise := torch.randn(3, 8)).shape == noise.shape
    assert torch.equal(compiled(x=noise), compiled(noise))
    # The fixed K of the plan is what is saved, exported and distributed.
    fixed = compiled.iterate(inputs, iterations=compiled.plan.iterations).outputs
    torch.testing.assert_close(compiled.module(*inputs), fixed)
    rows = compiled.dial([inputs])
    speeds = [row.pipelined or 0.0 for row in rows]
    assert all(fast >= row.speedup for fast, row in zip(speeds, rows, strict=True))
    assert speeds[:3] == sorted(speeds[:3], reverse=True)
    assert speeds[3] == pytest.approx(1.0)  # the stages in sequence


@pytest.mark.parametrize("kind", [loops.DDIM, loops.Ancestral, loops.Nested])
def test_the_first_iteration_is_enough_where_it_is_and_the_tolerance_is_kept(
    kind: type[torch.nn.Module],
) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    compiled = pnn.compile(model, loops.inputs(kind), stages=4)
    inputs = loops.inputs(kind, batch=256)
    with torch.no_grad():
        target = model(*inputs)
    runs = [compiled.iterate(inputs, iterations=k) for k in range(1, 5)]
    errors = torch.stack([(run.outputs - target).norm(dim=1) for run in runs]) / target.norm(dim=1)
    estimates = runs[-1].estimates
    # The change of the first iteration is 30 times the error and more.
    assert (runs[0].increments[0] / errors[0]).quantile(0.05) > 30
    assert 1 < (estimates[0] / errors[0]).median() < 40
    for tolerance in (1e-2, 1e-3, 1e-4):
        taken = (estimates < tolerance).int().argmax(0)
        left = errors.gather(0, taken[None])
        assert (left < tolerance).float().mean() > 0.98
    assert (estimates[0] < 1e-2).all()


def test_without_tolerance_a_call_is_one_of_the_module() -> None:
    _, inputs, compiled = _compiled(iterations=2)
    assert torch.equal(compiled(*inputs), compiled.module(*inputs))


@pytest.mark.parametrize("verb", [pnn.iterate, lambda network, x: network.dial([x])])
def test_inputs_of_another_shape_are_told(verb: Any) -> None:
    _, _, compiled = _compiled()
    with pytest.raises(OptionError, match=r"was compiled for \[any number, 8\]"):
        verb(compiled, torch.randn(3, 9))


def test_options() -> None:
    _, _, compiled = _compiled(iterations="auto")
    assert compiled.plan.tolerance == 0.01
    for wrong in ({"tolerance": 0}, {"iterations": "many"}, {"tolerance": "small"}):
        with pytest.raises(OptionError):
            pnn.compile(loops.DDIM(), loops.inputs(loops.DDIM), stages=2, **wrong)


@pytest.mark.parametrize("iterations", [1, 2, 3, 4])
@pytest.mark.parametrize("placement", [(0, 1, 2, 3), (0, 0, 1, 1)])
def test_ranks_equal_the_network(iterations: int, placement: tuple[int, ...]) -> None:
    _, inputs, compiled = _compiled(iterations=iterations)
    ranks = [RankPieces(compiled, placement, rank) for rank in range(max(placement) + 1)]
    batches = [named_batch(compiled, inputs), named_batch(compiled, torch.randn(2, 8))]
    lists = ranks[0].instruction_lists(batches=2, backward=False)
    check(lists)
    predictions = sum(it.kind is Kind.PREDICT for instructions in lists for it in instructions)
    # Every stage but the first needs one, once; all iterations are the stages in sequence.
    assert predictions == (2 * 3 if iterations < 4 else 0)
    engines = run_in_one_process(compiled, ranks, batches)
    for number, batch in enumerate(batches):
        torch.testing.assert_close(
            engines[placement[-1]].outputs[number], compiled.module(**batch), rtol=1e-5, atol=1e-5
        )
    assert not any(engine.predictions for engine in engines)


def test_ranks_do_not_train_it() -> None:
    _, inputs, compiled = _compiled()
    ranks = [RankPieces(compiled, (0, 0, 1, 1), rank) for rank in range(2)]
    with pytest.raises(RuntimeFault, match="coarse steps of a loop"):
        run_in_one_process(
            compiled, ranks, [named_batch(compiled, inputs)], lambda outputs: outputs[0].mean()
        )


def test_verified_saved_and_exported(tmp_path: Path) -> None:
    # Few steps: the time of an export is that of their operators.
    _, inputs, compiled = _compiled(steps=6, stages=3, iterations=2)
    assert compiled.verify(strict=True).ok
    compiled.save(tmp_path / "saved")
    again = pnn.load(tmp_path / "saved")
    assert torch.equal(again.module(*inputs), compiled.module(*inputs))
    assert again.plan == compiled.plan
    pytest.importorskip("onnxruntime")
    exported = compiled.export_onnx(tmp_path / "model.onnx")
    assert exported.checked is not None
    assert exported.checked.error < 1e-4


def test_gradients_flow() -> None:
    _, inputs, compiled = _compiled(iterations=4)
    compiled.module(*inputs).square().sum().backward()
    gradients = {name: p.grad for name, p in compiled.module.named_parameters()}
    model = loops.DDIM()
    model.load_state_dict(compiled.original_state_dict())
    model(*inputs).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[f"fine_0.{name}"], parameter.grad)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "sampler.py"
    file.write_text(
        "import torch\nfrom tests.models import loops\n"
        "def build_model():\n    torch.manual_seed(0)\n    return loops.DDIM().eval()\n"
        "def example_inputs():\n    return loops.inputs(loops.DDIM)\n"
    )
    arguments = [str(file), "-n", "4", "--iterations", "auto", "--tolerance", "1e-3"]
    assert main([*arguments, "--no-verify"]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "a loop of 12 steps" in output
    assert "iterations on the example inputs for 0.001" in output
    assert main([*arguments[:3], "--iterations", "few"]) == 2


@pytest.mark.slow
def test_a_sampler_of_diffusers_is_a_loop() -> None:
    declare()  # of torchvision, which diffusers imports
    diffusers = pytest.importorskip("diffusers")

    class Sampler(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = diffusers.UNet2DModel(
                sample_size=8, in_channels=1, out_channels=1, layers_per_block=1,
                block_out_channels=(8, 16), norm_num_groups=4,
                down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
            )  # fmt: skip
            self.scheduler = diffusers.DDIMScheduler(clip_sample=False)
            self.scheduler.set_timesteps(8)

        def forward(self, noise: torch.Tensor) -> Any:
            x = noise
            for t in self.scheduler.timesteps:
                x = self.scheduler.step(self.network(x, t).sample, t, x).prev_sample
            return x

    torch.manual_seed(0)
    model, noise = Sampler().eval(), torch.randn(2, 1, 8, 8)
    compiled = pnn.compile(model, noise, stages=4, tolerance=1e-2)
    assert any(note.startswith("a loop of 8 steps") for note in compiled.plan.notes)
    families = {stage.coarse.family for stage in compiled.plan.stages if stage.coarse}
    assert families == {"time_step"}
    other = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        target = model(other)
        assert (compiled(other) - target).norm() < 1e-2 * target.norm()
