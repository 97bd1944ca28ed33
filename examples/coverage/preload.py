"""What the server of `examples.coverage.apart` imports before it forks."""

from __future__ import annotations

import importlib
import importlib.util

from examples.coverage.operators import declare

for name in ("examples.coverage.check", "torch.export", "sympy"):
    importlib.import_module(name)
declare()
for name in ("timm", "torchvision.models", "transformers.models.auto.modeling_auto"):
    if importlib.util.find_spec(name.partition(".")[0]):
        importlib.import_module(name)
