"""Run a parareal network on several ranks, forward and backward, or on the streams of one GPU.

In: a compiled network or an artifact. Out: a `RankModule` per rank, whose `train_step` runs the
instruction lists of `passes.schedule`. Read `distribute.py` first; `engine.py` shows one step, and
`transport.py` is the engine's only connection to other ranks.
"""

from passes.schedule.instruction import Instruction, Kind
from passes.schedule.lists import Sweep, schedule
from passes.schedule.simulate import Timeline, Times, chrome_trace, simulate
from passes.schedule.verify import check
from pnn_compile.runtime.checkpoint import Checkpoints
from pnn_compile.runtime.cuda import CapturedForward, CapturedStep, StreamNetwork
from pnn_compile.runtime.distribute import distribute, place
from pnn_compile.runtime.rank_module import RankModule

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
