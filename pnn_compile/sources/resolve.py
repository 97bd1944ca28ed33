"""Choose the kind of source that a text names, and load it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pnn_compile.sources import exported_program, python_file
from pnn_compile.sources.libraries import LIBRARIES
from pnn_compile.sources.source import Source, parse_inputs
from pnn_compile.sources.user_code import parse_arguments


def load_source(text: str, inputs: Sequence[str] = (), arguments: Sequence[str] = ()) -> Source:
    """Import and build the model that `text` names, and find its example inputs.

    While the user's code runs, the folder of its file and the working directory come first in
    `sys.path`. The file, and what an earlier call imported from those folders, is imported again.

    Args:
        text: `file.py`, `file.py:name`, `package.module:name`, `timm:name`, `torchvision:name`,
            `hf:name` (a model type, a class of transformers, or a folder with a config.json), or
            a file `.pt2` that torch.export.save wrote.
        inputs: Texts for `parse_input`, the positional ones in the order of the arguments; they
            replace the inputs of the source.
        arguments: Texts `name=value`, keyword arguments of the factory: a value is a Python
            literal, else text.

    Returns:
        The model and its example inputs.

    Raises:
        SourceError: There is no such file, module or name, no model or more than one, no inputs,
            a library is missing, an argument is unknown, or the user's code fails; what it raised
            is the cause.
    """
    parsed_inputs = parse_inputs(inputs)
    keywords = parse_arguments(arguments)
    library, _, name = text.partition(":")
    if library in LIBRARIES and name and not Path(text).is_file():
        return LIBRARIES[library](name, keywords, parsed_inputs)
    if Path(text).suffix == exported_program.SUFFIX:
        return exported_program.load(text, keywords, parsed_inputs)
    return python_file.load(text, keywords, parsed_inputs)
