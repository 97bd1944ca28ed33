"""`Options` of a compilation, checked as early as possible.

The command line makes its options from this file before torch is imported, which takes seconds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import fields as _fields
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from passes.errors import OptionError

if TYPE_CHECKING:
    from passes.analysis.analysis import CostSource
    from passes.coarse.spec import OperatorRole
    from passes.cost.device_profile import DeviceProfile

_MOST_COPIED = 0.25
"""Largest share of the first layers that calibration copies by default."""

_FIT_BUDGET = 0.05
"""Coarse budget of calibration by default."""
_TOLERANCE = 0.01
"""Default tolerance of iterations="auto"."""

CHOICES = {"correction": ("residual", "difference"), "sweep": ("chain", "collapsed", "auto")}
"""Options that are one of a few words, and those words."""


class Choices(TypedDict, total=False):
    """The options by name, as `pnn.compile` takes them; `Options` describes each."""

    stages: int | Literal["auto"]
    cost: CostSource
    cuts: Iterable[str] | None
    cut_inside_blocks: bool
    coarse: str
    coarse_budget: float | None
    coarse_width: float | None
    units: int
    rank: int
    preprocess: str
    prologue: float | None
    correction: Literal["residual", "difference"]
    sweep: Literal["chain", "collapsed", "auto"]
    iterations: int | Literal["auto"]
    tolerance: float | None
    windows: int
    devices: DeviceProfile | Sequence[DeviceProfile] | None
    seed: int


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of one compilation.

    Attributes:
        stages: Number N of stages, or "auto" for the smallest number whose predicted time is
            within 5 % of the best.
        cost: "flops"; seconds on this machine, "measured" of a training step with its optimizer or
            "measured-forward" of the forward pass alone; seconds on a device by its profile,
            "roofline" and "roofline-forward"; or a callable from a node and its forward FLOPs to
            a cost.
        cuts: Names of the nodes or modules that start stages 1 to N - 1; None to search.
        cut_inside_blocks: Whether the search may also cut inside a block: between a convolution or
            matrix product and its normalization, activation and dropout, or within a residual
            unit. It does so in any case if there are too few blocks. `cuts` may name any legal
            place.
        coarse: Family of the coarse propagators: "units", fresh copies of the repeating block;
            "layers", of the last layers of a stage, also where several tensors cross; "thinned",
            every m-th block of the trained trunk; "linear", channels mixed at every position;
            "lowrank", a map of small rank between whole states; "conv", two small convolutions or
            linear layers that start at zero; "time_step", the step of a loop in time itself, at a
            larger step; "identity", the state itself, or a channel map where it changes its type;
            "zero", no correction; "exact", the fine stage itself, the oracle; a sum such as
            "linear+lowrank"; or "auto", the family that kept most accuracy in training, and
            "time_step" in a loop.
        coarse_budget: Largest share of the cost of the original that the coarse sweep may take.
            None: "auto" takes the family that kept most accuracy, at its price, and calibration
            chooses within 5 %.
        coarse_width: Share of the channels at which the copies of family "units" or "layers" work,
            between a reduction and an expansion, beside a shortcut. None: all, or for "auto" a
            quarter where all would cost more than the stage or a `coarse_budget`.
        units: Number N_c of copies of the repeating block in a coarse propagator of family "units";
            for family "thinned", the number of repeated blocks of a stage to keep.
        rank: Rank of family "lowrank".
        preprocess: Family of the preprocessing operators: "convolution", a strided convolution
            from an image; "narrow", a copy of all layers before the interface at few channels;
            "linear", "lowrank", "conv", "thinned", "time_step" or "identity" as above; a sum; or
            "auto", the convolution where it fits and else the channel map.
        prologue: Largest share of the cost of the original that a preprocessing operator may spend
            on a copy of the first layers, to read their output instead of the input, or on a
            thinned or narrow copy of all layers before its interface (`preprocess="thinned"`,
            `"narrow"`). None: no copy; a tenth for "thinned"; for "narrow" too, or half an even
            stage where that is less; with calibration samples, up to the coarse budget if the copy
            lowers the error.
        correction: "residual" (the paper; for training) or "difference" (classical parareal), which
            the coarse steps of a loop in time take in any case.
        sweep: "chain", from stage to stage; "collapsed": every residual straight to the last state
            through a map of its own, all of them at once; or "auto", the faster one by the
            step-time model if the coarse propagators of the chain are linear, for which the two
            are as accurate, else the chain.
        iterations: Number K of parareal iterations; "auto" for as many as the tolerance takes.
        tolerance: Largest estimated relative error of the last state, of every sample. The plan
            takes the K that the example inputs need; calls of the compiled network take as many
            iterations as their inputs need. Default for iterations="auto": 0.01.
        windows: Number W of windows: the trunk is cut into W runs of N stages, one run after
            another on the same N devices. The guesses of a run are made from the state before it,
            so that more windows keep more of a trained network, and devices wait for each other
            more often. For chains of one iteration.
        devices: One profile for all devices, or one each for at least as many devices as stages;
            their memory and links count. Empty: equal devices, with free links and memory.
        seed: Seed of the initial weights of the coarse networks.

    Raises:
        OptionError: A value is unknown, or out of range.
    """

    stages: int | Literal["auto"] = "auto"
    cost: CostSource = "flops"
    cuts: tuple[str, ...] | None = None
    cut_inside_blocks: bool = False
    coarse: str = "auto"
    coarse_budget: float | None = None
    coarse_width: float | None = None
    units: int = 1
    rank: int = 32
    preprocess: str = "auto"
    prologue: float | None = None
    correction: str = "residual"
    sweep: str = "chain"
    iterations: int | Literal["auto"] = 1
    tolerance: float | None = None
    windows: int = 1
    devices: tuple[DeviceProfile, ...] = ()
    seed: int = 0

    @classmethod
    def of(cls, options: Options | None, choices: Mapping[str, Any]) -> Options:
        """Override options by name.

        A device or a list of devices becomes a tuple. With devices, the default cost is "roofline"
        instead of "flops".

        Args:
            options: The options to start from; None for the defaults.
            choices: Values by the names of options.

        Raises:
            OptionError: An option is unknown, or a value out of range.
        """
        base = options or cls()
        fields: dict[str, Any] = {field.name: getattr(base, field.name) for field in _fields(cls)}
        if "dynamic_batch" in choices:
            raise OptionError(
                "dynamic_batch is now part of dynamic: write dynamic=() for batches of the "
                "example's size alone, or leave it out"
            )
        if unknown := sorted(choices.keys() - fields.keys()):
            raise OptionError(f"unknown option {unknown[0]!r}; known: {', '.join(fields)}")
        fields |= choices
        devices, cuts = fields["devices"], fields["cuts"]
        several = devices is None or (
            isinstance(devices, Iterable) and not isinstance(devices, str)
        )
        fields["devices"] = tuple(devices or ()) if several else (devices,)
        if fields["devices"] and fields["cost"] == "flops":
            fields["cost"] = "roofline"
        if isinstance(cuts, Iterable) and not isinstance(cuts, str):
            fields["cuts"] = tuple(cuts)
        return cls(**fields)

    def changed(self) -> list[str]:
        """Return the names of the options that differ from the defaults."""
        return [f.name for f in _fields(type(self)) if getattr(self, f.name) != f.default]

    def __post_init__(self) -> None:
        from passes.analysis.analysis import MEASURED, ROOFLINE

        _check_family("coarse", self.coarse)
        _check_family("preprocess", self.preprocess)
        _at_least("rank", self.rank, 1)
        _among("correction", self.correction, CHOICES["correction"])
        if not callable(self.cost):
            _among("cost", self.cost, ("flops", *MEASURED, *ROOFLINE))
        if self.stages != "auto":
            _at_least("stages", self.stages, 1)
        if self.iterations != "auto":
            _at_least("iterations", self.iterations, 1)
        limit: object = self.tolerance
        if limit is not None and (not isinstance(limit, int | float) or not 0 < limit < math.inf):
            raise OptionError(f"tolerance must be a number above 0 (got {limit!r})")
        _at_least("units", self.units, 1, most=1000)  # every copy is built
        _at_least("seed", self.seed, 0, most=2**63 - 1)
        inside: object = self.cut_inside_blocks
        if not isinstance(inside, bool):
            raise OptionError(f"cut_inside_blocks must be True or False (got {inside!r})")
        for name in ("coarse_budget", "coarse_width"):
            if getattr(self, name) is not None:
                _share(name, getattr(self, name))
        first: object = self.prologue
        if first is not None and (not isinstance(first, int | float) or not 0 <= first < 1):
            raise OptionError(f"prologue must be a share from 0 to below 1 (got {first!r})")
        _among("sweep", self.sweep, CHOICES["sweep"])
        if self.sweep == "collapsed":
            self._check_collapsed()
        _at_least("windows", self.windows, 1)
        if self.windows > 1:
            self._check_windows()
        if self.devices:
            self._check_devices()
        cuts: object = self.cuts
        if cuts is not None and not (
            isinstance(cuts, list | tuple) and all(isinstance(name, str) for name in cuts)
        ):
            raise OptionError(f"cuts must be a list of names of modules (got {cuts!r})")
        if self.cuts is not None and self.stages != "auto":
            asked = self.stages * self.windows
            if asked != self.num_stages:
                inside = f" in {self.windows} windows" if self.windows > 1 else ""
                raise OptionError(
                    f"{len(self.cuts)} cuts make {self.num_stages} stages, but stages is "
                    f"{self.stages}{inside}: leave stages out or name {asked - 1} cuts"
                )

    def calibrated(self) -> Options:
        """Return the options for a compilation with samples: `prologue` may copy first layers."""
        if self.prologue is not None or self.preprocess != "auto":
            return self
        return dataclasses.replace(self, prologue=min(self.fit_budget, _MOST_COPIED))

    @property
    def fit_budget(self) -> float:
        """The share of the cost of the original within which calibration chooses families."""
        return _FIT_BUDGET if self.coarse_budget is None else self.coarse_budget

    @property
    def num_stages(self) -> int | None:
        """The number of stages of all windows that was asked for, or cut; None if neither."""
        if self.cuts is not None:
            return len(self.cuts) + 1
        return None if self.stages == "auto" else self.stages * self.windows

    def counted(self) -> Options:
        """Return the options with one iteration where the tolerance decides how many."""
        if self.iterations != "auto" and self.tolerance is None:
            return self
        tolerance = _TOLERANCE if self.tolerance is None else self.tolerance
        return dataclasses.replace(self, iterations=1, tolerance=tolerance)

    @property
    def count(self) -> int:
        """The number of iterations; 1 where the tolerance decides."""
        return 1 if self.iterations == "auto" else self.iterations

    @property
    def training(self) -> bool:
        """Whether the costs and the memory are those of a training step, not of inference."""
        return self.cost not in ("measured-forward", "roofline-forward")

    def _check_devices(self) -> None:
        from passes.analysis.analysis import MEASURED, ROOFLINE
        from passes.cost.device_profile import DeviceProfile

        for device in self.devices:
            if not isinstance(device, DeviceProfile):
                raise OptionError(
                    f"devices must be profiles, as of pnn.load_profile('h100') (got {device!r})"
                )
        if not isinstance(self.cost, str) or self.cost not in (*MEASURED, *ROOFLINE):
            raise OptionError(
                "devices need costs in seconds: cost='roofline' or 'measured', or either with "
                f"'-forward' for inference (got {self.cost!r})"
            )
        if len({device.name for device in self.devices}) < len(set(self.devices)):
            raise OptionError("devices that differ need names that differ")
        if len(set(self.devices)) > 1 and self.cost in MEASURED:
            raise OptionError(
                f"cost={self.cost!r} is of this machine, but the devices differ: use "
                "cost='roofline'"
            )
        if self.stages != "auto" and 1 < len(self.devices) < self.stages:
            raise OptionError(
                f"{self.stages} stages need a device each (devices={len(self.devices)}): list "
                "more devices, one profile for all, or ask for fewer stages"
            )

    def _check_windows(self) -> None:
        from passes.coarse.family import in_time, starts_anywhere

        if self.cuts is not None and (len(self.cuts) + 1) % self.windows:
            raise OptionError(
                f"{len(self.cuts)} cuts make {len(self.cuts) + 1} stages, which {self.windows} "
                "windows do not divide"
            )
        if self.sweep != "chain" or self.count != 1 or self.tolerance is not None:
            raise OptionError("windows need sweep='chain', iterations=1 and no tolerance")
        if self.devices:
            raise OptionError("windows are cut for equal devices: leave devices= out")
        if in_time(self.coarse) or in_time(self.preprocess):
            raise OptionError(
                "the coarse steps of a loop in time take iterations, not windows: leave windows out"
            )
        if not starts_anywhere(self.preprocess):
            raise OptionError(
                f"preprocess={self.preprocess!r} guesses from the inputs, and windows from the "
                "state before them: use preprocess='auto', 'linear' or 'identity'"
            )

    def _check_collapsed(self) -> None:
        from passes.coarse.family import FAMILIES, names_of

        rows = ((name, FAMILIES[name]) for name in names_of("coarse"))
        families = ("auto", *(name for name, row in rows if "collapsed" in row.sweeps))
        if not set(self.coarse.split("+")) <= set(families):
            raise OptionError(
                f"sweep='collapsed' needs maps of its own, of family {', '.join(families)} "
                f"(got coarse={self.coarse!r})"
            )
        if self.correction != "residual" or self.iterations != 1 or self.tolerance is not None:
            raise OptionError("sweep='collapsed' exists in residual form with one iteration only")


def _among(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise OptionError(f"unknown {name} ({value!r}); choose one of: {', '.join(allowed)}")


def _share(name: str, value: object) -> None:
    if not isinstance(value, int | float) or not 0 < value <= 1:
        raise OptionError(f"{name} must be a share above 0 and at most 1 (got {value!r})")


def _check_family(role: OperatorRole, family: str) -> None:
    from passes.coarse.family import names_of

    parts, sums = str(family).split("+"), names_of(role, summed=True)
    if len(parts) == 1:
        _among(role, family, ("auto", *names_of(role)))
    elif len(set(parts)) < len(parts) or not set(parts) <= set(sums):
        raise OptionError(
            f"{role} can only sum different ones of: {', '.join(sums)} (got {family!r})"
        )


def _at_least(name: str, value: object, least: int, most: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise OptionError(f"{name} must be a whole number of at least {least} (got {value!r})")
    if most is not None and value > most:
        raise OptionError(f"{name} must be at most {most} (got {value!r})")
