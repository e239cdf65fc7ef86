"""The browser that the tests of the page run in: one that is installed; none is fetched."""

from __future__ import annotations

import shutil

NAMES = ("chromium", "chromium-browser", "google-chrome")


def find_browser() -> str | None:
    """The path of a Chromium, `None` where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)
