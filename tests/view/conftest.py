"""The tests of the page need a browser. If there is none, the end of the test run says so (see tests/conftest.py)."""

from __future__ import annotations

from browser import find_browser

collect_ignore_glob = [] if find_browser() else ["test_page.py"]
