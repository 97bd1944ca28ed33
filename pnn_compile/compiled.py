"""The public face: `compile` and `load`, and `Compiled`, which they return."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from passes.analysis.analysis import Analysis, analyze
from passes.cost.node_facts import observe
from passes.errors import ArtifactError, OptionError, printable
from passes.ir.program import Program, graph_module, resolve
from passes.options import Choices, Options
from passes.pipeline import CAPTURE, COMPILE, REPLAY, Compilation, Pass, PassResult, run_passes
from passes.plan.edit import moved_cuts, options_of
from passes.plan.schema import Plan
from passes.plan.validate import check_plan
from passes.transform.split import Stages
from passes.transform.synthesize import Operators

if TYPE_CHECKING:
    import networkx as nx

    from pnn_compile.evaluate.assess import Verdict
    from pnn_compile.evaluate.iterate import DialRow, Iterates
    from pnn_compile.evaluate.verify import VerifyReport
    from pnn_compile.export.onnx import Exported
    from pnn_compile.fit.calibrate import CalibrationReport
    from pnn_compile.fit.train import FitReport
    from pnn_compile.forecast.table import ForecastTable
    from pnn_compile.runtime import RankModule

__all__ = ["Compiled", "compile", "gather", "load", "replay"]


@dataclass(frozen=True, repr=False)
class Compiled:
    """A compiled network: everything that it was made from, and what users do with it.

    Every verb is a method here, and a function of the room that does the work; a room is imported
    when its verb is called.

    Attributes:
        program: The captured model.
        plan: Every decision.
        stages: The fine stages and the head.
        operators: The preprocessing operators and coarse propagators.
        sequential: The stages one after another; equal to the original network.
        module: The parareal network; trainable, `train()` and `eval()` work.
        passes: What each pass of the compiler took.
        calibration: What calibration found, where samples were given to the compiler.
        weighed: What the compiler cut it by; None of a network that was loaded.
    """

    program: Program
    plan: Plan
    stages: Stages
    operators: Operators
    sequential: fx.GraphModule
    module: fx.GraphModule
    passes: tuple[PassResult, ...]
    calibration: CalibrationReport | None = None
    timings: Path | None = None
    weighed: Analysis | None = None

    def __repr__(self) -> str:
        plan = self.plan
        return (
            f"<{type(self).__name__} {printable(plan.model)}: {len(plan.stages)} stages, "
            f"{plan.correction} form, K = {plan.iterations}>"
        )

    @cached_property
    def analysis(self) -> Analysis:
        """Shapes, costs and legal cuts of the program, by FLOPs."""
        if self.weighed is None:
            return analyze(self.program, observe(self.program), "flops")
        if self.weighed.unit == "FLOPs":
            return self.weighed
        return analyze(self.program, self.weighed.facts, "flops")

    @property
    def seconds(self) -> Mapping[str, float]:
        """Measured seconds by the name of the node; empty where the compiler measured none."""
        if self.weighed is None or self.weighed.unit != "seconds":
            return {}
        return {node.name: cost.cost for node, cost in self.weighed.costs.items()}

    def current_program(self) -> Program:
        """Return the program with the tensors that the stages hold now, and inputs to match.

        Conversions such as `module.double()` or `module.to(...)` replace buffers in the stages,
        where the program keeps the older ones.
        """
        program = self.program
        held: dict[str, torch.Tensor] = {}
        for piece in (*self.stages.fine, self.stages.head):
            held.update(piece.named_parameters(remove_duplicate=False))
            held.update(piece.named_buffers(remove_duplicate=False))
        own = dict[str, torch.Tensor](program.module.named_parameters(remove_duplicate=False))
        own.update(program.module.named_buffers(remove_duplicate=False))
        stale = [name for name, tensor in own.items() if held.get(name, tensor) is not tensor]
        module = program.module
        if stale:
            module = graph_module(program.module, program.graph, program.name)
            for name in stale:
                path, _, leaf = name.rpartition(".")
                setattr(resolve(module, path) if path else module, leaf, held[name])
        return replace(program, module=module, args=self._converted_inputs(module))

    @property
    def conversion(self) -> tuple[torch.dtype, torch.dtype] | None:
        """Precision of the states when it was compiled and of all weights now, if it changed."""
        before = {value.spec.dtype for face in self.plan.interfaces for value in face.state}
        weights = self.program.module.parameters()
        now = {p.dtype for p in weights if p.is_floating_point()}
        if len(before) != 1 or len(now) != 1:
            return None
        pair = getattr(torch, before.pop()), now.pop()
        return None if pair[0] == pair[1] else pair

    def _converted_inputs(self, module: fx.GraphModule) -> dict[str, Any]:
        """The example inputs, in the precision and on the device that the weights have now."""
        device = next((p.device for p in module.parameters()), None)
        conversion = self.conversion

        def convert(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            if conversion is not None and leaf.dtype == conversion[0]:
                leaf = leaf.to(conversion[1])
            return leaf if device is None else leaf.to(device)

        return {name: pytree.tree_map(convert, value) for name, value in self.program.args.items()}

    def original_state_dict(self) -> dict[str, torch.Tensor]:
        """Return the weights of the fine stages and the head under the model's own keys."""
        known = dict(self.program.unused)
        for piece in (*self.stages.fine, self.stages.head):
            known.update(piece.state_dict())
        return known

    def load_original_state_dict(
        self, state: Mapping[str, torch.Tensor], *, strict: bool = True
    ) -> None:
        """Load a checkpoint of the original model into the fine stages and the head.

        Guesses and corrections stay as they are. Those of family thinned hold copies of the
        weights that the model had when it was compiled: load a checkpoint into it before.

        Args:
            state: A state dict with the model's own keys.
            strict: Whether every key must be there, and no other.

        Raises:
            OptionError: Keys are missing or unknown under `strict`, or a shape differs. Nothing
                is loaded then.
        """
        own = self.original_state_dict()
        missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        if strict and (missing or unknown):
            raise OptionError(
                f"the checkpoint does not fit {self.plan.model}: {len(missing)} keys missing "
                f"({', '.join(missing[:3])}), {len(unknown)} unknown ({', '.join(unknown[:3])}); "
                "pass strict=False to load what fits"
            )
        common = own.keys() & state.keys()
        wrong = [key for key in common if own[key].shape != state[key].shape]
        if wrong:
            key = min(wrong)
            raise OptionError(
                f"{key} has shape {list(state[key].shape)} in the checkpoint and "
                f"{list(own[key].shape)} in {self.plan.model}"
            )
        with torch.no_grad():
            for key in common:
                own[key].copy_(state[key])

    @cached_property
    def graph(self) -> nx.DiGraph[str]:
        """The partition graph; `pnn_compile.export.partition_graph` lists its attributes."""
        from pnn_compile.export.partition_graph import partition_graph

        return partition_graph(self)

    def _repr_html_(self) -> str:
        """What a notebook shows: a small picture of the stages."""
        from pnn_compile.report.html import picture

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
        """Fit guesses and corrections in closed form; see `pnn_compile.fit.calibrate`."""
        from pnn_compile.fit.calibrate import calibrate

        return calibrate(self, inputs)

    def fit(self, batches: Iterable[Any], **options: Any) -> FitReport:
        """Train the network end to end; `pnn_compile.fit.train.fit` lists the options."""
        from pnn_compile.fit.train import fit

        return fit(self, batches, **options)

    def forecast(self, **options: Any) -> ForecastTable:
        """Predict a step on numbers of devices; `pnn_compile.forecast.forecast` lists options."""
        from pnn_compile.forecast.forecast import forecast

        return forecast(self, **options)

    def distribute(self, **options: Any) -> RankModule:
        """Return this rank's part; `pnn_compile.runtime.distribute` lists the options."""
        from pnn_compile.runtime import distribute

        return distribute(self, **options)

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
    options: Options | None = None,
    dynamic_batch: bool = True,
    plan: Plan | None = None,
    calibration: Iterable[Any] | Callable[[Program], Iterable[Any]] | None = None,
    cache: bool | str | Path = True,
    passes: Sequence[Pass] = COMPILE,
    debug: bool = False,
    **choices: Unpack[Choices],
) -> Compiled:
    """Compile a model into a parareal neural network (Lee, Park, Lee, TNNLS 2022).

    Args:
        model: Any module; it is copied, never changed.
        example_inputs: A tensor, a tuple of positional arguments, or a dict of keyword arguments.
        args: Positional arguments, instead of `example_inputs`.
        kwargs: Keyword arguments, instead of `example_inputs` or with `args`.
        options: What to decide and how; `passes.options.Options` describes every one.
        dynamic_batch: Whether the batch size stays free where the model allows it.
        plan: Replay this plan instead of deciding anew; no option may be given. Where a cut was
            moved in it (the `first` of a stage, or one of the other names of the same cut), its
            stages are made anew for the cuts that it then has.
        calibration: Batches of inputs, as in `calibrate`, or a function that makes them from the
            captured program. Guesses and corrections are fitted to the model's weights, and
            "auto" families are chosen by how well they fit within the budget; a guess may copy
            first layers worth as much again, unless `prologue` says otherwise.
        cache: Whether to keep measured seconds in files (`pnn_compile.forecast.timing_cache` says
            where), and to take those that are there; or the folder to keep them in.
        passes: What runs between capture and calibration, in order; `passes.pipeline.insert` puts
            a pass of your own between two others.
        debug: Whether to verify every graph between passes.
        **choices: The same options by their names (`stages=4, coarse="units"`), instead of
            `options` or in addition: they replace what is set there.

    Returns:
        The compiled network; `compiled.module` is what runs and trains.

    Raises:
        OptionError: An option is unknown or out of range.
        CaptureError: The model cannot be captured as a graph, or fails on the example inputs.
        PartitionError: It cannot be cut into that many stages, or does not fit the devices.
        SynthesisError: No guess or correction can be made for an interface.
        ArtifactError: `plan` was made for another model, or was edited and makes no sense.
    """
    from pnn_compile.forecast.timing_cache import TimingCache
    from pnn_compile.inputs import example

    args, kwargs = example(model, example_inputs, args, kwargs)
    options = Options.of(options, choices)
    if plan is not None and (changed := options.changed()):
        raise OptionError(
            f"a plan decides everything: leave out {', '.join(changed)}, or leave out the plan"
        )
    if calibration is not None and plan is None:
        options = options.calibrated()
    start = Compilation(
        model=model, args=args, kwargs=kwargs, dynamic_batch=dynamic_batch, options=options
    )
    compilation, results = run_passes(start, [CAPTURE], check=debug)
    program = compilation.program
    assert program is not None
    timings = None
    if plan is not None:
        moved = None
        if plan.fingerprint == program.fingerprint:
            moved = moved_cuts([node.name for node in program.order], plan)
        if moved is not None:
            compilation, plan = replace(compilation, options=options_of(plan, moved)), None
    if plan is not None:
        check_replayed(program, plan)
        compilation, passes = replace(compilation, plan=plan, options=None), REPLAY
    else:
        timings = TimingCache.of(cache)
        compilation = replace(compilation, measure=timings)
    if calibration is not None:
        samples = calibration(program) if callable(calibration) else calibration
        compilation, passes = replace(compilation, samples=samples), (*passes, CALIBRATE)
    compilation, more = run_passes(compilation, passes, check=debug)
    compiled = gather(compilation, (*results, *more))
    return replace(compiled, timings=timings.path if timings is not None else None)


