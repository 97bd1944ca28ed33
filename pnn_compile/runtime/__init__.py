"""Runs a parareal network on several ranks at once, forward and backward."""

from pnn_compile.runtime.distributed import RankModule, distribute, place
from pnn_compile.runtime.schedule import Instruction, Kind, check, schedule

__all__ = ["Instruction", "Kind", "RankModule", "check", "distribute", "place", "schedule"]
