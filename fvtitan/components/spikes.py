"""A loss or gradient norm far above those before it, said in words. It changes nothing: skipped updates would hide the cause.

Only values that are logged are seen. Of a spike between two logged steps, `metrics.log_freq` apart, the average of the weights
and the next values tell.
"""

from __future__ import annotations

import collections
import math
import statistics
from collections.abc import Mapping

WINDOW = 128
"""Readings that a value is compared with."""
READINGS = 10
"""Fewer say nothing."""
SIGMAS = 8.0
SMALLEST_SIGMA = 0.05
"""Of the logarithm: what is steadier than 5 % is taken to vary by that."""


class SpikeWatch:
    """Compares each role's loss and gradient norm with their own last readings, and warns once each time one leaves its range.

    The range is `exp(median + 8 sigma)` of the logarithms, as losses and norms are positive and skewed; sigma is 1.4826 times
    the median absolute deviation, so a few spikes in the window do not widen it.
    """

    def __init__(self) -> None:
        self._logs: dict[str, collections.deque[float]] = {}
        self._above: set[str] = set()

    def read(self, values: Mapping[str, float]) -> list[str]:
        """The new warnings; values that are not positive and finite are not judged."""
        warnings = []
        for name, value in values.items():
            if name.split("/")[0] not in ("loss", "grad_norm") or not 0 < value < math.inf:
                continue
            logs = self._logs.setdefault(name, collections.deque(maxlen=WINDOW))
            above = len(logs) >= READINGS and math.log(value) > _limit(logs)
            if above and name not in self._above:
                usual = math.exp(statistics.median(logs))
                warnings.append(
                    f"{name} is {value:.4g}, {value / usual:.3g} times its median of the last {len(logs)} logged steps "
                    f"({usual:.4g}). Known causes: a learning rate too high, a broken or mislabelled sample"
                )
            (self._above.add if above else self._above.discard)(name)
            logs.append(math.log(value))
        return warnings


def _limit(logs: collections.deque[float]) -> float:
    median = statistics.median(logs)
    sigma = 1.4826 * statistics.median(abs(x - median) for x in logs)
    return median + SIGMAS * max(sigma, SMALLEST_SIGMA)
