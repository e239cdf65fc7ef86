"""The programs in `examples/usage` run without warnings and print the expected results; and the notebooks.

As stored, the notebooks are executed, small, and free of errors and local paths; they need no clone, and run again.
"""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from run_notebooks import NOTEBOOKS, ROOT, run

FOLDER = ROOT / "examples" / "usage"
SMALL = r"(0\.0e\+00|\d\.\de-0[5-9])"
EXPECTED = {
    "conv2d": ["reflections in the fx graph: 17", f"folded, .*: {SMALL}", "the base model's keys: True"],
    "distributed": [
        r"one group: ranks \(0, 1\) in 2 processes\n",
        *(f"{line}: {SMALL}" for line in ("DDP, .*", "FSDP2, .*", "a plain model", "loaded again")),
    ],
    "excluding": [r"all-linear.*: 7 layers\n  0\.attention\.self\.query.*classifier", r"block 0: 2 layers\n  1\.att"],
    "keep_the_base": [r"weight 0\.0: .* texts 0\.[2-9]", r"weight 1\.0: loss 4\.\d\d -> 0\.[12]\d, .* texts 0\.1"],
    "language_model": [r"generated: \[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12\]", "the same when folded: True"],
    "layer_ranges": [r"^model\.layers\.4.*\n.*\nmodel\.layers\.5.*\n.*v_proj.*\n$"],
    "loading": ["the same outputs: +True", r"model\.0\.hra_u must have shape", f"in PEFT, .*: {SMALL}"],
    "low_memory": ["meta device", "loaded: .*'cpu'", "the same outputs: True"],
    "onnx_hot_swap": [
        r"polite: changes a logit by up to [0-9]\.\d*[1-9]\d*",
        rf"terse: .* {SMALL}\npolite: .* {SMALL}\nroom: .* up to 0\.000, .* {SMALL}",
        f"polite, from a file .* {SMALL}",
    ],
    "protect": [r"without protect: .* \d\.\de[+-]0[01]\n", f"with protect: loss .* {SMALL}", f"folded: {SMALL}"],
    "qlora": [
        r"loss 4\.\d\d -> [12]\.\d\d",
        r"opened over 4 bits, .*: (0\.0e\+00|\d\.\de-0[4-9])",
        r"folded into the 16-bit base, loss 4\.\d\d -> [12]\.\d\d",
    ],
    "several_adapters": [f"disabled.* {SMALL}", f"at 1.0.* {SMALL}", f"folded.* {SMALL}"],
    "stable_diffusion": [f"{line}: +{SMALL}" for line in ("not trained.*", "fresh pipeline", "folded", "as LoRA, .*")],
    "trainer": [r"adapter_model\.safetensors: \d kB", r"whole run (\d\.\d{6}), after a resumed run \1"],
}
#: What a program is called with.
ARGUMENTS = {"qlora": ["--tiny"]}
#: Tests of distributed training and of adapters as inputs of ONNX graphs run the same code.
SLOW = ("distributed", "onnx_hot_swap")


def test_every_program_is_run() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == set(EXPECTED)


# PEFT uses names that transformers means to rename.
@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing\\w*` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in EXPECTED]
)
def test_a_program_prints_what_is_expected(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [name, *ARGUMENTS.get(name, [])])
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    for pattern in EXPECTED[name]:
        assert re.search(pattern, printed), f"{pattern!r} is not in:\n{printed}"


# ---- notebooks ----

NAMES = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
LOCAL = re.compile(r"(?<![\w.])/(bin|home|mnt|opt|root|tmp|usr|Users|var|venv|work)/|\b[A-Z]:\\|site-packages|file://")
LINK = re.compile(r"\]\(([^)#]+)(?:#[^)]*)?\)")


def checked(notebook: Any) -> list[str]:
    """What the cells print about equality; all ran, in order, without an error or progress bar."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [one for one in outputs if one.output_type in ("error", "display_data") or "\x1b" in str(one)]
    printed = "".join(output.text for output in outputs if output.get("name") == "stdout")
    found: list[str] = re.findall(r"^.*: (?:True|False)$", printed, re.M)
    assert found and all(claim.endswith("True") for claim in found)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_stored_notebook_is_small_and_has_only_links_that_work(name: str) -> None:
    text = (NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8")
    assert len(text) < 1_000_000 and not LOCAL.findall(text)
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    checked(notebook)
    assert "%pip install -q" in notebook.cells[1].source
    for link in (link for cell in notebook.cells if cell.cell_type == "markdown" for link in LINK.findall(cell.source)):
        assert link.startswith("https://") or (NOTEBOOKS / link).exists(), link


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_in_an_empty_folder_and_says_the_same(name: str, tmp_path: Path) -> None:
    notebook, stored = (nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4) for _ in range(2))
    run(notebook, tmp_path)
    assert checked(notebook) == checked(stored)
