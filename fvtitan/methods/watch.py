"""Watching a distillation: says in words when it collapses, from the values that are logged anyway."""

from __future__ import annotations

import math
from collections.abc import Mapping

READINGS = 3
"""Fewer say nothing: single batches vary."""
SMOOTHING = 0.7
MOTION_SHARE = 0.4
VARIANCE_RANGE = (0.2, 3.0)
CRITIC_ERROR_RATIO = 1.25


class CollapseWatch:
    """Reads the values of every logged step, and warns once each time one leaves its range.

    The yardstick is the teacher's view of the same videos: what it would denoise them to, at the noise levels of the scores. It
    needs no history, so a collapse in the first steps is seen, and so is one before a resume. A student that the teacher would
    set in motion is static; one that it would shrink or swell drifts; a critic that denoises the student's videos worse than
    the teacher, who never saw them, does not follow the student.
    """

    def __init__(self) -> None:
        self._smooth: dict[str, tuple[float, int]] = {}  # (mean logarithm, readings)
        self._warned: set[str] = set()

    def read(self, values: Mapping[str, float]) -> list[str]:
        """The new warnings. Values that are not there, or of a skipped update, are not judged."""
        checks = {
            "dmd/motion_to_teacher": self._static,
            "dmd/variance_to_teacher": self._variance,
            "dmd/critic_error_ratio": self._critic,
        }
        warnings = []
        for name, check in checks.items():
            if not math.isfinite(values.get(name, math.nan)):
                continue
            ratio, readings = self._update(name, values[name])
            message = check(ratio) if readings >= READINGS else ""
            if message and name not in self._warned:
                warnings.append(message)
            (self._warned.add if message else self._warned.discard)(name)
        return warnings

    def _update(self, name: str, ratio: float) -> tuple[float, int]:
        """The geometric mean of the first readings, an exponential average from then on; and how many there were."""
        smooth, readings = self._smooth.get(name, (0.0, 0))
        readings += 1
        keep = min(SMOOTHING, 1 - 1 / readings)
        smooth = keep * smooth + (1 - keep) * math.log(max(ratio, 1e-12))
        self._smooth[name] = (smooth, readings)
        return math.exp(smooth), readings

    @staticmethod
    def _static(ratio: float) -> str:
        if ratio >= MOTION_SHARE:
            return ""
        return (
            f"the student's videos are becoming static: their motion is {ratio:.2f} of what the teacher makes of them. Known "
            "causes: a learning rate or a guidance scale too high, a shift other than the teacher's"
        )

    @staticmethod
    def _variance(ratio: float) -> str:
        if VARIANCE_RANGE[0] <= ratio <= VARIANCE_RANGE[1]:
            return ""
        return (
            f"the variance of the student's latents drifts: it is {ratio:.2f} of what the teacher makes of them (colours "
            "saturate or fade). Known causes: the student's learning rate is too high for the critic to follow, or guidance "
            "too high"
        )

    @staticmethod
    def _critic(ratio: float) -> str:
        if ratio <= CRITIC_ERROR_RATIO:
            return ""
        return (
            f"the critic is losing: it denoises the student's videos worse than the teacher does (squared error x {ratio:.2f}, "
            "a critic that follows has less than 1). Known causes: its learning rate is too high or too low, "
            "method.student_update_interval is too small"
        )