def _calibrate(c: Compilation) -> Compilation:
    """Fit the operators to samples; those that options leave open are chosen by how they fit."""
    from pnn_compile.fit.calibrate import calibrate
    from pnn_compile.fit.select import choose

    assert c.samples is not None
    compiled = gather(c, ())
    if c.options is None or c.analysis is None:  # a plan is replayed: it decides
        return replace(c, calibration=calibrate(compiled, c.samples))
    chosen = choose(compiled, c.analysis, c.options, c.samples)
    return replace(
        c, plan=chosen.plan, operators=chosen.operators, module=chosen.module,
        calibration=chosen.calibration,
    )  # fmt: skip


CALIBRATE = Pass("calibrate", ("samples", "plan", "module"), ("calibration",), _calibrate)
"""Fit guesses and corrections to samples."""


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
    from pnn_compile.artifact.directory import load as load_artifact

    return load_artifact(path, model)


def replay(program: Program, plan: Plan, *before: PassResult, debug: bool = False) -> Compiled:
    """Build the network that a plan describes over a program.

    Raises:
        ArtifactError: The plan was made for another program, or was edited and makes no sense.
    """
    check_replayed(program, plan)
    compilation, results = run_passes(Compilation(program=program, plan=plan), REPLAY, check=debug)
    return gather(compilation, (*before, *results))


def check_replayed(program: Program, plan: Plan) -> None:
    """Check that a plan was made for a program, and means something over it.

    Raises:
        ArtifactError: It was made for another one, or was edited and makes no sense.
    """
    if plan.fingerprint != program.fingerprint:
        raise ArtifactError(
            f"the plan was made for another {plan.model}: the structure of {program.name} differs "
            "(layers, shapes or options); compile it again"
        )
    check_plan(program, plan)


def gather(compilation: Compilation, results: tuple[PassResult, ...]) -> Compiled:
    """Collect what a finished compilation made."""
    c = compilation
    assert c.program is not None
    assert c.plan is not None
    assert c.stages is not None
    assert c.operators is not None
    assert c.sequential is not None
    assert c.module is not None
    return Compiled(
        c.program,
        c.plan,
        c.stages,
        c.operators,
        c.sequential,
        c.module,
        results,
        calibration=c.calibration,
        weighed=c.analysis,
    )
