"""Convert results to plain values for JSON. This file does not import torch."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any


def plain(value: Any) -> Any:
    """Convert dataclasses, paths, sets and tuples to plain values, and numbers that are not finite to `None`.

    >>> plain({"a": (1.5, float("nan")), "b": {"z", "y"}})
    {'a': [1.5, None], 'b': ['y', 'z']}
    """
    return json.loads(json.dumps(value, default=_convert), parse_constant=lambda name: None)


def _convert(value: Any) -> Any:
    if isinstance(value, Path):
        return value.as_posix()
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else sorted(value)  # type: ignore[arg-type]
