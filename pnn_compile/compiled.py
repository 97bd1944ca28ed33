"""The public face: `compile`, and `Compiled`, which it returns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from passes.analysis.analysis import CostSource
from passes.capture.ladder import capture
from passes.cost.device_profile import DeviceProfile
from passes.errors import OptionError
from passes.ir.program import Program
from passes.options import Options
from passes.pipeline import COMPILE, Compilation, PassResult, run_passes
from passes.plan.edit import moved_cuts, options_of
from passes.plan.schema import Plan
from pnn_compile.fit.calibrate import calibrate
from pnn_compile.fit.calibration_report import CalibrationReport
from pnn_compile.fit.select import choose
from pnn_compile.forecast.timing_cache import TimingCache
from pnn_compile.inputs import example
from pnn_compile.network import Network, gather, replay

if TYPE_CHECKING:
    import networkx as nx

    from pnn_compile.evaluate.assess import Verdict
    from pnn_compile.evaluate.iterate import DialRow, Iterates
    from pnn_compile.evaluate.verify import VerifyReport
    from pnn_compile.export.onnx import Exported

__all__ = ["Compiled", "compile", "load"]


class Compiled(Network):
    """A compiled network: what `Network` holds, and what users do with it."""

    @classmethod
    def of(cls, network: Network) -> Compiled:
        """Give a network the methods of this class; nothing is copied."""
        parts = {field.name: getattr(network, field.name) for field in fields(network)}
        return cls(**parts)

    @cached_property
    def graph(self) -> nx.DiGraph[str]:
        """The partition graph; `pnn_compile.export.partition_graph` lists its attributes."""
        from pnn_compile.export.partition_graph import partition_graph

        return partition_graph(self)

    def _repr_html_(self) -> str:
        """What a notebook shows: a small picture of the stages."""
        from pnn_compile.report.picture import picture

        return picture(self.plan)

    def report(self, width: int = 100) -> str:
        """Return the terminal report as plain text of at most `width` columns."""
        from pnn_compile.report.terminal import render

        return render(self, width=width)

    def verify(self, *, strict: bool = False) -> VerifyReport:
        """Hold the network against the program that it was made from.

        Args:
            strict: Whether to raise if a check fails.

        Raises:
            VerificationError: A check failed, under `strict`.
        """
        from pnn_compile.evaluate.verify import verify

        return verify(self, strict=strict)

    def calibrate(self, inputs: Iterable[Any]) -> CalibrationReport:
        """Fit guesses and corrections in closed form; see `pnn_compile.fit.calibrate.calibrate`."""
        return calibrate(self, inputs)

    def assess(
        self,
        inputs: Iterable[Any],
        *,
        stages: Sequence[int] = (),
        iterations: int = 2,
        **options: Any,
    ) -> Verdict:
        """Tell what the network keeps, beside early exits; see `pnn_compile.evaluate.assess`."""
        from pnn_compile.evaluate.assess import assess

        return assess(self, inputs, stages=stages, iterations=iterations, **options)

    def iterate(
        self, inputs: Any, *, iterations: int | None = None, tolerance: float | None = None
    ) -> Iterates:
        """Run iterations until the error seems small; see `pnn_compile.evaluate.iterate`."""
        from pnn_compile.evaluate.iterate import iterate

        return iterate(self, inputs, iterations=iterations, tolerance=tolerance)

    def dial(self, batches: Iterable[Any]) -> tuple[DialRow, ...]:
        """Measure every number of iterations on samples; see `pnn_compile.evaluate.iterate`."""
        from pnn_compile.evaluate.iterate import dial

        return dial(self, batches)

    def save(self, path: str | Path) -> Path:
        """Write the artifact directory `path`, atomically, replacing an older one.

        Returns:
            The directory.

        Raises:
            ArtifactError: The directory cannot be written; an older artifact there is whole.
        """
        from pnn_compile.artifact.directory import save

        return save(self, path)

    def export_html(self, path: str | Path) -> Path:
        """Write the report of the network as one HTML file that opens from disk.

        Raises:
            OptionError: The file cannot be written.
        """
        from pnn_compile.report.html import write_report

        return write_report(self, path)

    def export_onnx(
        self, path: str | Path, *, per_stage: bool = False, verify: bool = True
    ) -> Exported:
        """Write the parareal network, in evaluation mode, as ONNX, and check it.

        Args:
            path: File of one model, every node of which says its stage and role; per stage, the
                directory of `manifest.json` and `stages/*.onnx`, which run side by side.
            per_stage: Whether to write a model per stage.
            verify: Whether to check the form and compare ONNX Runtime with torch.

        Raises:
            ExportError: An operator has no ONNX form, a package is missing, or ONNX Runtime
                disagrees with torch.
        """
        from pnn_compile.export.onnx import export_onnx

        return export_onnx(self, path, per_stage=per_stage, verify=verify)


def compile(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    stages: int | Literal["auto"] = "auto",
    cost: CostSource = "flops",
    cuts: Iterable[str] | None = None,
    coarse: str = "auto",
    coarse_budget: float = 0.05,
    units: int = 1,
    rank: int = 32,
    preprocess: str = "auto",
    prologue: float | None = None,
    correction: Literal["residual", "difference"] = "residual",
    sweep: Literal["chain", "collapsed", "auto"] = "chain",
    iterations: int = 1,
    devices: DeviceProfile | Sequence[DeviceProfile] | None = None,
    dynamic_batch: bool = True,
    seed: int = 0,
    plan: Plan | None = None,
    calibration: Iterable[Any] | Callable[[Program], Iterable[Any]] | None = None,
    cache: bool | str | Path = True,
    debug: bool = False,
) -> Compiled:
    """Compile a model into a parareal neural network (Lee, Park, Lee, TNNLS 2022).

    Args:
        model: Any module; it is copied, never changed.
        example_inputs: A tensor, a tuple of positional arguments, or a dict of keyword arguments.
        args: Positional arguments, instead of `example_inputs`.
        kwargs: Keyword arguments, instead of `example_inputs` or with `args`.
        stages: Number N of stages, one a device, or "auto".
        cost: How nodes are weighed: "flops"; seconds on this machine, "measured" of a training step
            or "measured-forward" of the forward pass; seconds on `devices` by their profiles,
            "roofline" or "roofline-forward"; or a callable from (node, FLOPs) to a number. What
            counts the way back cuts for training, what says forward for inference.
        cuts: Names of the nodes or modules that come first in the second and later stages;
            overrides the search.
        coarse: Family of the coarse propagators: "auto", "linear", "lowrank", "conv", a sum of
            these three ("linear+lowrank"), "units" (fresh copies of the repeating block, the
            paper's), "thinned" (every m-th trained block, its branch scaled by m), "exact",
            "zero", or one of your own (docs/write_a_coarse_family.md).
        coarse_budget: Largest share of the original's cost that the coarse sweep may take.
        units: Copies of the repeating block in a coarse network of family "units"; how many of a
            stage's repeated blocks a network of family "thinned" keeps.
        rank: Rank of family "lowrank".
        preprocess: Family of the preprocessing operators: "auto", "convolution", "linear",
            "lowrank", "conv" or a sum of these four; or "thinned" (copies of the first layers and
            of every m-th block behind them, with a channel map: for trained, deep models).
        prologue: Largest share of the original's cost that every guess may spend on a copy of
            the first layers, to read what they give instead of the input; for "thinned" on all
            that it copies, a tenth or the least it needs if None.
        correction: "residual" (the paper's form, for training) or "difference" (classical).
        sweep: "chain", or "collapsed": every residual goes straight to the last state through a
            linear or small map of its own, all of them at once; or "auto", the faster one by the
            step-time model where the corrections are linear.
        iterations: Number K of parareal iterations; K = N reproduces the original.
        devices: Profile of the devices to cut for, one for all or a list of one per stage or more
            (`pnn.load_profile`). Their speeds, links and memory count; costs are then seconds,
            cost="roofline" unless another one is given.
        dynamic_batch: Whether the batch size stays free where the model allows it.
        seed: Seed of the initial weights of the coarse networks.
        plan: Replay this plan instead of deciding anew; no option of the search may be given.
            Where a cut was moved in it (the `first` of a stage, or one of the other names of the
            same cut), its stages are made anew for the cuts that it then has.
        calibration: Batches of inputs, as in `calibrate`, or a function that makes them from the
            captured program. Guesses and corrections are fitted to the model's weights, and
            "auto" families are chosen by how well they fit within the budget; a guess may copy
            first layers worth as much again, unless `prologue` says otherwise.
        cache: Whether to keep measured seconds in files (`pnn_compile.forecast.timing_cache` says
            where), and to take those that are there; or the folder to keep them in.
        debug: Whether to verify every graph between passes.

    Raises:
        OptionError: An option is unknown or out of range.
        CaptureError: The model cannot be captured as a graph, or fails on the example inputs.
        PartitionError: It cannot be cut into that many stages, or does not fit the devices.
        SynthesisError: No guess or correction can be made for an interface.
        ArtifactError: `plan` was made for another model, or was edited and makes no sense.
    """
    args, kwargs = example(model, example_inputs, args, kwargs)
    profiles = (devices,) if isinstance(devices, DeviceProfile) else tuple(devices or ())
    options = Options(
        stages=stages,
        cost="roofline" if profiles and cost == "flops" else cost,
        cuts=cuts if cuts is None or isinstance(cuts, str) else tuple(cuts),  # type: ignore[arg-type]
        coarse=coarse,
        coarse_budget=coarse_budget,
        units=units,
        rank=rank,
        preprocess=preprocess,
        prologue=prologue,
        correction=correction,
        sweep=sweep,
        iterations=iterations,
        devices=profiles,
        seed=seed,
    )
    given = [f.name for f in fields(Options) if getattr(options, f.name) != f.default]
    if plan is not None and given:
        raise OptionError(
            f"a plan decides everything: leave out {', '.join(given)}, or leave out the plan"
        )
    if calibration is not None and plan is None:
        options = options.calibrated()
    start = time.perf_counter()
    program = capture(model, args, kwargs, dynamic_batch=dynamic_batch)
    captured = PassResult("capture and validate", time.perf_counter() - start)
    if plan is not None and plan.fingerprint == program.fingerprint:
        moved = moved_cuts([node.name for node in program.order], plan)
        if moved is not None:
            options, plan = options_of(plan, moved), None
    if plan is not None:
        network = replay(program, plan, captured, debug=debug)
    else:
        timings = TimingCache.of(cache)
        start_of = Compilation(program, options, measure=timings)
        compilation, results = run_passes(start_of, COMPILE, check=debug)
        network = gather(compilation, (captured, *results))
        network = replace(network, timings=timings.path)
    if calibration is not None:
        batches = calibration(program) if callable(calibration) else calibration
        start = time.perf_counter()
        if plan is not None:
            network = replace(network, calibration=calibrate(network, batches))
        else:
            assert compilation.analysis is not None
            assert compilation.options is not None
            network = choose(network, compilation.analysis, compilation.options, batches)
        spent = PassResult("calibrate", time.perf_counter() - start)
        network = replace(network, passes=(*network.passes, spent))
    return Compiled.of(network)


def load(path: str | Path, model: nn.Module | None = None) -> Compiled:
    """Load an artifact directory, on the CPU; nothing is unpickled and no code of it runs.

    Args:
        path: The directory.
        model: Replay the plan over this model instead of the stored program; for a program that
            could not be stored. It is copied, and the stored weights are loaded into the copy.

    Raises:
        ArtifactError: The directory is no artifact, a file is missing or damaged, or the model
            is not the one that the plan was made for.
    """
    from pnn_compile.artifact.directory import load as load_network

    return Compiled.of(load_network(path, model))
