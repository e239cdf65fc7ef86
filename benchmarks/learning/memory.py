"""How far a training raises the memory of its process."""

from __future__ import annotations

import gc
from pathlib import Path

STATUS, FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Peak:
    """Measures from now on. Linux keeps the largest resident size of a process, and forgets it on request."""

    def __init__(self) -> None:
        """Start to measure."""
        gc.collect()
        self.start = resident("VmRSS") if STATUS.exists() else None
        if self.start is not None:
            FORGET.write_text("5")

    def megabytes(self) -> float | None:
        """The growth in MB; None on other systems."""
        return None if self.start is None else round((resident("VmHWM") - self.start) / 1e6, 1)


def resident(field: str) -> int:
    """Bytes of a field of the process's status."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])
