"""Short runs of the demos on real weights: the trained, folded and exported models give the same answers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
#: What a warning or a traceback in stderr names. Other libraries may write there about the machine.
OURS = re.compile(rf"{re.escape(str(ROOT))}/(examples|hra_fx|passes)/.*")
#: A row of the demo of SmolLM2: three perplexities, and facts.
ROW = r"^  (base|plain|kept) +(\d+\.\d +\d+\.\d +\d+\.\d +\d+)% "
SMALL = r"(0\.0e\+00|\d\.\de-0[4-9])"
FOLDED = f"✓ Folded: the base model's state_dict keys, logits within {SMALL} of adapted"


def printed_by(demo: str, output: Path, **options: int) -> str:
    """The output of a demo, which fails if one of its checks does, and names what it wrote."""
    given = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{demo}.py"), "--output", str(output), *given],
        **{"capture_output": True, "text": True, "timeout": 1200},
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert not OURS.search(done.stderr), done.stderr
    named = re.findall(r"^  (\w+\.(?:html|svg|txt|onnx|gguf)) ", done.stdout, re.M)
    written = {
        path.name for path in output.iterdir() if path.suffix not in (".data", ".pt2", ".pte") and path.is_file()
    }
    assert set(named) == written
    return done.stdout


def number(pattern: str, printed: str) -> float:
    found = re.search(pattern, printed)
    assert found, f"{pattern!r} is not in:\n{printed}"
    return float(found[1])


@pytest.mark.slow  # `make test` runs the same steps in tests of each, and the README's program
def test_minilm_learns_and_is_folded_and_exported(tmp_path: Path) -> None:
    printed = printed_by("finetune_and_fold", tmp_path, train=320, test=100)
    assert re.search(FOLDED, printed), printed
    assert re.search(rf"✓ Protected: the adapters move the kept directions of each layer by at most {SMALL}", printed)
    assert re.search(rf"✓ ONNX Runtime: logits within {SMALL} of PyTorch \(batch 7, length 24\)", printed), printed
    head_only = number(r"head only +(\d+\.\d)% ", printed)
    lora, hra, protected = (
        number(rf"{name} +(\d+\.\d)% .* 165,888 ", printed) for name in ("LoRA, r = 4", "HRA, r = 8", "HRA, protected")
    )
    assert lora > head_only + 3 and min(hra, protected) > head_only + 5
    assert "about a percent between LoRA and HRA is noise (docs/results.md)." in printed


@pytest.mark.slow  # takes minutes, and tests/lora/test_llama_cpp.py runs llama.cpp
def test_smollm2_learns_keeps_what_it_knows_and_is_served(tmp_path: Path) -> None:
    printed = printed_by("smollm2_newsgroups", tmp_path, train=32, test=8)
    rows = {name: [float(cell) for cell in cells.split()] for name, cells in re.findall(ROW, printed, re.M)}
    posts, tales, tweets, facts = zip(rows["base"], rows["plain"], rows["kept"], strict=True)
    assert max(posts[1:]) < 0.9 * posts[0]
    assert tales[2] < tales[1] and tweets[2] < tweets[1] and facts[2] >= facts[1]
    assert re.search(FOLDED, printed), printed
    assert re.search(rf"✓ ONNX Runtime: logits within {SMALL} of PyTorch \(batch 4, length 64\)", printed), printed
    said = re.findall(r"^  (base|plain|kept|kept, in llama.cpp|kept, folded) +(['\"].*\S) *$", printed, re.M)
    assert len(said) == 10 and "Paris" in dict(said[:5])["base"]


@pytest.mark.slow  # tests/export/test_training_step.py compares the program without its runtimes
def test_minilm_is_trained_without_python(tmp_path: Path) -> None:
    printed = printed_by("train_on_device", tmp_path, steps=4)
    assert re.search(
        r"✓ Losses: ExecuTorch within \d\.\de-0[5-9] of PyTorch, AOTInductor within \d\.\de-0[5-9]", printed
    )
    assert "Gradients for 62,996 of 22,783,912 parameters" in printed
    assert re.search(rf"✓ PEFT loads the adapter file: logits within {SMALL}", printed), printed
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "folded", "step.pt2", "step.pte"}
