"""Files with models, as users write them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from passes.errors import SourceError
from pnn_compile.sources import load_source

HEAD = "import torch\nfrom torch import nn\n"
NET = HEAD + "class Net(nn.Linear):\n    def __init__(self, width=3):\n"
NET += "        super().__init__(width, width)\n"
INPUTS = "def example_inputs(batch=2):\n    return torch.ones(batch, 3)\n"

Write = Callable[[str, str], Path]
"""Writes a file into the empty working directory of a test (fixture `write`)."""


def refusal(text: str, *inputs: str) -> str:
    """Return the message with which a source is refused: one line."""
    with pytest.raises(SourceError) as caught:
        load_source(text, inputs)
    message = str(caught.value)
    assert "\n" not in message
    return message
