"""`save_pretrained` of an adapted model: what it writes always has the adapter, and `from_pretrained` opens it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import relative_error
from tiny_models import BASES, adapted, batch, logits_of, pairs, turn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    LlamaForCausalLM,
    PreTrainedModel,
)

import hra_fx

FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
CLASSES: dict[str, Any] = {"bert": BertForSequenceClassification, "llama": LlamaForCausalLM}
AUTO: dict[str, Any] = {"bert": AutoModelForSequenceClassification, "llama": AutoModelForCausalLM}


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def stepped(kind: str, shape: str, folder: Path, **fields: object) -> Any:
    """A model over a base that was saved and opened by name, after steps that move all that is trained."""
    BASES[kind]().save_pretrained(folder / "base")
    model = adapted(kind, shape, base=CLASSES[kind].from_pretrained(folder / "base"), **fields).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch(kind)).loss.backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("fields", [{}, {"apply_GS": True}, {"bias": "hra_only"}], ids=str)
@pairs
def test_transformers_opens_the_folder_over_the_base_that_it_names(
    kind: str, shape: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    if kind == "llama" and "bias" in fields:
        fields = {"modules_to_save": ["lm_head"]}
    model = stepped(kind, shape, tmp_path, **fields)
    model.save_pretrained(tmp_path / "adapter")
    assert names_in(tmp_path / "adapter") == FILES
    named = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(tmp_path / "base")
    opened = AUTO[kind].from_pretrained(tmp_path / "adapter")
    assert type(opened) is CLASSES[kind]
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
    assert relative_error(logits_of(ours, kind), logits_of(model, kind)) < 1e-5
    assert relative_error(logits_of(plain, kind), logits_of(model, kind)) > 1e-2


def test_a_folder_that_names_no_base_is_not_opened_as_a_model_without_its_adapter(tmp_path: Path) -> None:
    model = adapted("llama", "transform")
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] is None
    for maker in (AutoModelForCausalLM, LlamaForCausalLM):
        # Which error it is, is for transformers to say; a model would be one without the adapter.
        with pytest.raises((OSError, ValueError, TypeError)):
            maker.from_pretrained(tmp_path, local_files_only=True)


REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"state_dict": {}},
        "state_dict has no entry 'model.layers.0.self_attn.q_proj.hra_u.default'. Pass the state of the whole model. "
        "With transformers' Trainer and ZeRO-3, set `stage3_gather_16bit_weights_on_model_save` to true in DeepSpeed's "
        "configuration.",
    ),
    ({"safe_serialization": False}, "safe_serialization must be True, got False: pickle files are never written."),
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
    turn(model)
    model.save_pretrained(tmp_path / "before")
    for number, change in enumerate(
        (model.merge_adapter, model.unmerge_adapter, model.disable_adapter_layers, lambda: model.set_adapter([]))
    ):
        change()
        model.save_pretrained(tmp_path / str(number))
        for name in FILES:
            assert (tmp_path / str(number) / name).read_bytes() == (tmp_path / "before" / name).read_bytes()


@pairs
def test_a_folded_model_saves_itself_in_full_again(kind: str, shape: str, tmp_path: Path) -> None:
    model = stepped(kind, shape, tmp_path)
    assert (
        relative_error(logits_of(model, kind), logits_of(CLASSES[kind].from_pretrained(tmp_path / "base"), kind)) > 1e-2
    )
    wanted = logits_of(model, kind)
    folded = hra_fx.fold(model)
    assert type(folded) is CLASSES[kind]
    assert folded.save_pretrained.__func__ is PreTrainedModel.save_pretrained
    folded.save_pretrained(tmp_path / "folded")
    assert FILES.isdisjoint(names_in(tmp_path / "folded"))
    opened, found = CLASSES[kind].from_pretrained(tmp_path / "folded", output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    assert torch.equal(logits_of(opened, kind), logits_of(folded, kind))
    assert relative_error(logits_of(opened, kind), wanted) < 1e-5
