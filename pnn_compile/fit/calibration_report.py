"""What a calibration found, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CalibrationReport", "InterfaceError"]


@dataclass(frozen=True)
class InterfaceError:
    """Relative errors, on held-out samples, of the state that leaves a stage.

    In a collapsed sweep only the last state is corrected.

    Attributes:
        stage: Number of the stage.
        guess_before: Of the state that enters it, guessed, before calibration.
        guess_after: The same after calibration.
        uncorrected: Of the state that leaves it, without a correction.
        corrected_before: With the correction, before calibration.
        corrected_after: With the correction, after calibration.
    """

    stage: int
    guess_before: float
    guess_after: float
    uncorrected: float
    corrected_before: float
    corrected_after: float


@dataclass(frozen=True)
class CalibrationReport:
    """What calibration did, judged on samples that it did not fit.

    Ridge, rank and family are chosen on these samples too, so that the figures are of the best of
    a few candidates; a network that is fitted further wants samples of its own to be judged.

    Attributes:
        interfaces: Errors by stage.
        agreement_before: Share of held-out samples whose largest output is the original's; of
            outputs that are equal, where they are whole numbers; None where there is no largest.
        agreement_after: The same after calibration.
        output_error_before: Relative error of the outputs against the original's.
        output_error_after: The same after calibration.
        fitted: Samples that were fitted.
        held_out: Samples that judged.
        recalibrated: Guesses and corrections whose BatchNorm statistics were measured anew,
            because that lowered their error.
    """

    interfaces: tuple[InterfaceError, ...]
    agreement_before: float | None
    agreement_after: float | None
    output_error_before: float
    output_error_after: float
    fitted: int
    held_out: int
    recalibrated: tuple[str, ...] = ()
