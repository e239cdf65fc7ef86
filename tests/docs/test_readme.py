"""README.md and docs/comparison.md agree with what was measured, and the programs of the README run as they stand."""

from __future__ import annotations

import re
import statistics
import tomllib
from collections.abc import Iterable
from pathlib import Path

import features
import pytest
import torch
import transformers
from documents import ROOT, python_blocks
from integrations.trl_use.runs import base_model, tokenizer
from learning import comparison, forgiving, kept, sequence
from learning.page import readme_table
from learning.plan import SEEDS
from learning.rates import final_runs
from learning.records import read
from learning.summary import difference, gain, retention_gain

import hra_fx
from hra_fx.compat import NEWER

README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
COMPARISON = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")
PROGRAMS = [block.text for block in python_blocks(ROOT / "README.md")]
PROSE = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)


def cells(row: str) -> list[str]:
    return [cell.replace("\N{NO-BREAK SPACE}", " ").strip() for cell in row.strip("|").split("|")]


def speed_rows(text: str) -> dict[str, list[str]]:
    """The last three columns of each row whose last ones are ratios: over PEFT's LoRA, PEFT's HRA and the base."""
    rows = [cells(line) for line in text.splitlines() if re.search(r"^\| .*\| \d\.\d+ \|$", line)]
    return {row[0]: row[-3:] for row in rows}


def listed(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}"


def section(name: str, text: str = README) -> str:
    return text.split(f"\n## {name}\n")[1].split("\n## ")[0]


def section_of_guide(name: str) -> str:
    """The text below a heading of docs/training.md, up to the next one."""
    return re.split(r"\n##+ ", GUIDE.split(f"# {name}\n")[1])[0]


def comparison_rows(name: str) -> list[str]:
    """The rows of the tables in a section."""
    return [line for line in section(name, COMPARISON).splitlines() if line.startswith("|") and line[:3] != "|--"]


def test_it_is_short_and_its_results_are_those_of_the_records() -> None:
    assert len(README.splitlines()) <= 150
    assert readme_table(read()) in README, "write the table of learning.page.readme_table(read())"
    assert comparison.scores_table(read()) in COMPARISON, "PYTHONPATH=benchmarks python -m learning --page writes it"
    assert comparison.costs_table(read()) in COMPARISON, "PYTHONPATH=benchmarks python -m learning --page writes it"
    assert kept.guide_table(read()) in GUIDE, "write the table of learning.kept.guide_table(read())"


def test_what_it_says_of_protection() -> None:
    def mean(method: str, name: str) -> float:
        runs = [run for run in final_runs(read(), "language", method) if run.seed in SEEDS]
        return statistics.mean(run.retention[name] for run in runs)

    tales, tweets = (
        [mean(method, f"perplexity of {name}") for method in ("base", "hra-pairs", "hra-pairs-protect")]
        for name in ("tales", "tweets")
    )
    cost = kept.gain_over_base(read(), "language", "hra-pairs-protect")
    assert (
        f"rises from {tales[0]:.0f} to {tales[1]:.0f}. With other tales protected, it ends at {tales[2]:.0f}" in README
    )
    assert f"tweets end at {tweets[2]:.0f} instead of {tweets[1]:.0f} ({tweets[0]:.0f} before training)" in README
    assert f"the perplexity of the new posts is {-cost.mean:.0f} ± {cost.half:.0f} higher" in README
    runs = [[run.test for run in final_runs(read(), "language", method)] for method in ("hra-pairs", "lora")]
    pairs, lora = (statistics.mean(score for score in scores if score is not None) for scores in runs)
    more = f"{100 * (pairs / lora - 1):.0f}%"
    behind = gain(read(), "language", "hra-pairs", "lora")
    assert f"{more} more perplexity on SmolLM2 ({-behind.mean:.1f} ± {behind.half:.1f} points" in README
    assert f"HRA's perplexity is {more} higher" in README


