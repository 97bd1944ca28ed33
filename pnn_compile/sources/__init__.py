"""Where a model and its example inputs come from; each kind of source has a file of its own."""

from pnn_compile.sources.inputs import parse_input
from pnn_compile.sources.load import load_source
from pnn_compile.sources.source import Source

__all__ = ["Source", "load_source", "parse_input"]
