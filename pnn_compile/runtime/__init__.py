"""Runs a parareal network on several ranks at once, forward and backward, or on one GPU's streams.

In: a compiled network or an artifact. Out: a `RankModule` a rank, whose `train_step` runs the
instruction lists of `passes.schedule`. Start at `distribute.py`; `engine.py` shows one step, and
`transport.py` is all that the engine needs to know of other ranks.
"""

from passes.schedule.instruction import Instruction, Kind
from passes.schedule.lists import Sweep, schedule
from passes.schedule.simulate import Timeline, Times, chrome_trace, simulate
from passes.schedule.verify import check
from pnn_compile.runtime.checkpoint import Checkpoints
from pnn_compile.runtime.cuda_graphs import CapturedForward, CapturedStep
from pnn_compile.runtime.cuda_streams import StreamNetwork
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