def test_what_the_guide_says_of_directions_and_samples() -> None:
    def kept(ending: str, name: str) -> str:
        (run,) = (run for run in final_runs(read(), "language", f"hra-pairs-protect{ending}") if run.seed == 0)
        return f"{run.retention[name] if name else run.test:.0f}"

    counts = ("-4", "", "-32", "-64")
    tales, facts, posts = ([kept(one, name) for one in counts] for name in ("perplexity of tales", "facts, %", ""))
    guide = " ".join(GUIDE.split())
    assert f"tales end at {listed(tales)}, the model completes {listed(f'{one}%' for one in facts)} of" in guide
    assert f"and the perplexity of new posts is {listed(posts)}." in guide
    few, other, energy, more = (
        kept(f"-{one}", "perplexity of tales") for one in ("few", "other", "energy", "energy-16")
    )
    assert f"with 8 passages instead of 64, tales end at {few}." in guide
    assert f"tales end at {other}, and tweets at {kept('-other', 'perplexity of tweets')} (one seed)" in guide
    assert f"contain 80%, tales end at {energy}; with at least 16 in each layer, at {more} (one seed)" in guide


def test_what_the_guide_says_of_quiet_pairs() -> None:
    better = gain(read(), "language", "hra-quiet", "hra-pairs")
    facts = retention_gain(read(), "language", "hra-quiet", "hra-pairs", "facts, %")
    guide = " ".join(GUIDE.split())
    assert f"the perplexity of new posts is {better.mean:.1f} ± {better.half:.1f} lower than in plain pairs" in guide
    assert f"(difference {facts.mean:+.0f} ± {facts.half:.0f})" in guide


def test_what_the_guide_says_of_several_tasks() -> None:
    results = sequence.read()
    runs = {name: sequence.chosen(results, name, sequence.DIRECTIONS) for name in sequence.SEQUENCES}
    ends = {name: {one.seed: one.scores[1] for one in found} for name, found in runs.items()}
    end = {name: f"{statistics.mean(found.values()):.1f}%" for name, found in ends.items()}
    protected, plain = (
        statistics.mean(after - at_end for after, at_end in (one.scores for one in runs[name]))
        for name in ("hra-pairs-protect", "hra-pairs")
    )
    text = " ".join(section_of_guide("Several tasks, one after the other").split())
    assert f"on all six is {end['hra-pairs-protect']} with protection and {end['hra-pairs']} without" in text
    assert f"{protected:.1f} and {plain:.1f} points of what each task had reached are lost" in text
    assert f"merged after each task, it is {end['lora']}, with full fine-tuning {end['full']}," in text
    assert f"a head for each task {end['head']}." in text
    above = difference(ends["hra-pairs-protect"], ends["lora"])
    assert f"ends {above.mean:.1f} ± {above.half:.1f} points above LoRA" in text


def test_what_they_say_of_wrong_rates() -> None:
    def lost(method: str) -> list[str]:
        tasks = [task for task, (_, methods) in forgiving.PLAN.items() if method in methods]
        parts = forgiving.summary({task: forgiving.lost(read(), task, method) for task in tasks})
        return [f"{100 * part:.0f}%" for part in parts]

    lora, pairs, quiet = map(lost, ("lora", "hra-pairs", "hra-quiet"))
    guide = " ".join(GUIDE.split())
    assert f"LoRA loses {lora[1]} of what training gains" in README
    assert f"HRA loses {pairs[1]}, and {quiet[1]} with [quiet pairs]" in README
    assert f"LoRA loses {lora[1]} of it, pairs {pairs[1]}, and quiet pairs {quiet[1]}." in guide
    assert f"LoRA loses {lora[0]}, pairs {pairs[0]}, and quiet pairs {quiet[0]}." in guide
    assert f"all lose about as much ({lora[2]}, {pairs[2]}, {quiet[2]})" in guide


def test_the_speeds_are_those_of_the_benchmark() -> None:
    benchmarks = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    measured = speed_rows(benchmarks.split("## Training and inference")[0])
    told = speed_rows(section("Speed"))
    assert len(told) >= 5
    assert told == {name: measured[name] for name in told}
    steps = [row for name, row in measured.items() if re.fullmatch(r"training step, \d+ tokens", name)]
    (lora, hra) = ([float(row[column]) for row in steps] for column in (0, 1))
    said = f"A training step takes {min(lora):.3g} to {max(lora):.3g} of the time of PEFT's LoRA, and"
    assert f"{said} {min(hra):.3g} to {max(hra):.3g} of that of PEFT's HRA" in README
    noise = re.findall(r"^Noise: a copy of the base model takes (.*)\.$", benchmarks, re.MULTILINE)
    assert (
        f"a copy of the base model took {noise[0]} of its time in training steps, and {noise[2]} in inference" in README
    )
    compared = comparison_rows("Speed and memory")
    assert len(compared) == 8 and set(compared) <= set(benchmarks.splitlines())


