"""Forecast the time of a step on N devices before any network is built or device bought.

Devices are profiles: built-in ones from `devices/`, or files of users.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from torch import nn

from passes.analysis.analysis import Analysis, analyze
from passes.capture.ladder import capture
from passes.cost.device_profile import DeviceProfile, read_profile
from passes.cost.node_facts import observe
from passes.errors import OptionError, PartitionError, SynthesisError, first_line, why
from passes.options import Options
from pnn_compile.compiled import Compiled
from pnn_compile.forecast.compare_methods import (
    DeviceCosts,
    data_parallel_row,
    parareal_row,
    pipeline_row,
    takes_coarse_steps,
)
from pnn_compile.forecast.table import PARAREAL, ForecastRow, ForecastTable
from pnn_compile.forecast.timing_cache import TimingCache
from pnn_compile.inputs import batch_size, example

_COSTS = ("flops", "roofline", "measured")
_SUFFIX = ".toml"
_FOLDER = files(__package__) / "devices"


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

    The model is analyzed once. Times are simulated from the instruction lists that the ranks would
    run (`pnn_compile.runtime.simulate`).

    Args:
        model: Any module, or a compiled network.
        example_inputs: As in `compile`; not for a compiled network.
        args: Positional arguments, instead of `example_inputs`.
        kwargs: Keyword arguments, instead of `example_inputs` or with `args`.
        stages: Numbers N of devices, one stage each.
        devices: The profile of all devices, or a list with the profile of each; their links and
            memory count. None: this machine, with free links.
        cost: "roofline" (seconds of the first device's profile; the default where devices are
            given), "measured" (seconds on this machine; the default otherwise) or "flops".
        training: Whether a step is a training step; else the forward pass alone.
        sweeps: Sweeps of the parareal networks: "chain", "collapsed" or both.
        micro_batches: Numbers of micro-batches of the pipelines to compare; may be empty.
        progress: Called with a description of the work that starts.
        cache: Whether to cache measured seconds, or the folder, as in `compile`.
        options: Options of the parareal networks: `coarse`, `windows`, `units` and so on.

    Returns:
        A row for every method and number of devices.

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
    analysis, network_options = _analysis(
        model, example_inputs, args, kwargs, cost, training, profiles, progress, timings, options
    )
    batch = batch_size(analysis.program.args)
    costs = DeviceCosts(analysis, network_options, training, batch, profiles)
    loop = takes_coarse_steps(costs, counts[0])
    if loop and "chain" in sweeps:
        sweeps = ("chain",)
    rows, problems = _rows(costs, counts, sweeps, micro_batches, progress)
    if not rows:
        raise OptionError("nothing can be forecast: " + "; ".join(problems))
    return ForecastTable(
        model=analysis.program.name,
        cost=cost,
        unit=analysis.unit,
        training=training,
        batch=batch,
        devices=tuple(dict.fromkeys(profile.name for profile in profiles)),
        sequential=costs.sequential,
        rows=tuple(rows),
        problems=tuple(problems),
        notes=_notes(costs, timings, model, loop),
        windows=network_options.windows,
    )


def _counts(stages: Iterable[int]) -> list[int]:
    counts = sorted(set(stages))
    invalid = [n for n in counts if n < 1]
    if invalid or not counts:
        raise OptionError(f"stages must be whole numbers of at least 1 (got {invalid or 'none'})")
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
    if invalid := [m for m in micro_batches if m < 1]:
        raise OptionError(f"micro_batches must be at least 1 (got {invalid})")


def _within(counts: list[int], profiles: Sequence[DeviceProfile]) -> list[int]:
    possible = [n for n in counts if n <= len(profiles)]
    if not possible:
        raise OptionError(
            f"{len(profiles)} devices cannot hold {min(counts)} stages: list more devices, or ask "
            "for fewer stages"
        )
    return possible


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
        program = capture(model, *example(model, example_inputs, args, kwargs))
    # Windows are cut for equal devices; their links and their memory count in the simulation.
    equal = options.get("windows", 1) > 1 and len(set(profiles)) == 1
    devices = tuple(profiles) if cost != "flops" and not equal else ()
    network_options = Options(cost=source, devices=devices, **options)
    progress("measuring" if cost == "measured" else "analyzing")
    profile = profiles[0] if profiles else None
    return analyze(program, observe(program), source, profile, timings), network_options


def _rows(
    costs: DeviceCosts,
    counts: Sequence[int],
    sweeps: Sequence[str],
    micro_batches: Sequence[int],
    progress: Callable[[str], object],
) -> tuple[list[ForecastRow], list[str]]:
    methods: dict[str, Callable[[int], ForecastRow]] = {}
    for sweep in sweeps:
        methods[sweep] = partial(parareal_row, costs, sweep)
    for batches in micro_batches:
        methods[f"gpipe:{batches}"] = partial(pipeline_row, costs, batches)
    methods["ddp"] = partial(data_parallel_row, costs)
    rows, problems = [], []
    for method, make_row in methods.items():
        missing, reason = [], ""
        for count in counts:
            progress(f"{method}, {count} devices")
            try:
                rows.append(make_row(count))
            except (OptionError, PartitionError, SynthesisError) as error:
                reason = reason or first_line(error)
                missing.append(count)
        if missing:
            problems.append(
                f"no {method} at {len(missing)} of {len(counts)} numbers of devices, from "
                f"{missing[0]} on: {reason}"
            )
    return rows, problems


def _notes(
    costs: DeviceCosts, timings: TimingCache, model: nn.Module | Compiled, loop: bool
) -> tuple[str, ...]:
    notes = []
    if loop and costs.training:
        notes.append(
            "ranks run a loop in time, and do not train it: training=False (--inference) predicts "
            "what they run"
        )
    if isinstance(model, Compiled) and model.plan.windows != costs.options.windows:
        notes.append(
            f"windows: {costs.options.windows} in these rows, {model.plan.windows} in the network"
        )
    if timings.path is not None:
        notes.append(
            f"timings are cached in {timings.path}; cache=False (--no-cache) measures them again"
        )
    if not costs.linked:
        notes.append("links are free: pass devices to include them")
    if costs.batch == 1:
        notes.append("a batch of one sample has no shares for pipelines and data parallelism")
    return tuple(notes)


def built_in_profiles() -> tuple[str, ...]:
    """Return the names of the built-in profiles; their files name the sources of all figures."""
    names = (entry.name for entry in _FOLDER.iterdir())
    return tuple(sorted(name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX)))


def load_profile(source: str | Path) -> DeviceProfile:
    """Read a device profile.

    Args:
        source: The name of a built-in profile ("h100"), or the path of a TOML file.

    Raises:
        OptionError: There is no such profile, or it is incomplete.
    """
    name = str(source)
    if name.lower() in built_in_profiles():
        text = _FOLDER.joinpath(f"{name.lower()}{_SUFFIX}").read_text(encoding="utf-8")
        return read_profile(text, f"the built-in profile {name!r}")
    path = Path(source)
    if path.suffix != _SUFFIX and not path.is_file():
        raise OptionError(
            f"no built-in device profile is called {name!r}: take one of "
            f"{', '.join(built_in_profiles())}, or a file ending in {_SUFFIX} that `pnn-compile "
            "profile -o FILE` writes"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise OptionError(f"{name} cannot be read: {why(error)}") from error
    except UnicodeDecodeError as error:
        raise OptionError(f"{name} is not the text of a device profile: {error}") from error
    return read_profile(text, f"the device profile {name!r}")
