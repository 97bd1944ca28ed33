"""Runs a parareal network on several ranks at once, forward and backward."""

from passes.schedule.instruction import Instruction, Kind
from passes.schedule.lists import Sweep, schedule
from passes.schedule.simulate import Timeline, Times, simulate
from passes.schedule.trace import chrome_trace
from passes.schedule.verify import check
from pnn_compile.runtime.captured import CapturedForward, CapturedStep
from pnn_compile.runtime.checkpoint import Checkpoints
from pnn_compile.runtime.distributed import RankModule
from pnn_compile.runtime.placing import distribute, place
from pnn_compile.runtime.streams import StreamNetwork

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
