"""README.md agrees with what was measured, and its programs run as they stand."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest
import torch
import transformers
from documents import ROOT, python_blocks
from integrations.trl_use.runs import base_model
from tiny_tokenizer import tokenizer
from zoo.models import entries
from zoo.result import BY_EXPORT, BY_FX, Result

import hra_fx
from hra_fx.compat import NEWER

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = ("benchmarks", "keep", "results")
PROGRAMS = [block.text for block in python_blocks(ROOT / "README.md")]


def table(text: str) -> dict[str, list[str]]:
    """The rows of a table, by their first cell."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:2] == "| "]
    return {row[0]: row[1:] for row in rows if row[0]}


def test_each_number_is_that_of_its_record() -> None:
    pages = {name: table((ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")) for name in PAGES}
    facts = pages["keep"]["HRA, pairs, distance on own texts"][-1].split()[0]
    step = pages["benchmarks"]["training step, 512 tokens"][1]
    lora, _, gain, *_ = (float(cell.split()[0]) for cell in pages["results"]["[language](#language), perplexity ↓"])
    told = (
        f"{float(facts):.0f}% of its facts",
        f"{step} of the time",
        f"{-gain / lora:.0%} more",
    )
    assert [claim for claim in told if claim not in README] == []


def test_the_models_are_those_of_their_record() -> None:
    results = [Result(**row) for row in json.loads((ROOT / "docs" / "zoo.json").read_text(encoding="utf-8"))["models"]]
    graphs = sum(one.traced in (BY_FX, BY_EXPORT) for one in results)
    assert f"{len(results) - graphs} models have no graph" in (ROOT / "docs/layers.md").read_text(encoding="utf-8")
    assert f"on {len(entries())} models, with none wrong" in README
    assert len(results) == len(entries()) and not any(one.failures for one in results)


def test_the_releases_are_those_that_are_required() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lowest = [project["requires-python"], *project["dependencies"]]
    python, torch_, transformers_ = (re.sub(r"\w*>=", "", need) for need in lowest[:3])
    assert f"Python {python}, torch {torch_} and transformers {transformers_}, or later" in README
    for library, release in set(NEWER.values()):
        assert f"need {library} {release}." in README


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
    assert {path.name for path in tmp_path.iterdir()} >= {"adapters.html", "my-folded-model"}
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
