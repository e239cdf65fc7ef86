"""Every program in `examples/usage` runs without warnings and prints the expected results."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "usage"
SMALL = r"(0\.0e\+00|\d\.\de-0[5-9])"
EXPECTED = {
    "conv2d": ["reflections in the fx graph: 17", f"folded, .*: {SMALL}", "the base model's keys: True"],
    "distributed": [
        r"started by this program\none group: ranks \(0, 1\) in 2 processes\n",
        r"one process: \d\.\d+ -> \d\.\d+",
        f"DDP, .*: {SMALL}",
        f"FSDP2, .*: {SMALL}",
        f"a plain model: {SMALL}",
        f"the shards, 4 of them, loaded again: {SMALL}",
    ],
    "excluding": [r"all-linear.*: 7 layers\n  0\.attention\.self\.query.*classifier", r"block 0: 2 layers\n  1\.att"],
    "language_model": [r"generated: \[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12\]", "the same when folded: True"],
    "layer_ranges": [r"^model\.layers\.4.*\n.*\nmodel\.layers\.5.*\n.*v_proj.*\n$"],
    "loading": ["the same outputs: +True", r"model\.0\.hra_u must have shape", f"in PEFT, .*: {SMALL}"],
    "low_memory": ["meta device", "loaded: .*'cpu'", "the same outputs: True"],
    "onnx_hot_swap": [
        "the graph: 4 inputs",
        f"polite: changes a logit by up to [0-9]\\.\\d*[1-9]\\d*, differs from PyTorch by {SMALL}",
        f"terse: .* {SMALL}\npolite: .* {SMALL}\nroom: .* up to 0\\.000, .* {SMALL}",
        f"polite, from a file .* {SMALL}",
    ],
    "qlora": [
        r"trained over 4 bits, loss 4\.\d\d -> [12]\.\d\d",
        f"opened over 4 bits, .*: {SMALL}",
        r"as LoRA over 4 bits, .*: \d\.\de-0[2-9]",
        r"folded into the 16-bit base, loss 4\.\d\d -> [12]\.\d\d",
    ],
    "several_adapters": [f"disabled.* {SMALL}", f"at 1.0.* {SMALL}", f"combined.* {SMALL}", f"folded.* {SMALL}"],
    "stable_diffusion": [
        f"not trained.*: {SMALL}",
        f"fresh pipeline: +{SMALL}",
        f"folded: +{SMALL}",
        f"as LoRA, .*: +{SMALL}",
    ],
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
