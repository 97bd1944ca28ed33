"""From a program and a plan to networks: fine stages, operators, the parareal `GraphModule`.

In: a `Program` and a `Plan`. Out: modules; nothing is decided here. Read `sweep.py` first, which
states the algorithm, then `assemble.py`.
"""

from passes.transform.assemble import assemble, sequential
from passes.transform.executor import Executor
from passes.transform.split import Stages, split
from passes.transform.sweep import Role, Step, sweep
from passes.transform.synthesize import Operators, synthesize

__all__ = [
    "Executor",
    "Operators",
    "Role",
    "Stages",
    "Step",
    "assemble",
    "sequential",
    "split",
    "sweep",
    "synthesize",
]
