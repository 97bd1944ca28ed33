"""Runs a parareal network on several ranks at once, forward and backward."""

from pnn_compile.runtime.captured import CapturedForward, CapturedStep
from pnn_compile.runtime.checkpoint import Checkpoints
from pnn_compile.runtime.distributed import RankModule
from pnn_compile.runtime.instruction import Instruction, Kind
from pnn_compile.runtime.order import check
from pnn_compile.runtime.placing import distribute, place
from pnn_compile.runtime.schedule import Sweep, schedule
from pnn_compile.runtime.simulator import Timeline, Times, simulate
from pnn_compile.runtime.streams import StreamNetwork
from pnn_compile.runtime.trace import chrome_trace

__all__ = [
    "CapturedForward",
    "CapturedStep",
    "Checkpoints",
    "Instruction",
    "Kind",
    "RankModule",
    "StreamNetwork",
    "Sweep",
    "Timeline",
    "Times",
    "check",
    "chrome_trace",
    "distribute",
    "place",
    "schedule",
    "simulate",
]
