"""Choose the kind of source that a text names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pnn_compile.sources import exported_program as exported
from pnn_compile.sources import huggingface, timm, torchvision
from pnn_compile.sources import python_file as python
from pnn_compile.sources.calls import parse_arguments
from pnn_compile.sources.source import Inputs, Source
from pnn_compile.sources.text_inputs import parse_inputs

__all__ = ["load_source"]

_Loader = Callable[[str, dict[str, Any], Inputs | None], Source]

LIBRARIES: dict[str, _Loader] = {
    "timm": timm.load,
    "torchvision": torchvision.load,
    "hf": huggingface.load,
}
"""The word in front of the colon, and what loads the name behind it."""


def load_source(text: str, inputs: Sequence[str] = (), arguments: Sequence[str] = ()) -> Source:
    """Import and build the model that `text` names, and find its example inputs.

    While a user's code runs, the file's folder and the working directory stand first in
    `sys.path`. The file, and what an earlier call imported from those folders, is imported anew.

    Args:
        text: `file.py`, `file.py:name`, `package.module:name`, `timm:name`, `torchvision:name`,
            `hf:name` (a model type, a class of transformers, or a folder with a config.json), or
            a file `.pt2` that torch.export.save wrote.
        inputs: Texts for `parse_input`, the positional ones in the order of the arguments; they
            replace the inputs that the source knows.
        arguments: Texts `name=value`, keyword arguments of the factory: a value is a Python
            literal, else text.

    Raises:
        SourceError: There is no such file, module or name, no model or more than one, no inputs,
            a library is missing, an argument is unknown, or the user's code fails; what it raised
            is the cause.
    """
    given = parse_inputs(inputs)
    keywords = parse_arguments(arguments)
    kind, _, name = text.partition(":")
    if kind in LIBRARIES and name and not Path(text).is_file():
        return LIBRARIES[kind](name, keywords, given)
    if Path(text).suffix == exported.SUFFIX:
        return exported.load(text, keywords, given)
    return python.load(text, keywords, given)
