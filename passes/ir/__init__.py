"""The captured program and the ways to run it; every other room builds on this one.

In: a user's module and example inputs. Out: `Program`, subgraphs of it, and runs that leave no
trace. Read `program.py` first.
"""

from passes.ir.direct_call import DirectCaller, with_frame_headroom
from passes.ir.example_inputs import ExampleInputs, bind
from passes.ir.isolation import exclusive, preserved, seeded
from passes.ir.program import (
    CaptureReport,
    Interpreter,
    Program,
    Provenance,
    extract,
    graph_module,
    nodes_between,
    provenance,
    resolve,
    set_provenance,
    verify_graph,
)
from passes.ir.run_step import StepResult, compare, relative_error, run_one_step
from passes.ir.tensor_spec import TensorSpec, Value

__all__ = [
    "CaptureReport",
    "DirectCaller",
    "ExampleInputs",
    "Interpreter",
    "Program",
    "Provenance",
    "StepResult",
    "TensorSpec",
    "Value",
    "bind",
    "compare",
    "exclusive",
    "extract",
    "graph_module",
    "nodes_between",
    "preserved",
    "provenance",
    "relative_error",
    "resolve",
    "run_one_step",
    "seeded",
    "set_provenance",
    "verify_graph",
    "with_frame_headroom",
]
