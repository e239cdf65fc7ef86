"""How far a training raises the memory of its process."""

from __future__ import annotations

import gc
import sys

from speed.memory_of_one import forget_the_peak, status


class Peak:
    """Measures from its creation on. Only Linux can reset the largest resident size of a process."""

    def __init__(self) -> None:
        """Start to measure."""
        gc.collect()
        self.start = status("VmRSS") if sys.platform == "linux" else None
        if self.start is not None:
            forget_the_peak()

    def megabytes(self) -> float | None:
        """The growth in MB; None on other systems."""
        return None if self.start is None else round((status("VmHWM") - self.start) / 1e6, 1)
