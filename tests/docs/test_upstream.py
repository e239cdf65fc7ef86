"""The programs of `docs/upstream/` print what the texts say. A failure means that PyTorch or PEFT has changed."""

from __future__ import annotations

import re

import pytest
from documents import DOCS, run_blocks


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["peft_expert_ranks", "torch_joint_gradients"])
def test_a_program_prints_what_its_text_says(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    document = DOCS / "upstream" / f"{name}.md"
    (told,) = re.findall(r"^```text\n(.*?)^```$", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    run_blocks(document)
    assert capsys.readouterr().out == told
