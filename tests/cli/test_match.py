"""`match` agrees with `transform` and `report`."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import transformers
from checkpoint.disk import made
from cli.conftest import Shelf
from cli.shell import Answer, answer, mistake, usage
from diffusion_models import unet

import hra_fx

CASES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "default": ([], {}),
    "names": (
        ["-t", "q_proj", "--target", "down_proj", "-r", "3"],
        {"target_modules": ["q_proj", "down_proj"], "r": 3},
    ),
    "layers": (["-t", "q_proj", "--layers", "1"], {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "pattern": (
        ["-t", "q_proj", "-l", "0-1", "--layers-pattern", "layers"],
        {"target_modules": ["q_proj"], "layers_to_transform": [0, 1], "layers_pattern": "layers"},
    ),
    "all": (["-t", "all-linear", "-x", "o_proj"], {"target_modules": "all-linear", "exclude_modules": ["o_proj"]}),
    "regex": (["--regex", r".*\.[qv]_proj"], {"target_modules": r".*\.[qv]_proj"}),
}


@pytest.mark.parametrize("name", CASES)
def test_it_predicts_transform(shelf: Shelf, name: str) -> None:
    words, fields = CASES[name]
    found = Answer("match", shelf / "my-model", *words, "--json")
    model = hra_fx.transform(copy.deepcopy(shelf.model), hra_fx.HRAConfig(**fields))
    report = hra_fx.report(model)
    assert (found.code, found.json["error"], found.json["trained_in_full"]) == (0, None, 0)
    assert [(layer["path"], layer["d"]) for layer in found.json["adapted"]] == [(row.path, row.d) for row in report]
    assert [(m["path"], m["reason"]) for m in found.json["missed"]] == [(m.path, m.reason) for m in report.skipped]
    assert found.json["trained"] == sum(row.parameters for row in report)


def test_the_configuration_of_an_adapter_and_an_option_on_top(shelf: Shelf, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"r": 4, "rank_pattern": {"layers.0.self_attn.q_proj": 6, "v_proj": 2}}
    adapter = made.adapter_of(shelf.model, tmp_path, "q_proj", "v_proj", **fields)
    assert "r = 2 to 6" in answer("inspect", adapter)
    found = Answer("match", shelf / "my-model", "--config", adapter, "--json").json
    report = hra_fx.report(hra_fx.load_adapter(copy.deepcopy(shelf.model), adapter))
    assert {layer["path"]: layer["r"] for layer in found["adapted"]} == {row.path: row.r for row in report}
    assert found["trained"] == sum(row.parameters for row in report)
    fewer = Answer("match", shelf / "my-model", "--config", shelf / "my-adapter", "-l", "0", "-r", "2", "--json").json
    assert ([layer["path"].split(".")[2] for layer in fewer["adapted"]], fewer["r"]) == (["0", "0"], 2)


def test_no_weight_is_read_or_made(shelf: Shelf, tmp_path: Path) -> None:
    """Even a model that is too large for any memory works."""
    config = json.loads((shelf / "my-model" / "config.json").read_text())
    huge = {"hidden_size": 1 << 17, "intermediate_size": 1 << 19, "num_attention_heads": 1024}
    (tmp_path / "config.json").write_text(json.dumps(config | huge))
    found = Answer("match", tmp_path, "--json").json
    assert [layer["d"] for layer in found["adapted"]] == [1 << 17] * 4
    assert found["parameters"] > 1 << 38


def test_timm_and_diffusers(tmp_path: Path) -> None:
    resnet = timm.create_model("test_resnet", num_classes=7)
    timm.models.save_for_hf(resnet, tmp_path, safe_serialization=True)
    unet().save_config(tmp_path / "unet")
    for path, model, name, library in (
        (tmp_path / "config.json", resnet, "conv2", "timm"),
        (tmp_path / "unet", unet(), "to_q", "diffusers"),
    ):
        found = Answer("match", path, "-t", name, "--json").json
        wanted = [path for path, _ in model.named_modules() if path.endswith(name)]
        assert ([layer["path"] for layer in found["adapted"]], found["library"]) == (wanted, library)


def test_what_is_named_and_cannot_be_adapted(shelf: Shelf, tmp_path: Path) -> None:
    """Gram-Schmidt of more vectors than the layer has dimensions."""
    hra_fx.HRAConfig(r=20, apply_GS=True, target_modules=["q_proj", "down_proj"]).save_pretrained(tmp_path)
    found = Answer("match", shelf / "my-model", "-c", tmp_path, "--json")
    first, second = (f"model.layers.{i}.self_attn.q_proj" for i in range(2))
    assert found.code == 1 and found.json["adapted"] == []
    assert found.json["error"].startswith(f"{first} (Linear): with `apply_GS=True`, `r` must be at most")
    assert found.json["error"].endswith(f"Also unsupported: {second}.")


def test_experts_and_layers_that_are_trained_in_full(tmp_path: Path) -> None:
    """As the report of the same configuration says."""
    words = ["-t", "q_proj", "--save", "lm_head", "--save", "model.norm", "--target-parameter", "experts.gate_up_proj"]
    fields: dict[str, Any] = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "model.norm"]}
    settings = hra_fx.HRAConfig(target_parameters=["experts.gate_up_proj"], **fields)
    config = transformers.MixtralConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict() | {"architectures": ["MixtralForCausalLM"]}))
    settings.save_pretrained(tmp_path / "adapter")
    model = hra_fx.transform(transformers.MixtralForCausalLM(config), settings)
    report = hra_fx.report(model)
    content = json.loads(report.to_json())
    for given in (words, ["--config", tmp_path / "adapter"]):
        found = Answer("match", tmp_path, *given, "--json").json
        assert [(layer["path"], layer["r"]) for layer in found["adapted"]] == [(row.path, row.r) for row in report]
        assert found["trained"] == sum(row.parameters for row in report)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert found["trained"] + found["trained_in_full"] == trained
        assert found["missed_parameters"] == content["skipped_parameters"] != []
        assert found["trained_layers"] == content["trained_in_full"]
    shown = answer("match", tmp_path, *words, columns=200)
    assert "Trained in full:\n  model.norm, lm_head\n" in shown
    assert "Not adapted: 3-D parameters, 25." in shown
    (line,) = (line.split() for line in shown.splitlines() if "hra_gate_up_proj" in line)
    assert line[:2] == ["model.layers.*.mlp.experts.hra_gate_up_proj", "2"] and line[-1] == "2,048"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-t", "vproj"], "`target_modules`: the entry 'vproj' matches no module of LlamaForCausalLM. Did "),
        (["-x", "nothing"], "`exclude_modules=['nothing']` matches no module"),
    ],
)
def test_a_name_that_matches_nothing_is_a_warning(shelf: Shelf, words: list[str], said: str) -> None:
    done = Answer("match", shelf / "my-model", "-t", "q_proj", *words, "--json")
    assert done.code == 0 and len(done.json["adapted"]) == 2
    assert done.err.startswith(f"warning: {said}")


def test_a_configuration_that_fits_nothing(shelf: Shelf) -> None:
    done = Answer("match", shelf / "my-model", "-t", "qproj", "--json")
    assert done.code == 1 and done.json["adapted"] == [] and "Did you mean 'q_proj'" in done.json["error"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--regex", "x"], "use either --target or --regex, not both"),
        (["-t", "all-linear"], "'all-linear' cannot be combined with other names"),
        (["-l", "0-9999999"], "must be an index or a range, for example 0-3,7."),
        # Without an error, an empty list would mean all blocks.
        (["-l", "7-3"], "must be an index or a range, for example 0-3,7."),
    ],
)
def test_usage_errors(shelf: Shelf, words: list[str], message: str) -> None:
    assert message in usage("match", shelf / "my-model", "-t", "q_proj", *words)


def test_a_configuration_file_with_another_name(shelf: Shelf, tmp_path: Path) -> None:
    entries = json.loads((shelf / "my-model" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(entries))
    (tmp_path / "other.json").write_text(json.dumps(entries | {"num_hidden_layers": 5}))
    shutil.copy(shelf / "my-model" / "model.safetensors", tmp_path)
    asked = Answer("match", tmp_path / "other.json", "-t", "q_proj", "--json").json
    assert len(asked["adapted"]) == 5
    for name, layers, files in (("other", 5, 0), ("config", 2, 1)):
        look = Answer("inspect", tmp_path / f"{name}.json", "--json").json
        assert (len(look["layers"]), len(look["files"])) == (layers * 7 + 1, files)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "config.json: cannot read the file as JSON ("),
        ("{}", "has none of the keys model_type, _class_name, architecture."),
        ('{"model_type": "from-tomorrow"}', "config.json: transformers cannot build the model ("),
        ('{"_class_name": "Nothing"}', "the installed diffusers has no model 'Nothing'."),
        ('{"architecture": "nothing"}', "config.json: timm cannot build the model ("),
    ],
)
def test_invalid_model_configurations(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "config.json").write_text(text)
    assert said in mistake("match", tmp_path)


@pytest.mark.parametrize("method", ["quanto", "bitsandbytes", "gptq"])
def test_quantized_weights(shelf: Shelf, tmp_path: Path, method: str) -> None:
    """Quantization by another library is reported, because `transform` would refuse its layers."""
    entries = json.loads((shelf / "my-model" / "config.json").read_text())
    quantized = {"quantization_config": {"quant_method": method, "bits": 4, "load_in_4bit": True}}
    (tmp_path / "config.json").write_text(json.dumps(entries | quantized))
    done = Answer("match", tmp_path, "-t", "q_proj", "--json")
    assert done.code == 0 and len(done.json["adapted"]) == 2
    said = (
        f"warning: {tmp_path}/config.json: the weights are quantized by {method}, but the layers before quantization "
        "are shown. hra_fx.transform supports quantized layers of bitsandbytes, torchao, gptq, awq and hqq.\n"
    )
    assert done.err == (said if method == "quanto" else "")


def test_the_code_of_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit(77)")
    entries = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(entries))
    assert "transformers cannot build the model" in mistake("match", tmp_path)
