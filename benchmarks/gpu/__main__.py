"""Entry of `python -m gpu`."""

from __future__ import annotations

import sys

from gpu.cli import main

if __name__ == "__main__":
    sys.exit(main())
