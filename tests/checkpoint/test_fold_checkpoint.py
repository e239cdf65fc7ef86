"""`fold_checkpoint`: values, keys and files compared with dense products and PEFT; nothing is half-written."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import moe_models
import peft
import pytest
import torch
from checkpoints import adapter_of, base_of, bert, files_of_at_most, llama, picture, randomise, tensors
from diffusion_pipelines import unet
from oracles import dense_q, dense_weight, relative_error
from safetensors.torch import save_file
from tiny import gpt2, t5
from torch import Tensor, nn
from transformers import DebertaV2Config, DebertaV2ForMaskedLM

import hra_fx
from hra_fx.errors import CheckpointError, HRAWarning

_NEWER = pytest.mark.needs("transformers>=5.6")
ALL_LINEAR = {"target_modules": "all-linear"}
EXPERTS = {"target_parameters": moe_models.TARGETS}


def mixtral() -> Any:
    """In its files, each expert has its own matrices; the model has one tensor for all."""
    return moe_models.built("mixtral", torch.float32)


#: Model, dtype and fields of the adapter's configuration.
MODELS: dict[str, tuple[Callable[[], Any], torch.dtype, dict[str, Any]]] = {
    "Llama": (llama, torch.bfloat16, ALL_LINEAR),
    "Llama, float64, Gram-Schmidt": (llama, torch.float64, {"target_modules": ["down_proj"], "apply_GS": True}),
    "Llama, tied": (lambda: llama(tie_word_embeddings=True), torch.bfloat16, {"target_modules": ["q_proj"]}),
    "GPT-2": (gpt2, torch.float32, {"target_modules": ["c_attn", "c_proj"]}),
    "Mixtral": (mixtral, torch.bfloat16, {"target_modules": ["q_proj"]}),
    "Mixtral, experts": (mixtral, torch.float32, EXPERTS),
    "GPT-OSS, experts": (lambda: moe_models.built("gpt_oss", torch.float32), torch.float32, EXPERTS),
    "T5": (t5, torch.bfloat16, {"target_modules": ["q", "wo"]}),
    "BERT": (bert, torch.float32, {"target_modules": ["query"], "bias": "all"}),
    "BERT, a classifier": (
        lambda: bert("BertForSequenceClassification"),
        torch.bfloat16,
        {"target_modules": ["query"], "task_type": "SEQ_CLS", "modules_to_save": ["classifier"]},
    ),
}


def wanted(base: Any, adapters: list[Path]) -> dict[str, Tensor]:
    """The state of a base model with the vectors and trained tensors in the files of adapters, by dense products."""
    state = {name: tensor.double() for name, tensor in base.state_dict().items()}
    for folder in adapters:
        apply_GS = hra_fx.HRAConfig.from_pretrained(folder).apply_GS
        for key, tensor in tensors(folder).items():
            path, _, last = key.removeprefix("base_model.model.").rpartition(".")
            if last == "hra_u" and ".hra_" in path:
                name = path.replace(".hra_", ".")
                transposed = moe_models.is_transposed(base, name)
                state[name] = moe_models.dense_experts(state[name], tensor.double(), transposed, apply_GS=apply_GS)
            elif last == "hra_u":
                turned = isinstance(base.get_submodule(path), nn.Linear | nn.Conv2d)
                weight = state[f"{path}.weight"] if turned else state[f"{path}.weight"].mT
                rotated = dense_weight(weight, dense_q(tensor, apply_GS=apply_GS))
                state[f"{path}.weight"] = rotated if turned else rotated.mT
            else:
                state[f"{path}.{last}".replace(".base_layer.", ".")] = tensor.double()
    return state


def check(base: Path, out: Path, model: Any, *adapters: Path) -> None:
    """Check the values, the keys, the dtypes and the other files of a folded model."""
    before, after = tensors(base), tensors(out)
    assert {key: (t.dtype, t.shape) for key, t in before.items()} == {
        key: (t.dtype, t.shape) for key, t in after.items()
    }
    old, new = ({name: data for name, data in picture(f).items() if "safetensors" not in name} for f in (base, out))
    assert old == new
    loaded = type(model).from_pretrained(out, dtype="auto")
    state = wanted(type(model).from_pretrained(base, dtype="auto"), list(adapters))
    for name, tensor in loaded.state_dict().items():
        assert relative_error(tensor, state[name]) < 4 * torch.finfo(tensor.dtype).eps, name


@pytest.mark.parametrize("name", [pytest.param(name, marks=_NEWER) if "experts" in name else name for name in MODELS])
def test_values_keys_and_files(name: str, tmp_path: Path) -> None:
    build, dtype, fields = MODELS[name]
    model = build()
    base = base_of(model, tmp_path / "base", dtype)
    adapter = adapter_of(model, tmp_path / "adapter", **fields)
    report = hra_fx.fold_checkpoint(base, adapter, tmp_path / "out")
    check(base, tmp_path / "out", model, adapter)
    assert set(report.rotated) == {row.path for row in hra_fx.report(hra_fx.load_adapter(model, adapter))}
    assert str(report) == f"{tmp_path / 'out'}: {len(report.rotated)} layers rotated"


def test_several_adapters_are_folded_in_order_and_files_stay_small(tmp_path: Path) -> None:
    model = llama()
    base = base_of(model, tmp_path / "base", torch.float32, max_shard_size="9KB")
    first = adapter_of(model, tmp_path / "first", "q_proj", "o_proj", seed=4)
    second = adapter_of(model, tmp_path / "second", "q_proj", seed=5, r=2)
    hra_fx.fold_checkpoint(base, [first, second], tmp_path / "out")
    check(base, tmp_path / "out", model, first, second)
    sizes = [[file.stat().st_size for file in folder.glob("*.safetensors")] for folder in (base, tmp_path / "out")]
    assert len(sizes[1]) > 1 and max(sizes[1]) <= 1.1 * max(sizes[0])


@pytest.mark.parametrize("claimed", ["float32", "float16", None])
def test_each_tensor_keeps_the_dtype_of_its_file(claimed: str | None, tmp_path: Path) -> None:
    """Whatever the configuration says; and what no adapter rotates keeps its values."""
    model = llama()
    base = base_of(model, tmp_path / "base", torch.bfloat16)
    state = tensors(base)
    for name in ("model.norm.weight", "model.layers.0.input_layernorm.weight"):
        state[name] = state[name].float() + 2**-20
    save_file(state, base / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text()) | {"dtype": claimed, "torch_dtype": claimed}
    (base / "config.json").write_text(json.dumps(config))
    adapter = adapter_of(model, tmp_path / "adapter", "q_proj")
    hra_fx.fold_checkpoint(base, adapter, tmp_path / "out")
    folded = tensors(tmp_path / "out")
    assert {key: tensor.dtype for key, tensor in folded.items()} == {key: tensor.dtype for key, tensor in state.items()}
    changed = {key for key, tensor in state.items() if not torch.equal(folded[key], tensor)}
    assert changed == {key for key in state if "q_proj" in key}


def test_a_trained_head_of_tied_embeddings_is_untied(tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True)
    base = base_of(model, tmp_path / "base", torch.float32)
    with pytest.warns(HRAWarning, match=r"^model\.embed_tokens\.weight and lm_head\.weight are tied"):
        adapter = adapter_of(model, tmp_path / "adapter", "q_proj", modules_to_save=["lm_head"])
    with pytest.warns(HRAWarning, match=r"config\.tie_word_embeddings is now False"):
        hra_fx.fold_checkpoint(base, adapter, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    loaded = type(model).from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.lm_head.weight, tensors(adapter)["base_model.model.lm_head.weight"])
    assert torch.equal(loaded.model.embed_tokens.weight, tensors(base)["model.embed_tokens.weight"])


def test_a_part_of_a_pipeline_of_diffusers(tmp_path: Path) -> None:
    """The values are those of PEFT's merge."""
    model = unet()
    base = base_of(model, tmp_path / "pipe" / "unet", torch.float16)
    (tmp_path / "pipe" / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    targets = ["to_q", "to_k", "conv1", "conv_shortcut", "proj_in"]
    wrapped: Any = peft.get_peft_model(model.float(), peft.HRAConfig(r=4, target_modules=targets))
    randomise(wrapped, 3)
    wrapped.save_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=rf"is a diffusers pipeline\. Pass the folder of one part: {base}\.$"):
        hra_fx.fold_checkpoint(tmp_path / "pipe", tmp_path / "adapter", tmp_path / "out")
    hra_fx.fold_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    merged = wrapped.merge_and_unload().state_dict()
    for key, tensor in tensors(tmp_path / "out").items():
        assert tensor.dtype == torch.float16 and relative_error(tensor, merged[key]) < 1e-3, key


