"""How far work raises the memory of its process."""

from __future__ import annotations

import gc
import sys


class Peak:
    """Measures from its creation on. Only Linux can reset the largest resident size of a process."""

    def __init__(self) -> None:
        """Start to measure."""
        gc.collect()
        self._start = _status("VmRSS") if sys.platform == "linux" else None
        if self._start is not None:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")

    def bytes(self) -> int | None:
        """The growth in bytes; None on other systems."""
        return None if self._start is None else _status("VmHWM") - self._start

    def megabytes(self) -> float | None:
        """The growth in MB; None on other systems."""
        grown = self.bytes()
        return None if grown is None else round(grown / 1e6, 1)


def _status(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))