def test_the_costs_of_pairs_of_host_time_and_of_few_tokens_are_measured() -> None:
    measured = (ROOT / "docs" / "measurements.md").read_text(encoding="utf-8")
    steps = re.findall(
        r"^AdamW.*: pairs ([\d.]+), .* PEFT's LoRA ([\d.]+)$", section("bench-pairs", measured), re.MULTILINE
    )
    more = sorted(100 * (float(pairs) - 1) for pairs, _ in steps)
    over = sorted(float(pairs) / float(lora) for pairs, lora in steps)
    assert f"adds [{more[0]:.0f} to {more[-1]:.0f}%](docs/training.md#train-in-pairs)" in README
    assert f"which then takes {over[0]:.2f} to {over[-1]:.2f} of the time of LoRA with as many parameters" in README
    (layers,) = re.findall(r"^(\d+) adapted layers, torch", section("bench-host", measured), re.MULTILINE)
    assert f"With {layers} adapted layers, hra_fx adds" in README
    host = re.findall(r"^\w.* hra_fx (\d\.\d+), PEFT LoRA 1\.00", section("bench-host", measured), re.MULTILINE)
    said = "{} of the host time that PEFT's LoRA adds in training, {} in a forward pass without gradients, and {} in"
    assert said.format(*host) in README
    width, tokens, ratio = re.findall(
        r"d=(\d+), (\d+) tokens, training step\n(?:.*\n)*?  hra_fx .* (\d\.\d+) of PEFT LoRA$", measured, re.MULTILINE
    )[0]
    assert f"[{ratio} of LoRA's time](docs/measurements.md#bench-peft) for {tokens} tokens" in README
    assert f"all projections of width {width}" in README


def test_every_other_number_with_a_fraction_is_a_version() -> None:
    told = PROSE.replace(readme_table(read()), "").replace(section("Speed"), "")
    told = re.sub(r"^- \*\*(Costs|Learns) .*$", "", told, flags=re.MULTILINE)  # other tests compare their numbers
    told = re.sub(r"!?\[[^\]]*\]\([^)]*\)|(Python|torch|transformers) \d+\.\d+\+?", "", told)
    assert re.findall(r"\d+\.\d+", told) == []


def test_the_releases_are_those_that_are_required() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lowest = [project["requires-python"], *project["dependencies"]]
    python, torch_, transformers_ = (re.sub(r"\w*>=", "", need) for need in lowest[:3])
    assert f"Python {python}, torch {torch_} and transformers {transformers_}, or later" in README
    for library, release in {(library, release) for library, release, _ in NEWER.values()}:
        assert f"need {library} {release}." in README


def test_the_number_of_models_and_the_times() -> None:
    (models_tested,) = re.findall(r"^\| models \| (\d+) \|$", (ROOT / "docs" / "zoo.md").read_text(), re.MULTILINE)
    assert f"tested on {models_tested} models" in README
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test"):
        (told,) = re.findall(rf"^make {target} .*\((about \d+ minutes on 2 cores)\)$", README, re.MULTILINE)
        (printed,) = re.findall(rf"^{target}: .*\n\t@echo '(.*)'$", makefile, re.MULTILINE)
        assert told in printed


def test_the_first_lines_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=99, **sizes)).save_pretrained("tiny")
    model = transformers.AutoModelForCausalLM.from_pretrained("tiny")
    samples = [{"input_ids": torch.randint(0, 9, (8, 16))} for _ in range(4)]

    def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        tokens = torch.randint(9, 99, (2, 16))
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()

    exec(PROGRAMS[0], {"hra_fx": hra_fx, "torch": torch, "model": model, "samples": samples, "train": train})
    assert {path.name for path in tmp_path.iterdir()} == {"tiny", "my-adapter", "my-lora"}


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


def test_graph_mode_prints_what_the_comments_say(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(PROGRAMS[2], {})
    expected = re.findall(r"^# (\[.*\])$", PROGRAMS[2], re.MULTILINE)
    assert len(expected) == 1
    assert capsys.readouterr().out.splitlines() == expected


def test_the_features_are_those_that_were_tried() -> None:
    for row, (label, probe) in zip(comparison_rows("Features")[1:], features.PROBES.items(), strict=True):
        cells = [features.tried(probe, adapt)[0] for adapt in features.METHODS.values()]
        assert row == f"| {label} | {' | '.join(cells)} |"
