"""The captured program as a typed graph: JSON over allow-lists, and tensors."""

from pnn_compile.graphfile.modules import named_tensors
from pnn_compile.graphfile.program import (
    SCHEMA,
    few,
    fixed_from_data,
    inputs_from_data,
    modes,
    program_from_data,
    program_to_data,
    restore_tensors,
    set_modes,
)
from pnn_compile.graphfile.tensors import TensorReader, TensorWriter, assign
from pnn_compile.graphfile.values import DTYPES

__all__ = [
    "DTYPES",
    "SCHEMA",
    "TensorReader",
    "TensorWriter",
    "assign",
    "few",
    "fixed_from_data",
    "inputs_from_data",
    "modes",
    "named_tensors",
    "program_from_data",
    "program_to_data",
    "restore_tensors",
    "set_modes",
]
