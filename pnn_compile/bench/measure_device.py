"""Measure this device, and the link between two local ranks, for a device profile.

A roofline needs the rates of a device and a forecast those of its links:

    FLOP/s by dtype      square matrix products           launch      200 operators on 8 numbers
    bytes per second     the sum of two long vectors      link        messages there and back
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from passes.cost.device_profile import DeviceProfile
from passes.errors import OptionError
from pnn_compile.forecast.timing_cache import processor_name
from pnn_compile.runtime.local_ranks import run_on_ranks

_DTYPES = ("float64", "float32", "bfloat16", "float16")
_REPEATS, _SLOW_REPEATS = 7, 2
"""Timings of an operation; of one that exceeds the seconds below."""
_MIN_SECONDS = 0.02
"""Shortest timing: faster operations run several times in it."""
_OPERATORS, _SMALL = 200, 8
"""Operators between two readings of the clock to time launches, and their number of elements."""
_MESSAGE, _ROUNDS = 8 * 2**20, 20
"""Bytes of a large message, and how many of them are sent."""


def measure_device(
    kind: str | None = None,
    *,
    threads: int = 1,
    name: str | None = None,
    progress: Callable[[str], object] = lambda _: None,
) -> DeviceProfile:
    """Measure matrix products by dtype, memory, launches, and the link to another local rank.

    Two processes of this machine measure. With a GPU each they communicate over NCCL; else, also
    with one GPU only, over Gloo in the memory of the host.

    Args:
        kind: "cpu" or "cuda"; if None, "cuda" where torch finds a CUDA device.
        threads: Threads of a process, on the CPU.
        name: Name of the profile; that of the device if None.
        progress: Called with a description of the measurement that starts.

    Returns:
        The profile.

    Raises:
        OptionError: There is no such device.
        RuntimeFault: A process failed.
    """
    kind = kind or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in ("cpu", "cuda"):
        raise OptionError(f"a device is 'cpu' or 'cuda' (got {kind!r})")
    if kind == "cuda" and not torch.cuda.is_available():
        raise OptionError("torch finds no CUDA device here: measure the CPU (--device cpu)")
    progress("measuring matrix products, memory, launches and the link")
    figures = run_on_ranks(_measure, 2, kind, threads=threads, cuda=kind == "cuda")[0]
    (flops, memory_rate, launch, memory), (latency, bandwidth) = figures
    return DeviceProfile(
        name=name or _name(kind, threads),
        flops=flops,
        bandwidth=memory_rate,
        launch=launch,
        memory=memory,
        link_bandwidth=bandwidth,
        link_latency=latency,
        asynchronous=kind == "cuda",
    )


def _name(kind: str, threads: int) -> str:
    processor = processor_name(torch.device(kind))
    if kind == "cuda":
        return processor
    return f"{processor}, {'1 core' if threads == 1 else f'{threads} cores'}"


def _measure(
    rank_device: torch.device, kind: str
) -> tuple[tuple[dict[str, float], float, float, float], tuple[float, float]] | None:
    """Measure the device on rank 0 while the other one waits, then the link between them."""
    rates = _measure_rates(torch.device(kind)) if dist.get_rank() == 0 else None
    link = _link(rank_device)
    return None if rates is None else (rates, link)


def _measure_rates(device: torch.device) -> tuple[dict[str, float], float, float, float]:
    """Return FLOP/s by dtype, bytes per second, seconds per operator, and bytes of memory."""
    size = 4096 if device.type == "cuda" else 256
    rates = {dtype: _products(device, getattr(torch, dtype), size) for dtype in _DTYPES}
    flops = {dtype: rate for dtype, rate in rates.items() if rate is not None}
    return flops, _bandwidth(device), _launch(device), _memory(device)


def _products(device: torch.device, dtype: torch.dtype, size: int) -> float | None:
    """Return FLOP/s of square matrix products; None if the device has no kernel for the dtype."""
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    try:
        seconds = _timed(device, lambda: torch.mm(a, b))
    except RuntimeError:  # "not implemented for ..."
        return None
    return float(2 * size**3 / seconds)


def _bandwidth(device: torch.device) -> float:
    """Return bytes per second of adding two vectors larger than any cache: two reads, a write."""
    count = 2**28 if device.type == "cuda" else 2**25
    a, b = torch.ones(count, device=device), torch.ones(count, device=device)
    out = torch.empty_like(a)
    return float(3 * a.nbytes / _timed(device, lambda: torch.add(a, b, out=out)))


def _launch(device: torch.device) -> float:
    """Return seconds per operator of a sequence of operators on a few numbers."""
    a = torch.ones(_SMALL, device=device)

    def several() -> None:
        for _ in range(_OPERATORS):
            a.add(1.0)

    return _timed(device, several) / _OPERATORS


def _memory(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _timed(device: torch.device, run: Callable[[], object]) -> float:
    """Return the median seconds of a run, over timings of at least `_MIN_SECONDS`."""
    with torch.no_grad():
        run()
        _synchronize(device)
        start = time.perf_counter()
        run()
        _synchronize(device)
        count = max(1, round(_MIN_SECONDS / max(1e-9, time.perf_counter() - start)))
        rounds = []
        for _ in range(_REPEATS if count > 1 else _SLOW_REPEATS):
            start = time.perf_counter()
            for _ in range(count):
                run()
            _synchronize(device)
            rounds.append((time.perf_counter() - start) / count)
    return statistics.median(rounds)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _link(device: torch.device) -> tuple[float, float]:
    """Return latency and bytes per second of messages between ranks: half of a round trip."""
    small = torch.ones(1, device=device)
    large = torch.ones(_MESSAGE // 4, device=device)
    latency = _round_trip(small) / 2
    transfer = _round_trip(large) / 2
    return latency, large.nbytes / max(transfer - latency, 1e-12)


def _round_trip(message: torch.Tensor) -> float:
    rank = dist.get_rank()
    seconds = []
    for _ in range(_ROUNDS):
        dist.barrier()
        _synchronize(message.device)
        start = time.perf_counter()
        if rank == 0:
            dist.send(message, 1)
            dist.recv(message, 1)
        else:
            dist.recv(message, 0)
            dist.send(message, 0)
        _synchronize(message.device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[_ROUNDS // 4 :])
