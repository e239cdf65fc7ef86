"""`make report`: what is measured again, and the page that it writes."""

from __future__ import annotations

import re
from pathlib import Path

import report

MAKEFILE = (report.ROOT / "Makefile").read_text(encoding="utf-8")


def test_every_measurement_is_a_make_target_with_its_program() -> None:
    for measurement in report.MEASUREMENTS:
        assert (report.ROOT / measurement.program).exists()
        assert re.search(rf"^{measurement.target}: .*## ", MAKEFILE, re.MULTILINE), measurement.target


def test_each_measurement_is_made_once_and_is_on_the_page(tmp_path: Path) -> None:
    page, made = tmp_path / "measurements.md", list[str]()

    def run(target: str) -> str:
        made.append(target)
        return f"output of {target}"

    report.report(page, run)
    printing = [measurement.target for measurement in report.MEASUREMENTS if measurement.page is None]
    assert set(made) >= set(printing)
    found = report.sections(page.read_text(encoding="utf-8"))
    assert list(found) == printing
    for target, text in found.items():
        assert "commit" in text and f"output of {target}" in text
        assert report.commit_in(text) or "uncommitted" in text
    made.clear()
    report.report(tmp_path / "other.md", run, only=["bench-host", "bench-moe"])
    assert made == ["bench-host", "bench-moe"]
