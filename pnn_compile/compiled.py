"""The public face: `compile` and `load`, and `Compiled`, which they return."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self, Unpack

import torch
from torch import fx, nn

from passes.analysis.analysis import Analysis, analyze
from passes.cost.node_facts import observe
from passes.errors import OptionError, printable
from passes.ir.program import Program, Validation
from passes.options import Choices, Options
from passes.pipeline import CAPTURE, COMPILE, REPLAY, Compilation, Pass, PassResult, run_passes
from passes.plan.schema import Plan
from passes.plan.validate import options_to_replan
from passes.transform.conversion import conversion, current_program
from passes.transform.lockstep import Lockstep
from passes.transform.network import check_length
from passes.transform.original_weights import load_state_dict, to_state_dict, weights_by_name
from passes.transform.split import Stages
from passes.transform.synthesize import Operators

if TYPE_CHECKING:
    import networkx as nx

    from pnn_compile.evaluate.assess import Verdict
    from pnn_compile.evaluate.iterate import DialRow, Iterates
    from pnn_compile.evaluate.probe import Probe
    from pnn_compile.evaluate.verify import VerifyReport
    from pnn_compile.export.onnx import Exported
    from pnn_compile.fit.calibrate import CalibrationReport
    from pnn_compile.fit.train import FitReport
    from pnn_compile.forecast.table import ForecastTable
    from pnn_compile.runtime import RankModule


@dataclass(frozen=True, repr=False)
class Compiled:
    """A compiled network: its program, plan and modules, and everything that users do with it.

    Every verb is a method here, and a function of the package that does the work, which is imported
    when the verb is called.

    Attributes:
        program: The captured model.
        plan: Every decision of the compiler.
        stages: The fine stages and the head.
        operators: The preprocessing operators and coarse propagators.
        sequential: The stages one after another; equal to the original network.
        module: The parareal network; trainable, `train()` and `eval()` work.
        passes: Name and seconds of every pass of the compiler.
        calibration: Errors before and after calibration; None if the compiler had no samples.
        timings: File of the measured seconds that the plan rests on; None without one.
        weighed: The analysis that the cuts were chosen by; None of a network that was loaded
            or copied.
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
        return f"<{type(self).__name__} {printable(plan.model)}: {plan.form}>"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the network, with as many iterations as its tolerance takes, or its plan says.

        With a tolerance in the plan, iterations run until the estimate of every sample is below
        it, without gradients; `pnn_compile.evaluate.iterate` says what is estimated.

        Args:
            args: Positional arguments of the model.
            kwargs: Arguments of the model by name.

        Raises:
            OptionError: An argument is missing, or unknown.
        """
        if self.plan.tolerance is None:
            return self.module(*args, **kwargs)
        names = [str(node.target) for node in self.program.inputs]
        if len(args) > len(names):
            raise OptionError(f"{len(args)} arguments for inputs {', '.join(names)}")
        inputs = dict(zip(names, args, strict=False)) | kwargs
        return self.iterate(inputs, tolerance=self.plan.tolerance).outputs

    def train(self, mode: bool = True) -> Self:
        """Set the network to training mode, or to evaluation mode."""
        self.module.train(mode)
        return self

    def eval(self) -> Self:
        """Set the network to evaluation mode."""
        return self.train(False)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move or convert the network, as `torch.nn.Module.to` does."""
        self.module.to(*args, **kwargs)
        return self

    def parameters(self) -> Iterator[nn.Parameter]:
        """Iterate over the parameters of the network, for an optimizer."""
        return self.module.parameters()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the weights of the network, under its own names."""
        return self.module.state_dict()

    def load_state_dict(self, state: Mapping[str, torch.Tensor], strict: bool = True) -> None:
        """Load what `state_dict` returned; `load_original_state_dict` takes the model's."""
        self.module.load_state_dict(state, strict=strict)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        values["weighed"] = None  # of the nodes of this program, not of the copy's
        return type(self)(**copy.deepcopy(values, memo))

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a compiled network cannot be pickled: save it with compiled.save(directory), and load "
            "it with pnn.load(directory), in another process too"
        )

    @cached_property
    def lockstep(self) -> Lockstep:
        """Batched calls of the stages of a loop in time.

        Raises:
            OptionError: The stages do not share their weights.
        """
        return Lockstep(self.plan, self.stages)

    @cached_property
    def analysis(self) -> Analysis:
        """Shapes, costs and legal cuts of the program, in FLOPs."""
        if self.weighed is None:
            return analyze(self.program, observe(self.program), "flops")
        if self.weighed.unit == "FLOPs":
            return self.weighed
        return analyze(self.program, self.weighed.facts, "flops")

    @property
    def seconds(self) -> Mapping[str, float]:
        """Measured seconds by node name; empty if the compiler measured none."""
        if self.weighed is None or self.weighed.unit != "seconds":
            return {}
        return {node.name: cost.cost for node, cost in self.weighed.costs.items()}

    def current_program(self) -> Program:
        """Return the program with the current tensors of the stages, and inputs that match them."""
        return current_program(self.program, self.plan, self.stages, self.module)

    @property
    def conversion(self) -> tuple[torch.dtype, torch.dtype] | None:
        """Precision of the states at compile time and of all weights now, if it changed."""
        return conversion(self.program, self.plan, self.module)

    def original_state_dict(self) -> dict[str, torch.Tensor]:
        """Return the weights of the fine stages and the head under the model's own keys."""
        return to_state_dict(self.program, weights_by_name(self.program, self.stages))

    def load_original_state_dict(
        self, state: Mapping[str, torch.Tensor], *, strict: bool = True
    ) -> None:
        """Load a checkpoint of the original model into the fine stages and the head.

        Preprocessing operators and coarse propagators do not change. Those of family "thinned" are
        copies of the weights at compile time: load a checkpoint into the model before.

        Args:
            state: A state dict with the model's own keys.
            strict: Whether all keys of the model must be there, and no others.

        Raises:
            OptionError: Keys are missing or unknown under `strict`, a shape or something that is
                no tensor differs, or the network is on the meta device. Nothing is loaded then.
        """
        load_state_dict(self.program, self.stages, state, strict=strict)

    @cached_property
    def graph(self) -> nx.DiGraph[str]:
        """The partition graph; `pnn_compile.export.partition_graph` lists its attributes."""
        from pnn_compile.export.partition_graph import partition_graph

        return partition_graph(self)

    def _repr_html_(self) -> str:
        """Return a small picture of the stages, for notebooks."""
        from pnn_compile.report.html import picture

        return picture(self.plan)

    def report(self, width: int = 100) -> str:
        """Return the terminal report as plain text of at most `width` columns."""
        from pnn_compile.report.terminal import render

        return render(self, width=width)

    def verify(self, *, strict: bool = False) -> VerifyReport:
        """Compare the network with the program that it was compiled from.

        Args:
            strict: Whether to raise if a check fails.

        Raises:
            VerificationError: A check failed, under `strict`.
        """
        from pnn_compile.evaluate.verify import verify

        return verify(self, strict=strict)

    def calibrate(self, inputs: Iterable[Any]) -> CalibrationReport:
        """Fit the cheap operators in closed form; see `pnn_compile.fit.calibrate`."""
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
        """Return the part of this rank; `pnn_compile.runtime.distribute` lists the options."""
        from pnn_compile.runtime import distribute

        return distribute(self, **options)

    def assess(
        self,
        inputs: Iterable[Any],
        *,
        stages: Sequence[int] = (),
        windows: Sequence[int] = (),
        iterations: int = 2,
        **options: Any,
    ) -> Verdict:
        """Compare the network with the original on samples; see `pnn_compile.evaluate.assess`."""
        from pnn_compile.evaluate.assess import assess

        return assess(
            self, inputs, stages=stages, windows=windows, iterations=iterations, **options
        )

    def probe(self, batches: Sequence[Any], **options: Any) -> Probe:
        """Train it beside its original and other forms; see `pnn_compile.evaluate.probe`."""
        from pnn_compile.evaluate.probe import probe

        return probe(self, batches, **options)

    def iterate(self, inputs: Any, **options: Any) -> Iterates:
        """Run iterations until the error seems small; see `pnn_compile.evaluate.iterate`."""
        from pnn_compile.evaluate.iterate import iterate

        return iterate(self, inputs, **options)

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
        self,
        path: str | Path,
        *,
        per_stage: bool = False,
        verify: bool = True,
        opset: int = 20,
        fp16: bool = False,
        bf16: bool = False,
    ) -> Exported:
        """Write the parareal network, in evaluation mode, as ONNX, and check it.

        Args:
            path: File of one model, in which every node names its stage and role; with `per_stage`,
                directory of `manifest.json` and `stages/*.onnx`, which can run in parallel.
            per_stage: Whether to write a model per stage.
            verify: Whether to check the file and compare ONNX Runtime with torch.
            opset: Version of the operator set, 18 to 24.
            fp16: Whether to write the network in half precision; inputs and outputs are so too.
            bf16: Whether to store the weights in bfloat16; it computes in float32.

        Raises:
            ExportError: An operator does not exist in ONNX, a package is missing, or ONNX Runtime
                disagrees with torch.
        """
        from pnn_compile.export.onnx import export_onnx

        return export_onnx(
            self, path, per_stage=per_stage, verify=verify, opset=opset, fp16=fp16, bf16=bf16
        )


