"""The installed browser in which the tests of the page run; nothing is downloaded."""

from __future__ import annotations

import shutil

NAMES = ("chromium", "chromium-browser", "google-chrome")


def find_browser() -> str | None:
    """The path of Chromium, or `None`."""
    return next(filter(None, map(shutil.which, NAMES)), None)
