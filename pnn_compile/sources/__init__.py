"""Where a model and its example inputs come from; each kind of source has a file of its own."""

from pnn_compile.sources.resolve import load_source
from pnn_compile.sources.source import Source
from pnn_compile.sources.text_inputs import parse_input

__all__ = ["Source", "load_source", "parse_input"]
