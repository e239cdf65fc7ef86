"""Entry of `python -m learning`."""

from __future__ import annotations

import sys

from learning.cli import main

if __name__ == "__main__":
    sys.exit(main())