# ---- complete or unchanged ----

KILLED = """
import resource, signal, sys, hra_fx
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # the kernel ends the process in the middle of a write
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
hra_fx.fold_checkpoint(*sys.argv[1:])
"""


def test_a_failed_and_a_killed_call_write_nothing(tmp_path: Path) -> None:
    model = llama()
    base, out = base_of(model, tmp_path / "base", torch.float32), tmp_path / "out"
    adapter = adapter_of(model, tmp_path / "adapter", "q_proj")
    before, names = picture(tmp_path), {"base", "adapter"}
    with (
        files_of_at_most(20_000),
        pytest.raises(CheckpointError, match=f"^{out}: cannot write the result .*File too large.* folder is unchanged"),
    ):
        hra_fx.fold_checkpoint(base, adapter, out)
    assert picture(tmp_path) == before and {path.name for path in tmp_path.iterdir()} == names
    done = subprocess.run([sys.executable, "-c", KILLED, base, adapter, out], capture_output=True, check=False)
    assert done.returncode == -signal.SIGXFSZ, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == names | {".out.partial"}
    (tmp_path / ".out.partial" / "stale.txt").write_text("not in the next result")
    assert {name: data for name, data in picture(tmp_path).items() if not name.startswith(".out")} == before
    hra_fx.fold_checkpoint(base, adapter, out)
    assert {path.name for path in tmp_path.iterdir()} == names | {"out"}
    check(base, out, model, adapter)
    for full in (out, base, adapter, tmp_path):
        with pytest.raises(CheckpointError, match=f"^{full}: the output folder is not empty"):
            hra_fx.fold_checkpoint(base, adapter, full)
    with pytest.raises(CheckpointError, match="the output folder is in the base"):
        hra_fx.fold_checkpoint(base, adapter, base / "inside")