def compile(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    options: Options | None = None,
    dynamic: Collection[str] = ("batch",),
    validate: Validation = "full",
    plan: Plan | None = None,
    calibration: Iterable[Any] | Callable[[Program], Iterable[Any]] | None = None,
    cache: bool | str | Path = True,
    passes: Sequence[Pass] = COMPILE,
    debug: bool = False,
    progress: Callable[[str], object] = lambda _: None,
    **choices: Unpack[Choices],
) -> Compiled:
    """Compile a model into a parareal neural network (Lee, Lee, Park, TNNLS 2022).

    >>> model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(6)))
    >>> compiled = compile(model, torch.randn(2, 8), stages=3)
    >>> compiled
    <Compiled Sequential: 3 stages, residual form, chain sweep, K = 1>
    >>> compiled(torch.randn(5, 8)).shape
    torch.Size([5, 8])

    Args:
        model: Any module; it is copied, never changed.
        example_inputs: A tensor, a tuple of positional arguments, or a dict of keyword arguments;
            by default the `example_input_array` of a LightningModule.
        args: Positional arguments, instead of `example_inputs`.
        kwargs: Keyword arguments, instead of `example_inputs` or with `args`.
        options: The options; `passes.options.Options` describes every one.
        dynamic: Dimensions that are free: "batch", dimension 0, where the model allows it, and
            "sequence", dimension 1 of the first input that has one, with all dimensions of its
            length; a model that fixes that is refused. Empty: the shapes of the example alone.
        validate: What the captured graph is compared with the model by. "full": outputs, buffers
            and gradients, in both modes, on two inputs. "fast": without gradients, which take most
            of the time, on one input. "off": in evaluation mode alone. The report says which.
        plan: Plan to replay instead of deciding; no option may be set with it. Where its cuts were
            moved (the `first` of a stage, or one of the other names of the same cut), the rest is
            planned again for these cuts.
        calibration: Batches of inputs, as in `calibrate`, or a function that returns them for the
            captured program: guesses and corrections are fitted to the trained model, and "auto"
            families are chosen by their error within the budget (`docs/convert.md`).
        cache: Whether to read and write a cache of measured seconds
            (`pnn_compile.forecast.timing_cache` says where); or the folder of that cache.
        passes: The passes between capture and calibration, in order; `passes.pipeline.insert` adds
            a pass of your own between two others.
        debug: Whether to verify every graph between passes.
        progress: Called with the name of the pass that starts.
        **choices: The same options by their names (`stages=4, coarse="units"`), instead of
            `options` or in addition: they replace what is set there.

    Returns:
        The compiled network; `compiled.module` runs and trains.

    Raises:
        OptionError: An option is unknown or out of range.
        CaptureError: The model cannot be captured as a graph, or fails on the example inputs.
        PartitionError: It cannot be cut into that many stages, or does not fit the devices.
        SynthesisError: No preprocessing operator or coarse propagator exists for an interface.
        ArtifactError: `plan` belongs to another model, or was edited and is inconsistent.
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
    timings = TimingCache.of(cache)
    start = Compilation(
        model=model, args=args, kwargs=kwargs, dynamic=dynamic, validate=validate, measure=timings
    )
    compilation, results = run_passes(start, [CAPTURE], check=debug, progress=progress)
    program = compilation.program
    assert program is not None
    replanned = options if plan is None else options_to_replan(program, plan)
    if plan is not None and replanned is None:
        from pnn_compile.artifact.check_plan import check_states

        check_states(program, plan)
        compilation, passes = replace(compilation, plan=plan), REPLAY
    else:
        compilation = replace(compilation, options=replanned)
    if calibration is not None:
        samples = calibration(program) if callable(calibration) else calibration
        from pnn_compile.fit.calibrate import CALIBRATE

        compilation, passes = replace(compilation, samples=samples), (*passes, CALIBRATE)
    if replanned is not None and replanned.counted().tolerance is not None:
        from pnn_compile.evaluate.iterate import ITERATE

        passes = (*passes, ITERATE)
    compilation, more = run_passes(compilation, passes, check=debug, progress=progress)
    compiled = gather(compilation, (*results, *more))
    check_length(program, compiled.module)
    return replace(compiled, timings=None if replanned is None else timings.path)


def load(path: str | Path, model: nn.Module | None = None) -> Compiled:
    """Load an artifact directory, on the CPU; nothing is unpickled and no code of it runs.

    Args:
        path: The directory.
        model: The model, for an artifact whose program could not be stored: the plan is replayed
            over a copy of it, into which the stored weights are loaded.

    Raises:
        ArtifactError: The directory is not an artifact, a file is missing or damaged, or the model
            is not the one that the plan was made for.
    """
    from pnn_compile.artifact.directory import load as load_artifact

    return load_artifact(path, model)


def compile_program(program: Program, options: Options) -> Compiled:
    """Compile a program that was captured before; `compile` says what is raised."""
    return gather(*run_passes(Compilation(program=program, options=options), COMPILE))


def gather(compilation: Compilation, results: tuple[PassResult, ...]) -> Compiled:
    """Collect the results of a finished compilation."""
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
