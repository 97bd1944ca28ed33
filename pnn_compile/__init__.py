"""Compile PyTorch models into parareal neural networks."""

from pathlib import Path

import passes

_expected = Path(__file__).resolve().parent.parent / "passes"
if Path(passes.__file__ or "").resolve().parent != _expected:
    raise ImportError(
        f"pnn_compile needs its own package 'passes' ({_expected}), but {passes.__file__} shadows "
        "it: rename that one, or take its directory off sys.path"
    )

from passes.interrupt import end_on_interrupt  # noqa: E402  # after the check above

end_on_interrupt()  # before torch is imported

from passes.cost.device_profile import DeviceProfile  # noqa: E402
from passes.errors import (  # noqa: E402
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
from passes.plan.schema import Plan  # noqa: E402
from pnn_compile import runtime  # noqa: E402
from pnn_compile.compiled import Compiled, compile, load  # noqa: E402  # torch names it so too
from pnn_compile.evaluate.iterate import dial, iterate  # noqa: E402
from pnn_compile.fit.calibrate import calibrate  # noqa: E402
from pnn_compile.fit.train import fit  # noqa: E402
from pnn_compile.forecast.forecast import forecast, load_profile  # noqa: E402

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
