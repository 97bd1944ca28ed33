"""Measures the device at hand, and the link between two local ranks, for a device profile."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from passes.cost.device_profile import DeviceProfile
from passes.errors import OptionError
from pnn_compile.forecast.processor import processor_name
from pnn_compile.runtime.local_ranks import run_on_ranks

__all__ = ["measure_device"]

_TYPES = ("float64", "float32", "bfloat16", "float16")
_REPEATS = 7
_FEW = 2
_LONG = 0.02
"""Seconds that one measurement takes at least."""
_OPERATORS = 200
_SMALL = 8
_MESSAGE = 8 * 2**20
_ROUNDS = 20


def measure_device(
    kind: str | None = None,
    *,
    threads: int = 1,
    name: str | None = None,
    progress: Callable[[str], object] = lambda _: None,
) -> DeviceProfile:
    """Measure matrix products by dtype, memory, launches, and the link to another local rank.

    Two processes of this machine measure. On GPUs of their own they talk over NCCL; else, as with
    one GPU alone, over Gloo in the memory of the host.

    Args:
        kind: "cpu" or "cuda"; what the machine has if None.
        threads: Threads of a process, on the CPU.
        name: What to call the device; its own name if None.
        progress: Called with what is being measured.

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
    found = run_on_ranks(_measure, 2, kind, threads=threads, cuda=kind == "cuda")[0]
    (flops, memory_rate, launch, memory), (latency, bandwidth) = found
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
    found = processor_name(torch.device(kind))
    if kind == "cuda":
        return found
    return f"{found}, {'1 core' if threads == 1 else f'{threads} cores'}"


def _measure(
    own: torch.device, kind: str
) -> tuple[tuple[dict[str, float], float, float, float], tuple[float, float]] | None:
    """Measure the device on rank 0 while the other one waits, then the link between them."""
    alone = _alone(torch.device(kind)) if dist.get_rank() == 0 else None
    link = _link(own)
    return None if alone is None else (alone, link)


def _alone(device: torch.device) -> tuple[dict[str, float], float, float, float]:
    """FLOP/s by dtype, bytes per second, seconds per operator, and bytes."""
    size = 4096 if device.type == "cuda" else 256
    rates = {dtype: _products(device, getattr(torch, dtype), size) for dtype in _TYPES}
    flops = {dtype: rate for dtype, rate in rates.items() if rate is not None}
    return flops, _bandwidth(device), _launch(device), _memory(device)


def _products(device: torch.device, dtype: torch.dtype, size: int) -> float | None:
    """FLOP/s of square matrix products; None where the device has no kernel for the dtype."""
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    try:
        seconds = _timed(device, lambda: torch.mm(a, b))
    except RuntimeError:  # "not implemented for ..."
        return None
    return float(2 * size**3 / seconds)


def _bandwidth(device: torch.device) -> float:
    """Bytes per second of adding two vectors that no cache holds: two reads and a write."""
    count = 2**28 if device.type == "cuda" else 2**25
    a, b = torch.ones(count, device=device), torch.ones(count, device=device)
    out = torch.empty_like(a)
    return float(3 * a.nbytes / _timed(device, lambda: torch.add(a, b, out=out)))


def _launch(device: torch.device) -> float:
    """Seconds per operator where operators have next to nothing to do, and follow each other."""
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
    """Median seconds of one run, out of several rounds that are long enough for the clock."""
    with torch.no_grad():
        run()
        _settle(device)
        start = time.perf_counter()
        run()
        _settle(device)
        count = max(1, round(_LONG / max(1e-9, time.perf_counter() - start)))
        rounds = []
        for _ in range(_REPEATS if count > 1 else _FEW):
            start = time.perf_counter()
            for _ in range(count):
                run()
            _settle(device)
            rounds.append((time.perf_counter() - start) / count)
    return statistics.median(rounds)


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _link(device: torch.device) -> tuple[float, float]:
    """Latency and bytes per second of messages from rank to rank: half of there and back."""
    small = torch.ones(1, device=device)
    large = torch.ones(_MESSAGE // 4, device=device)
    latency = _there_and_back(small) / 2
    whole = _there_and_back(large) / 2
    return latency, large.nbytes / max(whole - latency, 1e-12)


def _there_and_back(message: torch.Tensor) -> float:
    rank = dist.get_rank()
    seconds = []
    for _ in range(_ROUNDS):
        dist.barrier()
        _settle(message.device)
        start = time.perf_counter()
        if rank == 0:
            dist.send(message, 1)
            dist.recv(message, 1)
        else:
            dist.recv(message, 0)
            dist.send(message, 0)
        _settle(message.device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[_ROUNDS // 4 :])
