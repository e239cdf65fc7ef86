"""README.md agrees with what was measured, and its programs run as they stand."""

from __future__ import annotations

import re
import statistics
import tomllib
from pathlib import Path

import pytest
import torch
import transformers
from documents import ROOT, python_blocks
from integrations.trl_use.runs import base_model
from learning.rates import final_runs
from learning.records import Record, read
from learning.summary import gain
from learning.table import SEEDS, readme_table
from tiny_tokenizer import tokenizer

import hra_fx
from hra_fx.compat import NEWER

README = (ROOT / "README.md").read_text(encoding="utf-8")
PROGRAMS = [block.text for block in python_blocks(ROOT / "README.md")]


def section(name: str, text: str = README) -> str:
    return text.split(f"\n## {name}\n")[1].split("\n## ")[0]


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip("|").split("|")]


def table(text: str) -> dict[str, list[str]]:
    """The rows of a table with numbers, by their first cell."""
    rows = [cells(line) for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in rows}


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return read()


def mean(records: list[Record], method: str, name: str) -> float:
    runs = [run for run in final_runs(records, "language", method) if run.seed in SEEDS]
    return statistics.mean(run.retention[name] for run in runs)


def test_the_results_are_those_of_the_records(records: list[Record]) -> None:
    assert readme_table(records) in README, "`make bench-learning` prints the table"


def test_what_it_says_of_protection(records: list[Record]) -> None:
    tales, tweets = (
        [mean(records, method, f"perplexity of {name}") for method in ("base", "hra-pairs", "hra-pairs-protect")]
        for name in ("tales", "tweets")
    )
    cost = gain(records, "language", "hra-pairs-protect", "hra-pairs")
    assert (
        f"rises from {tales[0]:.0f} to {tales[1]:.0f}. With other tales protected, it ends at {tales[2]:.0f}" in README
    )
    assert f"tweets end at {tweets[2]:.0f} instead of {tweets[1]:.0f} ({tweets[0]:.0f} before training)" in README
    assert f"the perplexity of the new posts is {-cost.mean:.0f} ± {cost.half:.0f} higher" in README


def test_the_speeds_are_those_of_the_benchmark() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    measured = {name: row[1:] for name, row in table(page.split("## Other costs")[0]).items()}
    told = {name: row for name, row in table(section("Speed")).items() if name}
    assert len(told) == 5
    assert told == {name: measured[name] for name in told}
    steps = [row for name, row in told.items() if re.fullmatch(r"training step, \d+ tokens", name)]
    (lora, hra) = ([float(row[column]) for row in steps] for column in (0, 1))
    said = f"A training step takes {min(lora):.3g} to {max(lora):.3g} of the time of PEFT's LoRA, and"
    assert f"{said} {min(hra):.3g} to {max(hra):.3g} of that of PEFT's HRA" in README
    (noise,) = re.findall(r"^Noise: a copy of the base model takes (.*? in inference)", page, re.MULTILINE)
    assert f"a copy of the base model took {noise}" in README


def test_the_releases_are_those_that_are_required() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lowest = [project["requires-python"], *project["dependencies"]]
    python, torch_, transformers_ = (re.sub(r"\w*>=", "", need) for need in lowest[:3])
    assert f"Python {python}, torch {torch_} and transformers {transformers_}, or later" in README
    for library, release in {(library, release) for library, release, _ in NEWER.values()}:
        assert f"need {library} {release}." in README


def test_the_times_are_those_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test"):
        (told,) = re.findall(rf"^make {target} .*\((about \d+ minutes on 2 cores)\)$", README, re.MULTILINE)
        (printed,) = re.findall(rf"^{target}: .*\n\t@echo '(.*)'$", makefile, re.MULTILINE)
        assert told in printed


def test_the_first_lines_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=99, **sizes))

    def train(model: torch.nn.Module) -> None:
        tokens = torch.randint(9, 99, (2, 16))
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.optim.AdamW(value for value in model.parameters() if value.requires_grad).step()

    exec(PROGRAMS[0], {"hra_fx": hra_fx, "model": model, "train": train})
    assert {path.name for path in tmp_path.iterdir()} == {"my-adapter", "my-lora"}


def test_the_quickstart_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base_model("SFT").save_pretrained("tiny")
    tokenizer().save_pretrained("tiny")
    program = PROGRAMS[1].replace("HuggingFaceTB/SmolLM2-135M", "tiny")
    assert program != PROGRAMS[1]
    values: dict[str, object] = {}
    exec(program, values)
    assert {path.name for path in tmp_path.iterdir()} >= {"my-adapter", "my-lora", "adapters.html", "my-folded-model"}
    assert type(values["model"]) is transformers.LlamaForCausalLM


@pytest.mark.slow
def test_graph_mode_prints_what_the_comments_say(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(PROGRAMS[2], {})
    expected = re.findall(r"^# (\[.*\])$", PROGRAMS[2], re.MULTILINE)
    assert len(expected) == 1
    assert capsys.readouterr().out.splitlines() == expected
