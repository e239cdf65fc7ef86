"""Entry of `python -m speed`."""

from __future__ import annotations

import sys

from speed.cli import main

if __name__ == "__main__":
    sys.exit(main())
