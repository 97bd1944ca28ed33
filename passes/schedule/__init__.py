"""What every rank does in a step, as plain lists of instructions: checked, and simulated.

In: a `Plan`. Out: instruction lists, a proof that they cannot deadlock, the time that they take.
Read `instruction.py` first, then `lists.py`, which orders the messages.
"""

from passes.schedule.instruction import Instruction, Kind
from passes.schedule.lists import Sweep, schedule
from passes.schedule.simulate import Timeline, Times, chrome_trace, simulate, step_trace
from passes.schedule.verify import check

__all__ = [
    "Instruction",
    "Kind",
    "Sweep",
    "Timeline",
    "Times",
    "check",
    "chrome_trace",
    "schedule",
    "simulate",
    "step_trace",
]
