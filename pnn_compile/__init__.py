"""Compile PyTorch models into parareal neural networks.

Names are imported when they are first used: `pnn-compile --help` does not wait for torch.
"""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import passes

_expected = Path(__file__).resolve().parent.parent / "passes"
if Path(passes.__file__ or "").resolve().parent != _expected:
    raise ImportError(
        f"pnn_compile needs its own package 'passes' ({_expected}), but {passes.__file__} shadows "
        "it: rename that one, or take its directory off sys.path"
    )

from passes.interrupt import end_on_interrupt  # noqa: E402  # after the check above

end_on_interrupt()  # before torch is imported

if TYPE_CHECKING:
    from passes.cost.device_profile import DeviceProfile
    from passes.errors import (
        ArtifactError,
        CaptureError,
        ExportError,
        OptionError,
        PartitionError,
        PnnError,
        RuntimeFault,
        SourceError,
        SynthesisError,
        VerificationError,
    )
    from passes.plan.schema import Plan
    from pnn_compile import runtime
    from pnn_compile.compiled import Compiled, compile, load  # torch names it so too
    from pnn_compile.evaluate.iterate import dial, iterate
    from pnn_compile.fit.calibrate import calibrate
    from pnn_compile.fit.train import fit
    from pnn_compile.forecast.forecast import forecast, load_profile

_HOMES = {
    "passes.cost.device_profile": ("DeviceProfile",),
    "passes.errors": (
        "ArtifactError", "CaptureError", "ExportError", "OptionError", "PartitionError", "PnnError",
        "RuntimeFault", "SourceError", "SynthesisError", "VerificationError",
    ),
    "passes.plan.schema": ("Plan",),
    "pnn_compile.compiled": ("Compiled", "compile", "load"),
    "pnn_compile.evaluate.iterate": ("dial", "iterate"),
    "pnn_compile.fit.calibrate": ("calibrate",),
    "pnn_compile.fit.train": ("fit",),
    "pnn_compile.forecast.forecast": ("forecast", "load_profile"),
}  # fmt: skip
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name == "runtime":
        return importlib.import_module("pnn_compile.runtime")
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("pnn-compile")
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOME_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Module whose functions `fit` and `forecast` are not replaced by the rooms of their names."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

__all__ = [
    "ArtifactError",
    "CaptureError",
    "Compiled",
    "DeviceProfile",
    "ExportError",
    "OptionError",
    "PartitionError",
    "Plan",
    "PnnError",
    "RuntimeFault",
    "SourceError",
    "SynthesisError",
    "VerificationError",
    "__version__",
    "calibrate",
    "compile",
    "dial",
    "fit",
    "forecast",
    "iterate",
    "load",
    "load_profile",
    "runtime",
]
