"""Find the model that a word of the command line names, and build it with its example inputs.

In: a text (`file.py:name`, `timm:resnet50`, `file.pt2`), and the texts of `--input` and `--arg`.
Out: a `Source`. Read `resolve.py` first; every kind of source has a file of its own.
"""

from pnn_compile.sources.resolve import load_source
from pnn_compile.sources.source import Source, parse_input

__all__ = ["Source", "load_source", "parse_input"]
