"""`forecast`: what a model would take on N devices, before any of it is built or bought."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from passes.analysis.analysis import Analysis, analyze
from passes.capture.ladder import capture
from passes.cost.device_profile import DeviceProfile
from passes.cost.node_facts import observe
from passes.errors import OptionError, PartitionError, SynthesisError
from passes.options import Options
from pnn_compile.compiled import Compiled
from pnn_compile.forecast.compare_methods import data_parallel_row, pipeline_row
from pnn_compile.forecast.parareal import parareal_row
from pnn_compile.forecast.setting import Setting
from pnn_compile.forecast.table import PARAREAL, ForecastRow, ForecastTable
from pnn_compile.forecast.timing_cache import TimingCache
from pnn_compile.inputs import batch_size, example

__all__ = ["ForecastRow", "ForecastTable", "forecast"]

_COSTS = ("flops", "roofline", "measured")


def forecast(
    model: nn.Module | Compiled,
    example_inputs: Any = None,
    *,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    stages: Iterable[int] = range(2, 65),
    devices: DeviceProfile | Sequence[DeviceProfile] | None = None,
    cost: str | None = None,
    training: bool = True,
    sweeps: Sequence[str] = PARAREAL,
    micro_batches: Sequence[int] = (4,),
    progress: Callable[[str], object] = lambda _: None,
    cache: bool | str | Path = True,
    **options: Any,
) -> ForecastTable:
    """Forecast a step on numbers of devices: parareal networks, pipelines, data parallelism.

    The model is analysed once. Every time is what the simulator gives for the instruction lists
    that the ranks would run (`pnn_compile.runtime.simulate`).

    Args:
        model: Any module, or a compiled network.
        example_inputs: As in `compile`; not for a compiled network.
        args: Positional arguments, instead of `example_inputs`.
        kwargs: Keyword arguments, instead of `example_inputs` or with `args`.
        stages: Numbers N of devices, one stage each.
        devices: The profile of every device, or a list of profiles, as many as there are devices
            at most; their links and memory count. None: this machine, with links that are free.
        cost: "roofline" (seconds of the first device's profile; the default where devices are
            given), "measured" (seconds on this machine; the default else) or "flops".
        training: Whether a step trains, forward and backward; else the forward pass alone.
        sweeps: Which parareal networks: "chain", "collapsed" or both.
        micro_batches: Numbers of micro-batches of the pipelines to set beside; may be empty.
        progress: Called with what is being done.
        cache: Whether to keep measured seconds, or where, as in `compile`.
        options: How networks are compiled: `coarse`, `coarse_budget`, `units` and so on.

    Raises:
        OptionError: A value is unknown or out of range, or nothing could be forecast.
        CaptureError: The model cannot be captured as a graph, or fails on the example inputs.
    """
    counts = _counts(stages)
    profiles = (devices,) if isinstance(devices, DeviceProfile) else tuple(devices or ())
    cost = cost or ("roofline" if profiles else "measured")
    _check(cost, profiles, sweeps, micro_batches)
    if not isinstance(devices, DeviceProfile) and profiles:
        counts = _within(counts, profiles)
    progress("capturing")
    timings = TimingCache.of(cache)
    analysis, wanted = _analysis(
        model, example_inputs, args, kwargs, cost, training, profiles, progress, timings, options
    )
    batch = batch_size(analysis.program.args)
    setting = Setting(analysis, wanted, training, batch, profiles)
    rows, problems = _rows(setting, counts, sweeps, micro_batches, progress)
    if not rows:
        raise OptionError("nothing can be forecast: " + "; ".join(problems))
    return ForecastTable(
        model=analysis.program.name,
        cost=cost,
        unit=analysis.unit,
        training=training,
        batch=batch,
        devices=tuple(dict.fromkeys(profile.name for profile in profiles)),
        sequential=setting.sequential,
        rows=tuple(rows),
        problems=tuple(problems),
        notes=_notes(setting, timings),
    )


def _counts(stages: Iterable[int]) -> list[int]:
    counts = sorted(set(stages))
    wrong = [n for n in counts if n < 1]
    if wrong or not counts:
        raise OptionError(f"stages must be whole numbers of at least 1 (got {wrong or 'none'})")
    return counts


def _check(
    cost: str,
    profiles: Sequence[DeviceProfile],
    sweeps: Sequence[str],
    micro_batches: Sequence[int],
) -> None:
    if cost not in _COSTS:
        raise OptionError(f"unknown cost ({cost!r}); choose one of: {', '.join(_COSTS)}")
    if cost == "roofline" and not profiles:
        raise OptionError(
            "cost='roofline' needs a device: devices=pnn.load_profile('h100'), or a file that "
            "`pnn-compile profile -o FILE` writes"
        )
    if unknown := set(sweeps) - set(PARAREAL):
        raise OptionError(f"sweeps are {', '.join(PARAREAL)} (got {', '.join(sorted(unknown))})")
    if wrong := [m for m in micro_batches if m < 1]:
        raise OptionError(f"micro_batches must be at least 1 (got {wrong})")


def _within(counts: list[int], profiles: Sequence[DeviceProfile]) -> list[int]:
    kept = [n for n in counts if n <= len(profiles)]
    if not kept:
        raise OptionError(
            f"{len(profiles)} devices cannot hold {min(counts)} stages: list more devices, or ask "
            "for fewer stages"
        )
    return kept


def _analysis(
    model: nn.Module | Compiled,
    example_inputs: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    cost: str,
    training: bool,
    profiles: Sequence[DeviceProfile],
    progress: Callable[[str], object],
    timings: TimingCache,
    options: dict[str, Any],
) -> tuple[Analysis, Options]:
    source: Any = cost if training or cost == "flops" else f"{cost}-forward"
    if isinstance(model, Compiled):
        options = {"correction": model.plan.correction} | options
        if cost == "flops":
            return model.analysis, Options(cost=source, **options)
        program = model.current_program()
    else:
        given, named = example(model, example_inputs, args, kwargs)
        program = capture(model, given, named)
    devices = tuple(profiles) if cost != "flops" else ()
    wanted = Options(cost=source, devices=devices, **options)
    progress("measuring" if cost == "measured" else "analysing")
    profile = profiles[0] if profiles else None
    return analyze(program, observe(program), source, profile, timings), wanted


def _rows(
    setting: Setting,
    counts: Sequence[int],
    sweeps: Sequence[str],
    micro_batches: Sequence[int],
    progress: Callable[[str], object],
) -> tuple[list[ForecastRow], list[str]]:
    makers: dict[str, Callable[[int], ForecastRow]] = {}
    for sweep in sweeps:
        makers[sweep] = partial(parareal_row, setting, sweep)
    for batches in micro_batches:
        makers[f"gpipe:{batches}"] = partial(pipeline_row, setting, batches)
    makers["ddp"] = partial(data_parallel_row, setting)
    rows, problems = [], []
    for method, make in makers.items():
        missing, reason = [], ""
        for count in counts:
            progress(f"{method}, {count} devices")
            try:
                rows.append(make(count))
            except (OptionError, PartitionError, SynthesisError) as error:
                reason = reason or str(error).splitlines()[0]
                missing.append(count)
        if missing:
            problems.append(
                f"no {method} at {len(missing)} of {len(counts)} numbers of devices, from "
                f"{missing[0]} on: {reason}"
            )
    return rows, problems


def _notes(setting: Setting, timings: TimingCache) -> tuple[str, ...]:
    found = []
    if timings.path is not None:
        found.append(f"timings are kept in {timings.path}; without it they are measured anew")
    if not setting.linked:
        found.append("links are free: name devices to count them")
    if setting.batch == 1:
        found.append("a batch of one sample has no shares for pipelines and data parallelism")
    return tuple(found)
