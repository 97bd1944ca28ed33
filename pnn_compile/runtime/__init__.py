"""Runs a parareal network on several ranks at once, forward and backward."""

from pnn_compile.runtime.distributed import RankModule, distribute, place
from pnn_compile.runtime.instruction import Instruction, Kind
from pnn_compile.runtime.order import check
from pnn_compile.runtime.schedule import schedule

__all__ = ["Instruction", "Kind", "RankModule", "check", "distribute", "place", "schedule"]
