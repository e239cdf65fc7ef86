"""`match` agrees with `transform` and `report`."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import timm
import torch
import transformers
from cli.conftest import Shelf
from cli.shell import Answer, answer, mistake, usage

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
    "saved": (["-t", "q_proj", "--save", "lm_head"], {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
}


@pytest.mark.parametrize("name", CASES)
def test_it_predicts_transform(shelf: Shelf, name: str) -> None:
    words, fields = CASES[name]
    found = Answer("match", shelf / "my-model", *words, "--json")
    model = hra_fx.transform(copy.deepcopy(shelf.model), hra_fx.HRAConfig(**fields))
    report = hra_fx.report(model)
    assert (found.code, found.json["error"], found.json["refused"]) == (0, None, [])
    assert [(layer["path"], layer["d"]) for layer in found.json["adapted"]] == [(row.path, row.d) for row in report]
    assert [(m["path"], m["reason"]) for m in found.json["missed"]] == [(m.path, m.reason) for m in report.skipped]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.json["trained"] + found.json["trained_in_full"] == trained
    assert found.json["trained"] == sum(row.parameters for row in report)


def test_the_configuration_of_an_adapter_and_an_option_on_top(shelf: Shelf) -> None:
    plain = Answer("match", shelf / "my-model", "--config", shelf / "my-adapter", "--json").json
    assert len(plain["adapted"]) == 4
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
    timm.models.save_for_hf(timm.create_model("test_resnet", num_classes=7), tmp_path, safe_serialization=True)
    found = Answer("match", tmp_path / "config.json", "-t", "conv2", "--json").json
    wanted = [name for name, _ in timm.create_model("test_resnet").named_modules() if name.endswith("conv2")]
    assert ([layer["path"] for layer in found["adapted"]], found["library"]) == (wanted, "timm")
    unet = diffusers.UNet2DModel(
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
        sample_size=8,
        layers_per_block=1,
    )
    unet.save_config(tmp_path / "unet")
    found = Answer("match", tmp_path / "unet", "-t", "to_q", "--json").json
    wanted = [name for name, _ in unet.named_modules() if name.endswith("to_q")]
    assert ([layer["path"] for layer in found["adapted"]], found["library"]) == (wanted, "diffusers")


def test_what_is_named_and_cannot_be_adapted(shelf: Shelf, tmp_path: Path) -> None:
    """Gram-Schmidt of more vectors than the layer has dimensions."""
    (tmp_path / "config.json").write_bytes((shelf / "my-model" / "config.json").read_bytes())
    hra_fx.HRAConfig(r=20, apply_GS=True, target_modules=["q_proj", "down_proj"]).save_pretrained(tmp_path / "adapter")
    found = Answer("match", tmp_path, "-c", tmp_path / "adapter", "--json")
    assert found.code == 1
    assert [layer["path"] for layer in found.json["adapted"]] == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    assert [layer["path"] for layer in found.json["refused"]] == [
        f"model.layers.{i}.self_attn.q_proj" for i in range(2)
    ]
    shown = Answer("match", tmp_path, "-c", tmp_path / "adapter")
    assert shown.code == 1
    assert (
        "Cannot be adapted: 2 layers\n  model.layers.0.self_attn.q_proj: with `apply_GS=True`, `r` must be at most"
        in shown.out
    )


def test_experts_and_layers_that_are_trained_in_full(tmp_path: Path) -> None:
    """As the report of the same configuration says."""
    config = transformers.MixtralConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict() | {"architectures": ["MixtralForCausalLM"]}))
    words = ("-t", "q_proj", "--save", "lm_head", "--save", "embed_tokens", "--save", "model.norm")
    found = Answer("match", tmp_path, *words, "--json").json
    model = transformers.MixtralForCausalLM(config)
    fields = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens", "model.norm"]}
    report = json.loads(hra_fx.report(hra_fx.transform(model, hra_fx.HRAConfig(**fields))).to_json())
    assert found["missed_parameters"] == report["skipped_parameters"] != []
    assert found["trained_layers"] == report["trained_in_full"] == ["model.embed_tokens", "model.norm", "lm_head"]
    shown = answer("match", tmp_path, *words, columns=200)
    assert "Not adapted: 3-D parameters, 75.1%" in shown
    assert "Trained in full:\n  model.embed_tokens, model.norm, lm_head\n" in shown
    assert Answer("match", tmp_path, "-t", "q_proj", "--save", "experts", "--json").json["missed_parameters"] == []


def test_experts_that_a_configuration_names(tmp_path: Path) -> None:
    config = transformers.MixtralConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict() | {"architectures": ["MixtralForCausalLM"]}))
    names = ["experts.gate_up_proj", "1.mlp.experts.down_proj"]
    fields = hra_fx.HRAConfig(target_modules=["q_proj"], target_parameters=names, rank_pattern={"down_proj": 2})
    fields.save_pretrained(tmp_path / "adapter")
    words = ("match", tmp_path, "--config", tmp_path / "adapter")
    found = Answer(*words, "--json").json
    report = hra_fx.report(hra_fx.transform(transformers.MixtralForCausalLM(config), fields))
    # A dry run lists parameters after layers.
    assert {(layer["path"], layer["d"], layer["r"]) for layer in found["adapted"]} == {
        (row.path, row.d, row.r) for row in report
    }
    assert found["trained"] == sum(row.parameters for row in report)
    options = [word for name in names for word in ("--target-parameter", name)]
    given = Answer("match", tmp_path, "-t", "q_proj", *options, "--json").json
    assert [layer["path"] for layer in given["adapted"]] == [layer["path"] for layer in found["adapted"]]
    assert found["missed_parameters"] == json.loads(report.to_json())["skipped_parameters"] != []
    lines = [line.split() for line in answer(*words, columns=200).splitlines()]
    assert any(
        line[:2] == ["model.layers.*.mlp.experts.hra_gate_up_proj", "2"] and line[-1] == "2,048" for line in lines
    )


def test_a_name_that_matches_nothing_is_a_warning(shelf: Shelf) -> None:
    done = Answer("match", shelf / "my-model", "-t", "q_proj", "-t", "vproj", "--json")
    assert done.code == 0 and len(done.json["adapted"]) == 2
    assert done.err.startswith(
        "warning: `target_modules`: the entry 'vproj' matches no module of LlamaForCausalLM. Did "
    )


def test_an_exclusion_that_leaves_nothing_out_is_a_warning_and_not_in_the_json(shelf: Shelf) -> None:
    done = Answer("match", shelf / "my-model", "-t", "q_proj", "-x", "nothing", "--json")
    assert done.code == 0 and len(done.json["adapted"]) == 2
    assert done.err.startswith("warning: `exclude_modules=['nothing']` matches no module")


def test_a_configuration_that_fits_nothing(shelf: Shelf) -> None:
    done = Answer("match", shelf / "my-model", "-t", "qproj")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("does not match: `target_modules=['qproj']` matches no module")
    assert "Did you mean 'q_proj'" in done.err
    done = Answer("match", shelf / "my-model", "-t", "qproj", "--json")
    assert done.code == 1 and done.json["adapted"] == [] and "'q_proj'" in done.json["error"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--regex", "x"], "use either --target or --regex, not both"),
        (["-t", "all-linear"], "'all-linear' cannot be combined with other names"),
        *((["-l", text], "must be an index or a range, for example 0-3,7.") for text in ("x", "1-", "1,,2", "0.5")),
        # Without this error the list would be empty, which means all blocks.
        (["-l", "0,7-3"], "'7-3' ends before it starts, for example 0-3,7."),
        *((["-l", text], "is too large") for text in ("0-999999999999", "100000", "0-" + "9" * 5000)),
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
    look = Answer("inspect", tmp_path / "other.json", "--json").json
    beside = Answer("inspect", tmp_path / "config.json", "--json").json
    assert len(look["layers"]) == 5 * 7 + 1 and look["files"] == []
    assert len(beside["layers"]) == 2 * 7 + 1 and len(beside["files"]) == 1
    answer("visualize", tmp_path / "other.json", tmp_path / "a.dot", "--depth", "9")
    assert "model.layers.4" in (tmp_path / "a.dot").read_text()


def test_a_very_narrow_terminal_keeps_the_names(shelf: Shelf) -> None:
    for columns in (1, 20):
        text = answer("match", shelf / "my-model", "-t", "q_proj", columns=columns)
        assert ["model.layers", "2", "256"] in [line.split() for line in text.splitlines()]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "config.json: is not JSON ("),
        ("[]", "config.json: must be a JSON object, got a list."),
        ("{}", "has none of the keys model_type, _class_name, architecture."),
        ('{"model_type": "from-tomorrow"}', "config.json: transformers cannot build the model ("),
        ('{"_class_name": "Nothing"}', "the installed diffusers has no model 'Nothing'."),
        ('{"architecture": "nothing"}', "config.json: timm cannot build the model ("),
        ('{"architecture": "resnet18", "model_args": 5}', "config.json: timm cannot build the model ("),
    ],
)
def test_invalid_model_configurations(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "config.json").write_text(text)
    assert said in mistake("match", tmp_path)


@pytest.mark.parametrize(
    ("entries", "target"),
    [
        ({"architecture": "test_resnet", "model_args": None}, "conv2"),
        ({"model_type": "llama", "architectures": 5, "hidden_size": 16, "num_attention_heads": 2}, "q_proj"),
        ({"model_type": "llama", "architectures": [None], "hidden_size": 16, "num_attention_heads": 2}, "q_proj"),
    ],
)
def test_odd_entries_that_say_nothing(tmp_path: Path, entries: dict[str, Any], target: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(entries))
    assert "adapted  " in answer("match", tmp_path, "-t", target)


@pytest.mark.parametrize("method", ["gptq", "fp8", "bitsandbytes", "torchao"])
def test_quantized_weights(shelf: Shelf, tmp_path: Path, method: str) -> None:
    """Quantization by another library is reported, because `transform` would refuse its layers."""
    entries = json.loads((shelf / "my-model" / "config.json").read_text())
    quantized = {"quantization_config": {"quant_method": method, "bits": 4, "load_in_4bit": True}}
    (tmp_path / "config.json").write_text(json.dumps(entries | quantized))
    done = Answer("match", tmp_path, "-t", "q_proj", "--json")
    assert done.code == 0 and len(done.json["adapted"]) == 2
    said = (
        f"warning: {tmp_path}/config.json: the weights are quantized by {method}, but the layers before quantization "
        "are shown. hra_fx.transform supports quantized layers of bitsandbytes and torchao.\n"
    )
    assert done.err == (said if method in ("gptq", "fp8") else "")


def test_a_folder_without_one(tmp_path: Path) -> None:
    assert "config.json: no such file. Give the folder of a transformers" in mistake("match", tmp_path)
    assert "nowhere: cannot read the file (No such file or directory)." in mistake("match", tmp_path / "nowhere")


def test_the_code_of_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit(77)")
    entries = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(entries))
    assert "transformers cannot build the model" in mistake("match", tmp_path)


def test_a_model_on_the_command_line_leaves_the_default_device_alone(shelf: Shelf) -> None:
    answer("match", shelf / "my-model")
    assert torch.get_default_device().type == "cpu" and torch.ones(1).device.type == "cpu"
