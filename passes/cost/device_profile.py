"""Device profiles: rates of a device, read from and written to TOML, and seconds of nodes by them.

A program is costed on a device that is not at hand by the roofline model (`roofline_costs`).

>>> profile = DeviceProfile(
...     name="example", flops={"float32": 1e9}, bandwidth=1e8, launch=1e-3, memory=1e9,
...     link_bandwidth=1e7, link_latency=1e-4,
... )
>>> profile.seconds(flops=1e9, moved=0)  # compute-bound: 1 s and one launch
1.001
>>> profile.seconds(flops=10, moved=2e8)  # memory-bound
2.001
>>> read_profile(write_profile(profile), "text") == profile
True
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch import fx

from passes.cost.flops import NodeCost
from passes.errors import OptionError
from passes.ir.observer import Fact

_DEFAULT_DTYPE = "float32"
_MAY_BE_ZERO = ("launch", "link_latency", "network_latency")
_UNITS = {
    "bandwidth": "bytes per second of memory",
    "launch": "seconds per operator",
    "memory": "bytes",
    "link_bandwidth": "bytes per second between two devices, each way",
    "link_latency": "seconds per message",
}
_NETWORK_UNITS = {
    "network_bandwidth": "bytes per second between two nodes, each way, per device",
    "network_latency": "seconds per message between two nodes",
}
_BACKWARD_FACTOR = 2
"""Operators and bytes of the backward pass per one of the forward pass: a gradient per operand."""


@dataclass(frozen=True, kw_only=True)
class DeviceProfile:
    """Rates of one device and of the links to its neighbors.

    Attributes:
        name: Name for reports.
        flops: FLOP/s of matrix products by dtype ("float32", "bfloat16", ...). "float32" is
            required; dtypes that are not listed run at its rate.
        bandwidth: Bytes per second of reads and writes of its memory.
        launch: Seconds to launch one operator.
        memory: Size of its memory in bytes.
        link_bandwidth: Bytes per second to another device, in each direction.
        link_latency: Seconds per message, besides its bytes.
        asynchronous: Whether operators are launched ahead, so that launches overlap with the work
            of other operators (GPUs); otherwise they add to it.
        node: Devices of one node, among which the links are as above; 0 if all are in one.
        network_bandwidth: Bytes per second of a device to one of another node, in each direction.
        network_latency: Seconds per message between nodes, besides its bytes.

    Raises:
        OptionError: A value is missing, not a number or not positive.
    """

    name: str
    flops: Mapping[str, float] = field(hash=False)
    bandwidth: float
    launch: float
    memory: float
    link_bandwidth: float
    link_latency: float
    asynchronous: bool = False
    node: int = 0
    network_bandwidth: float = math.inf
    network_latency: float = 0.0

    def __post_init__(self) -> None:
        name: object = self.name
        rates: object = self.flops
        if not isinstance(name, str) or not name.strip():
            raise OptionError(f"a device profile needs a name ({name!r})")
        if not isinstance(rates, Mapping) or _DEFAULT_DTYPE not in rates:
            raise OptionError(
                f"the device profile {self.name!r} needs FLOP/s of {_DEFAULT_DTYPE} at least "
                f"(flops={self.flops!r}): other dtypes run at that rate unless they are listed"
            )
        for dtype, rate in self.flops.items():
            self._check(f"flops.{dtype}", rate, zero=False)
        for key in (*_UNITS, *_NETWORK_UNITS):
            self._check(key, getattr(self, key), zero=key in _MAY_BE_ZERO)
        size: object = self.node
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise OptionError(
                f"node must be a number of devices, 0 for any ({size!r}) in device profile "
                f"{self.name!r}"
            )
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
        """Return the FLOP/s of a dtype, by its name with or without the prefix `torch.`."""
        return self.flops.get(dtype.removeprefix("torch."), self.flops[_DEFAULT_DTYPE])

    def seconds(
        self, flops: float, moved: float, dtype: str = _DEFAULT_DTYPE, operators: float = 1
    ) -> float:
        """Return the seconds of operators by the roofline model, launches included.

        Source: Williams et al., "Roofline: an insightful visual performance model", 2009.

        Args:
            flops: FLOPs of the operators.
            moved: Bytes that they read and write.
            dtype: Name of the dtype of the computation.
            operators: Number of operators.
        """
        work = max(flops / self.rate(dtype), moved / self.bandwidth)
        launch = operators * self.launch
        return max(work, launch) if self.asynchronous else work + launch

    def transfer(self, size: float, other: DeviceProfile | None = None, rank: int = 1) -> float:
        """Return the seconds of a message of `size` bytes, over the slower link of two devices.

        Args:
            size: Bytes of the message.
            other: The device at the other end; None for an equal one.
            rank: Number of this device; the other one is the device before it.
        """
        other = other or self
        if self.node and rank % self.node == 0:
            latency = max(self.network_latency, other.network_latency)
            return latency + size / min(self.network_bandwidth, other.network_bandwidth)
        latency = max(self.link_latency, other.link_latency)
        return latency + size / min(self.link_bandwidth, other.link_bandwidth)


def read_profile(text: str, origin: str) -> DeviceProfile:
    """Read a profile from the text of a TOML file.

    Args:
        text: Contents of the file.
        origin: Name of the file, for messages.

    Raises:
        OptionError: The text is not TOML, or lacks values of a profile.
    """
    try:
        values: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise OptionError(f"{origin} is not TOML: {error}") from error
    names = {field.name for field in fields(DeviceProfile)}
    missing = sorted(names - values.keys() - {"asynchronous", "node", *_NETWORK_UNITS})
    if values.get("node"):
        missing = sorted({*missing, *_NETWORK_UNITS} - values.keys())
    if missing or values.keys() - names:
        unknown = ", ".join(sorted(values.keys() - names)) or "none"
        raise OptionError(
            f"{origin} is not a device profile (missing: {', '.join(missing) or 'none'}; unknown: "
            f"{unknown}): `pnn-compile profile -o FILE` writes one to start from"
        )
    try:
        return DeviceProfile(**values)
    except OptionError as error:
        raise OptionError(f"{origin}: {error}") from error


def write_profile(profile: DeviceProfile) -> str:
    """Return a profile as the text of a TOML file, which `read_profile` reads back unchanged."""
    lines = [f"name = {_quoted(profile.name)}"]
    if profile.asynchronous:
        lines.append("asynchronous = true  # launches hide behind the work of other operators")
    units = _UNITS | _NETWORK_UNITS if profile.node else _UNITS
    lines += [f"{key} = {_number(getattr(profile, key))}  # {unit}" for key, unit in units.items()]
    if profile.node:
        lines.append(f"node = {profile.node}  # devices that share the faster links")
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


def roofline_costs(
    costs: Mapping[fx.Node, NodeCost],
    facts: Mapping[fx.Node, Fact],
    profile: DeviceProfile,
    *,
    backward: bool,
) -> dict[fx.Node, NodeCost]:
    """Replace the cost of every node by its seconds on a device.

    A node takes the time of its FLOPs at the rate of its dtype or the time of its bytes in memory,
    whichever is longer, and the launches of its operators (`DeviceProfile.seconds`). The backward
    pass launches twice the operators and moves twice the bytes.

    Args:
        costs: Counted costs by node.
        facts: Observed facts by node.
        profile: The device.
        backward: Whether the backward pass counts too.
    """
    estimated = {}
    for node, cost in costs.items():
        spec = facts[node].spec
        dtype = spec.dtype if spec is not None else "float32"
        forward = profile.seconds(cost.flops, cost.moved, dtype, cost.operators)
        backward_seconds = 0.0
        if backward and cost.operators:
            backward_seconds = profile.seconds(
                cost.backward_flops,
                _BACKWARD_FACTOR * cost.moved,
                dtype,
                _BACKWARD_FACTOR * cost.operators,
            )
        estimated[node] = replace(cost, cost=forward + backward_seconds, backward=backward_seconds)
    return estimated
