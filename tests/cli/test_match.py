"""`match` agrees with `transform` and `report`."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from checkpoints import adapter_of
from cli.conftest import Shelf
from cli.shell import Answer, answer, mistake, usage
from diffusion_pipelines import unet
from torch import nn

import hra_fx


def check(path: Path, words: list[Any], adapted: nn.Module) -> dict[str, Any]:
    """Compare the JSON for a folder with the report of the adapted model, whose weights have values."""
    done, content = Answer("match", path, *words, "--json"), json.loads(hra_fx.report(adapted).to_json())
    found = done.json
    assert (done.code, found["error"]) == (0, None)
    known = ("path", "layer_type", "d", "r", "parameters")
    assert [[row[name] for name in known] for row in found["rows"]] == [
        [row[name] for name in known] for row in content["rows"]
    ]
    for name in ("skipped", "trained_in_full"):
        assert found[name] == content[name]
    assert found["trainable"] == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    return found  # type: ignore[no-any-return]


NAMES = {"target_modules": ["q_proj", "down_proj"], "r": 3}
BLOCKS = {"target_modules": ["q_proj"], "layers_to_transform": [0, 1], "layers_pattern": "layers"}
CASES: dict[str, dict[str, Any]] = {
    "": {},
    "-t q_proj --target down_proj -r 3": NAMES,
    "-t q_proj --layers 1": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "-t q_proj -l 0-1 --layers-pattern layers": BLOCKS,
    "-t all-linear -x o_proj": {"target_modules": "all-linear", "exclude_modules": ["o_proj"]},
    r"--regex .*\.[qv]_proj": {"target_modules": r".*\.[qv]_proj"},
}


@pytest.mark.parametrize("words", CASES)
def test_match_predicts_transform(shelf: Shelf, words: str) -> None:
    adapted = hra_fx.transform(copy.deepcopy(shelf.model), hra_fx.HRAConfig(**CASES[words]))
    check(shelf / "my-model", words.split(), adapted)


def test_options_override_the_configuration_of_an_adapter(shelf: Shelf, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"r": 4, "rank_pattern": {"layers.0.self_attn.q_proj": 6, "v_proj": 2}}
    adapter = adapter_of(shelf.model, tmp_path, "q_proj", "v_proj", **fields)
    loaded = hra_fx.load_adapter(copy.deepcopy(shelf.model), adapter, is_trainable=True)
    check(shelf / "my-model", ["--config", adapter], loaded)
    fewer = Answer("match", shelf / "my-model", "--config", shelf / "my-adapter", "-l", "0", "-r", "2", "--json").json
    assert [(row["path"].split(".")[2], row["r"]) for row in fewer["rows"]] == [("0", 2), ("0", 2)]


def test_a_file_with_another_name_and_a_model_that_is_too_large_for_any_memory(shelf: Shelf, tmp_path: Path) -> None:
    config = json.loads((shelf / "my-model" / "config.json").read_text())
    huge = {"hidden_size": 1 << 17, "intermediate_size": 1 << 19, "num_attention_heads": 1024}
    (tmp_path / "other.json").write_text(json.dumps(config | huge))
    found = Answer("match", tmp_path / "other.json", "--json").json
    assert [row["d"] for row in found["rows"]] == [1 << 17] * 4
    assert found["parameters"] > 1 << 38


def test_a_model_of_diffusers(tmp_path: Path) -> None:
    unet().save_config(tmp_path)
    adapted = hra_fx.transform(unet(), hra_fx.HRAConfig(target_modules=["to_q"]))
    assert check(tmp_path, ["-t", "to_q"], adapted)["library"] == "diffusers"


def test_experts_and_layers_that_are_trained_in_full(tmp_path: Path) -> None:
    words = ["-t", "q_proj", "--save", "lm_head", "--save", "model.norm", "--target-parameter", "experts.gate_up_proj"]
    fields: dict[str, Any] = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "model.norm"]}
    settings = hra_fx.HRAConfig(target_parameters=["experts.gate_up_proj"], **fields)
    config = transformers.MixtralConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict() | {"architectures": ["MixtralForCausalLM"]}))
    adapted = hra_fx.transform(transformers.MixtralForCausalLM(config), settings)
    check(tmp_path, words, adapted)
    shown = answer("match", tmp_path, *words, columns=200)
    assert "Trained in full:\n  model.norm, lm_head\n" in shown
    assert "target_parameters=['experts.down_proj']" in shown
    (line,) = (line.split() for line in shown.splitlines() if "hra_gate_up_proj" in line)
    assert line[:2] == ["model.layers.*.mlp.experts.hra_gate_up_proj", "x2"] and line[-1] == "2,048"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("-t q_proj -t vproj", "warning: `target_modules`: ['vproj'] match no module of Llama"),
        ("-t q_proj -x nothing", "warning: `exclude_modules=['nothing']` matches no module"),
        ("-t qproj", "does not match: `target_modules=['qproj']` matches no module of LlamaForCausalLM. Avail"),
    ],
)
def test_warnings_and_configurations_that_do_not_match(shelf: Shelf, words: str, said: str) -> None:
    done, fits = Answer("match", shelf / "my-model", *words.split(), "--json"), said.startswith("warning")
    assert (done.code, len(done.json["rows"])) == ((0, 2) if fits else (1, 0))
    assert done.err.startswith(said) and (fits or f"does not match: {done.json['error']}\n" == done.err)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--regex x", "use either --target or --regex, not both"),
        ("-l 0-9999999", "must be an index or a range, for example 0-3,7."),
        # Without an error, an empty list would mean all blocks.
        ("-l 7-3", "must be an index or a range, for example 0-3,7."),
    ],
)
def test_usage_errors(shelf: Shelf, words: str, message: str) -> None:
    assert message in usage("match", shelf / "my-model", "-t", "q_proj", *words.split())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", ": cannot build the model (JSONDecodeError: "),
        ("{}", "has none of the keys model_type, _class_name."),
        ('{"_class_name": "Nothing"}', "the installed diffusers has no model 'Nothing'."),
        ('{"architecture": "resnet18"}', "For any other model: Load the model yourself, then call hra_fx.load_adapter"),
        (
            '{"model_type": "evil", "auto_map": {"AutoModel": "evil.M"}}',
            "code in its folder, which is not run. Load the model",
        ),
    ],
)
def test_invalid_model_configurations(tmp_path: Path, text: str, said: str) -> None:
    """Code in the folder is not run."""
    (tmp_path / "evil.py").write_text("raise SystemExit(77)")
    (tmp_path / "config.json").write_text(text)
    assert said in mistake("match", tmp_path)