def without_a_tensor(base: Path, adapter: Path) -> None:
    state = tensors(base)
    del state["model.norm.weight"]
    save_file(state, base / "model.safetensors", {"format": "pt"})


def config_with(**fields: Any) -> Callable[[Path, Path], None]:
    def change(base: Path, adapter: Path) -> None:
        file = base / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return change


def of_another_base(base: Path, adapter: Path) -> None:
    adapter_of(llama(), adapter, "q_proj")
    save_file({key: torch.ones(5, 4) for key in tensors(adapter)}, adapter / "adapter_model.safetensors")


#: What is changed, and the message.
REFUSED: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "pickle": (
        lambda base, _: (base / "model.safetensors").rename(base / "pytorch_model.bin"),
        "base: cannot load the model (OSError: ",
    ),
    "missing tensor": (without_a_tensor, "base: the files have no model.norm.weight, which LlamaForCausalLM needs."),
    "quantized": (
        config_with(quantization_config={"quant_method": "x"}),
        "base/config.json: the weights are quantized",
    ),
    "its own code": (
        config_with(architectures=["Mine"], auto_map={"AutoModel": "mine.Mine"}),
        "base/config.json: the class of the model is code in its folder, which is not run. Load the",
    ),
    "no configuration": (lambda base, _: (base / "config.json").unlink(), "base/config.json: no such file. Pass the"),
    "no folder": (lambda base, _: shutil.rmtree(base), "base: no such file. Pass the folder of a"),
    "no adapter": (
        lambda _, adapter: shutil.rmtree(adapter),
        "adapter: no such folder. Pass the folder of",
    ),
    "another base": (of_another_base, "adapter/adapter_model.safetensors: base_model.model.model.layers.0.self_attn."),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_is_written(name: str, tmp_path: Path) -> None:
    change, message = REFUSED[name]
    model = llama()
    base, adapter = base_of(model, tmp_path / "base"), adapter_of(model, tmp_path / "adapter", "q_proj")
    change(base, adapter)
    before = picture(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        hra_fx.fold_checkpoint(base, adapter, tmp_path / "out")
    assert str(caught.value).replace(f"{tmp_path}/", "").startswith(message)
    assert picture(tmp_path) == before and not (tmp_path / "out").exists()


def test_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^adapter_dir must name at least one"):
        hra_fx.fold_checkpoint(tmp_path / "base", [], tmp_path / "out")


# ---- tensors and files that the class does not use ----


def test_what_is_not_written_and_not_copied(tmp_path: Path) -> None:
    """Tensors that the class reports or ignores, and other files of weights beside them."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = DebertaV2ForMaskedLM(DebertaV2Config(vocab_size=24, position_biased_input=False, **sizes))
    base, adapter = base_of(model, tmp_path / "base"), adapter_of(model, tmp_path / "adapter", "query_proj")
    extra = {"deberta.embeddings.position_embeddings.weight": torch.ones(4, 16), "mtp.head": torch.ones(2)}
    extra = {key: tensor.bfloat16() for key, tensor in extra.items()}
    save_file(tensors(base) | extra, base / "model.safetensors", {"format": "pt"})
    for name in ("model.fp16.safetensors", "pytorch_model.bin.index.json", "2_Dense/model.safetensors"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_bytes(b"{}")
    with pytest.warns(HRAWarning) as caught:
        hra_fx.fold_checkpoint(base, adapter, tmp_path / "out")
    assert [(str(each.message), each.filename) for each in caught] == [
        (
            f"{tmp_path}/out: has no {', '.join(extra)}, which the class of the model does not use, or ties to others.",
            __file__,
        )
    ]
    missing = {"model.fp16.safetensors", "pytorch_model.bin.index.json"}
    assert picture(base).keys() - picture(tmp_path / "out").keys() == missing


def test_files_that_transformers_would_not_write_are_copied(tmp_path: Path) -> None:
    """A generation config that it loads, but refuses to save; and entries of other programs."""
    model = llama()
    base, adapter = base_of(model, tmp_path / "base"), adapter_of(model, tmp_path / "adapter", "q_proj")
    (base / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.6, "top_p": 0.9}')
    config_with(of_mine={"a": 1})(base, adapter)
    hra_fx.fold_checkpoint(base, adapter, tmp_path / "out")
    check(base, tmp_path / "out", model, adapter)
