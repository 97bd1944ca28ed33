"""What is known of a device: how fast it computes, reads, launches and talks to its neighbour."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from passes.errors import OptionError

__all__ = ["DeviceProfile", "read_profile", "write_profile"]

_DEFAULT = "float32"
_MAY_BE_ZERO = ("launch", "link_latency")
_UNITS = {
    "bandwidth": "bytes per second of memory",
    "launch": "seconds per operator",
    "memory": "bytes",
    "link_bandwidth": "bytes per second between two devices, each way",
    "link_latency": "seconds per message",
}


@dataclass(frozen=True, kw_only=True)
class DeviceProfile:
    """Figures of one device, and of the link to its neighbours.

    Attributes:
        name: What to call it.
        flops: FLOP/s of matrix products by dtype ("float32", "bfloat16", ...); a dtype that is not
            listed runs at the rate of float32, which must be.
        bandwidth: Bytes per second that its memory reads and writes.
        launch: Seconds that every operator takes at least.
        memory: Bytes it holds.
        link_bandwidth: Bytes per second to another device, each way.
        link_latency: Seconds that a message takes at least.
        asynchronous: Whether operators are launched ahead, so that the launch of one hides behind
            the work of another (GPUs); else it comes on top.

    Raises:
        OptionError: A figure is missing, no number or not positive.
    """

    name: str
    flops: Mapping[str, float] = field(hash=False)
    bandwidth: float
    launch: float
    memory: float
    link_bandwidth: float
    link_latency: float
    asynchronous: bool = False

    def __post_init__(self) -> None:
        name: object = self.name
        rates: object = self.flops
        if not isinstance(name, str) or not name.strip():
            raise OptionError(f"a device profile needs a name ({name!r})")
        if not isinstance(rates, Mapping) or _DEFAULT not in rates:
            raise OptionError(
                f"the device profile {self.name!r} needs FLOP/s of {_DEFAULT} at least "
                f"(flops={self.flops!r}): other dtypes run at that rate unless they are listed"
            )
        for dtype, rate in self.flops.items():
            self._check(f"flops.{dtype}", rate, zero=False)
        for key in _UNITS:
            self._check(key, getattr(self, key), zero=key in _MAY_BE_ZERO)
        ahead: object = self.asynchronous
        if not isinstance(ahead, bool):
            raise OptionError(
                f"asynchronous is true or false ({ahead!r}) in device profile {self.name!r}"
            )
        object.__setattr__(self, "flops", dict(self.flops))

    def _check(self, key: str, value: object, *, zero: bool) -> None:
        if (
            not isinstance(value, int | float)
            or isinstance(value, bool)
            or math.isnan(value)
            or value < 0
            or (value == 0 and not zero)
        ):
            kind = "a number, 0 or more" if zero else "a positive number"
            raise OptionError(f"{key} must be {kind} ({value!r}) in device profile {self.name!r}")
        if zero and math.isinf(value):
            raise OptionError(f"{key} must be finite in device profile {self.name!r}")

    def rate(self, dtype: str) -> float:
        """FLOP/s of a dtype, by its name with or without `torch.` in front."""
        return self.flops.get(dtype.removeprefix("torch."), self.flops[_DEFAULT])

    def seconds(
        self, flops: float, moved: float, dtype: str = _DEFAULT, operators: float = 1
    ) -> float:
        """Seconds of operators by the roofline model (Williams et al. 2009), with their launches.

        Args:
            flops: FLOPs they compute.
            moved: Bytes they read and write.
            dtype: Name of the dtype they compute in.
            operators: How many they are.
        """
        work = max(flops / self.rate(dtype), moved / self.bandwidth)
        launch = operators * self.launch
        return max(work, launch) if self.asynchronous else work + launch

    def transfer(self, size: float) -> float:
        """Seconds of a message of so many bytes to another device."""
        return self.link_latency + size / self.link_bandwidth


def read_profile(text: str, origin: str) -> DeviceProfile:
    """Read a profile from the text of a TOML file.

    Args:
        text: The text.
        origin: Where it is from, for messages.

    Raises:
        OptionError: It is no TOML, or not a whole profile.
    """
    try:
        found: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise OptionError(f"{origin} is no TOML: {error}") from error
    known = {each.name for each in fields(DeviceProfile)}
    missing = sorted(known - found.keys() - {"asynchronous"})
    if missing or found.keys() - known:
        unknown = ", ".join(sorted(found.keys() - known)) or "none"
        raise OptionError(
            f"{origin} is no device profile (missing: {', '.join(missing) or 'none'}; unknown: "
            f"{unknown}): `pnn-compile profile -o FILE` writes one to start from"
        )
    try:
        return DeviceProfile(**found)
    except OptionError as error:
        raise OptionError(f"{origin}: {error}") from error


def write_profile(profile: DeviceProfile) -> str:
    """Write a profile as the text of a TOML file, which `read_profile` reads back the same."""
    lines = [f"name = {_quoted(profile.name)}"]
    if profile.asynchronous:
        lines.append("asynchronous = true  # launches hide behind the work of other operators")
    lines += [f"{key} = {_number(getattr(profile, key))}  # {unit}" for key, unit in _UNITS.items()]
    lines += ["", "[flops]  # per second, by dtype"]
    lines += [f"{_key(dtype)} = {_number(rate)}" for dtype, rate in profile.flops.items()]
    return "\n".join([*lines, ""])


def _key(text: str) -> str:
    return text if text.isascii() and text.isidentifier() else _quoted(text)


def _number(value: float) -> str:
    return repr(float(value))


def _quoted(text: str) -> str:
    escaped = "".join(
        f"\\u{ord(c):04x}" if ord(c) < 0x20 or ord(c) == 0x7F else f"\\{c}" if c in '"\\' else c
        for c in text
    )
    return f'"{escaped}"'
