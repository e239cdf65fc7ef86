"""The programs of `docs/upstream/` print what the texts say, and the scores are those of the records.

If a program fails, PyTorch or PEFT has changed.
"""

from __future__ import annotations

import re

import pytest
from documents import DOCS, run_blocks
from learning.comparison import README_TASKS
from learning.rates import final_runs
from learning.records import read
from learning.summary import gain, scores
from learning.tables import spread


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["peft_expert_ranks", "torch_joint_gradients"])
def test_a_program_prints_what_its_text_says(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    document = DOCS / "upstream" / f"{name}.md"
    (told,) = re.findall(r"^```text\n(.*?)^```$", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    run_blocks(document)
    assert capsys.readouterr().out == told


def test_the_scores_of_pairs_are_those_of_the_records() -> None:
    records, text = read(), (DOCS / "upstream" / "peft_hra_pairs.md").read_text(encoding="utf-8")
    for task in README_TASKS:
        means = [spread(scores(final_runs(records, task, method))) for method in ("lora", "hra", "hra-pairs")]
        over = gain(records, task, "hra-pairs", "hra")
        assert f" | {' | '.join(means)} | {over.mean:+.1f} ± {over.half:.1f} |" in text
