"""`save_pretrained` of an adapted model: what it writes, opens and uploads, and the model card."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from adapting import randomise
from huggingface_hub import ModelCard
from one_hub import one_hub
from oracles import relative_error
from packaging.version import Version
from tiny_models import BASES, adapted, logits_of, trainer_of
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    LlamaForCausalLM,
    Trainer,
)

import hra_fx
from hra_fx.checkpoint.card import PLACE

FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
CLASSES: dict[str, Any] = {"bert": BertForSequenceClassification, "llama": LlamaForCausalLM}
AUTO: dict[str, Any] = {"bert": AutoModelForSequenceClassification, "llama": AutoModelForCausalLM}


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def over_a_named_base(kind: str, shape: str, folder: Path, **fields: object) -> Any:
    """A model over a base that was saved and opened by name, with random values for all that is trained."""
    BASES[kind]().save_pretrained(folder / "base")
    model = adapted(kind, shape, base=CLASSES[kind].from_pretrained(folder / "base"), **fields)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(
    ("kind", "shape", "fields"),
    [
        ("bert", "transform", {"bias": "hra_only", "r": 4}),
        ("llama", "HRAModel", {"apply_GS": True}),
        ("llama", "transform", {"modules_to_save": ["lm_head"]}),
    ],
)
def test_transformers_opens_the_folder_over_the_base_that_it_names(
    kind: str, shape: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    model = over_a_named_base(kind, shape, tmp_path, **fields)
    model.save_pretrained(tmp_path / "adapter")
    assert names_in(tmp_path / "adapter") == FILES
    named = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(tmp_path / "base")
    opened = AUTO[kind].from_pretrained(tmp_path / "adapter")
    assert type(opened) is CLASSES[kind]
    if Version(transformers.__version__) < Version("5.20") and (kind == "bert" or "modules_to_save" in fields):
        pytest.xfail("transformers does not load trained copies")
    assert relative_error(logits_of(opened, kind), logits_of(model, kind)) < 1e-5
    # What the Trainer resumes from lies next to the adapter, and is not taken for the model.
    model.save_pretrained(tmp_path / "checkpoint-3")
    assert names_in(tmp_path / "checkpoint-3") == FILES | {"model.safetensors"}
    for maker in (AUTO[kind], CLASSES[kind]):
        opened = maker.from_pretrained(tmp_path / "checkpoint-3", local_files_only=True)
        assert relative_error(logits_of(opened, kind), logits_of(model, kind)) < 1e-5
    plain = CLASSES[kind].from_pretrained(tmp_path / "base")
    loaded = CLASSES[kind].from_pretrained(tmp_path / "base")
    loaded.load_adapter(str(tmp_path / "adapter"))  # of transformers, which calls PEFT
    assert relative_error(logits_of(loaded, kind), logits_of(model, kind)) < 1e-5
    ours = hra_fx.from_peft(loaded)
    assert ours is loaded and not ours._hf_peft_config_loaded
    assert relative_error(logits_of(ours, kind), logits_of(model, kind)) < 1e-5
    assert relative_error(logits_of(plain, kind), logits_of(model, kind)) > 1e-2


REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"state_dict": {}},
        "state_dict has no entry 'model.layers.0.self_attn.q_proj.hra_u.default'. Pass the state of the whole model. "
        "With transformers' Trainer and ZeRO-3, set `stage3_gather_16bit_weights_on_model_save` to true in DeepSpeed's "
        "configuration.",
    ),
    ({"push_to_hub": True}, "push_to_hub=True was removed in 0.5. Call hra_fx.push_to_hub(model, repo_id)."),
    ({"selected_adapters": ["other"]}, "the model has no adapter 'other'. It has 'default'."),
    ({"selected_adapters": []}, "selected_adapters must not be empty. Use None to save all adapters."),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_is_refused_writes_nothing(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(hra_fx.AdapterError, match=f"^{re.escape(message)}$"):
        adapted("llama", "transform").save_pretrained(tmp_path, **options)
    assert names_in(tmp_path) == set()


def test_the_adapter_is_written_whether_it_is_merged_disabled_or_inactive(tmp_path: Path) -> None:
    model = adapted("llama", "HRAModel")
    randomise(model)
    model.save_pretrained(tmp_path / "before")
    for number, change in enumerate(
        (model.merge_adapter, model.unmerge_adapter, model.disable_adapter_layers, lambda: model.set_adapter([]))
    ):
        change()
        model.save_pretrained(tmp_path / str(number))
        for name in FILES:
            assert (tmp_path / str(number) / name).read_bytes() == (tmp_path / "before" / name).read_bytes()


def test_the_code_of_a_card_runs_and_a_card_of_the_users_keeps_its_text(tmp_path: Path) -> None:
    model, path = over_a_named_base("llama", "HRAModel", tmp_path), tmp_path / "adapter" / "README.md"
    model.save_pretrained(path.parent)
    (load,) = re.findall(r"```python\n(.*?)```", path.read_text().replace(PLACE, str(path.parent)), re.S)
    names: dict[str, Any] = {"base": LlamaForCausalLM.from_pretrained(tmp_path / "base")}
    exec(load, names)
    assert relative_error(logits_of(names["model"], "llama"), logits_of(model, "llama")) < 1e-5
    tags = ["hra", "hra_fx", "transformers"]
    # A folder cannot be named as the base model: the Hub refuses such a card.
    assert ModelCard.load(path).data.to_dict() == {"library_name": "peft", "tags": tags}
    model.name_or_path = model.peft_config["default"].base_model_name_or_path = "user/base"
    model.create_or_update_model_card(tmp_path / "new")
    card = ModelCard.load(tmp_path / "new" / "README.md")
    assert (card.data.base_model, card.data.tags) == ("user/base", ["base_model:adapter:user/base", *tags])
    assert card.text.lstrip().startswith("# HRA adapter of user/base\n")

    text = "---\nlicense: mit\ntags:\n- poems\n---\n\n# Mine\n"
    path.write_text(text)
    model.save_pretrained(path.parent)
    assert path.read_text() == text
    model.create_or_update_model_card(path.parent)
    card = ModelCard.load(path)
    assert (card.text.strip(), card.data.license) == ("# Mine", "mit") and {*tags, "poems"} < {*card.data.tags}


def test_the_trainers_card_gets_the_metadata(tmp_path: Path) -> None:
    trainer = trainer_of(Trainer, "llama", adapted("llama", "transform"), tmp_path)
    trainer.save_model()
    trainer.create_model_card(model_name="mine")
    card = ModelCard.load(tmp_path / "README.md")
    assert "# mine" in card.text and "hra_fx" in card.data.tags and card.data.library_name == "peft"


def test_push_to_hub_uploads_what_save_pretrained_writes(tmp_path: Path) -> None:
    model = adapted("llama", "HRAModel")
    with one_hub() as files:
        url = model.push_to_hub("user/name", token="hf_x", commit_message="Mine")
        assert url.endswith("/user/name/commit/1")
        model.save_pretrained(tmp_path)
        assert files == {name: (tmp_path / name).read_bytes() for name in FILES}
        # The card of the repository is somebody's by now.
        files["README.md"] = b"# Mine"
        hra_fx.add_adapter(model, "second", hra_fx.HRAConfig(r=2, target_modules=["q_proj"]))
        model.push_to_hub("user/name", token="hf_x")
        assert files.keys() == {*FILES, "second/adapter_config.json", "second/adapter_model.safetensors"}
        assert files["README.md"] == b"# Mine"
        files.clear()
        model.push_to_hub("user/name", selected_adapters=["default"], token="hf_x")
        assert files.keys() == FILES
