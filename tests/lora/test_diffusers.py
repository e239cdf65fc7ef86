"""`save_as_lora` of diffusers pipelines: diffusers draws the images of the adapted pipeline with the LoRA."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
from adapting import randomise
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers
from diffusion_pipelines import flux, image, stable_diffusion, stable_diffusion_3, stable_diffusion_xl
from oracles import relative_error
from safetensors import safe_open
from torch import Tensor, nn

import hra_fx
from hra_fx.errors import AdapterError, CheckpointError, HRAError, UnsupportedLayerError

NAME = "pytorch_lora_weights.safetensors"
#: Convolutions of 3x3, 1x1 and with a stride, and linear layers inside and outside of the attentions.
UNET = ["to_q", "to_out.0", "ff.net.2", "proj_in", "conv", "conv1", "conv_shortcut", "conv_in", "time_emb_proj"]
CLIP = ["q_proj", "out_proj", "fc1"]
PIPELINES: dict[Callable[[], Any], dict[str, Any]] = {
    stable_diffusion: {"unet": UNET, "text_encoder": CLIP},
    stable_diffusion_xl: {"unet": UNET, "text_encoder": CLIP, "text_encoder_2": [*CLIP, "text_projection"]},
    stable_diffusion_3: {
        "transformer": ["to_q", "add_k_proj", "proj_out", "proj", "linear"],
        "text_encoder": CLIP,
        "text_encoder_2": ["text_projection"],
    },
    flux: {"transformer": ["to_q", "proj_out", "x_embedder"]},
}


def adapt(model: nn.Module, targets: Any, name: str = "default", *, seed: int = 1, **fields: Any) -> None:
    """Add an adapter that rotates far."""
    config = hra_fx.HRAConfig(r=3, target_modules=targets, **fields)
    if any(".hra_u." in key for key, _ in model.named_parameters()):
        hra_fx.add_adapter(model, name, config)
    else:
        hra_fx.transform(model, config, name)
    randomise(model, name, seed=seed)


def adapted(make: Callable[[], Any] = stable_diffusion, targets: Mapping[str, Any] | None = None, **fields: Any) -> Any:
    pipe = make()
    for part, names in (targets or PIPELINES[make]).items():
        adapt(getattr(pipe, part), names, **fields)
    return pipe


def change_error(drawn: Tensor, wanted: Tensor, base: Tensor) -> float:
    """`|drawn - wanted|` relative to the change of the image, which must be large."""
    assert relative_error(wanted, base) > 0.02
    return relative_error(drawn - base, wanted - base)


def stored(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of the file, and the configurations in its metadata."""
    with safe_open(folder / NAME, "pt") as file:
        metadata = file.metadata()
        assert metadata["format"] == "pt"
        return {key: file.get_tensor(key) for key in file.keys()}, json.loads(metadata["lora_adapter_metadata"])  # noqa: SIM118


#: A list of targets matching `proj_out` also matches `single_transformer_blocks.0.proj_out`; the last one is a regex.
@pytest.mark.parametrize(("make", "targets"), [*PIPELINES.items(), (flux, {"transformer": "proj_out"})])
def test_another_pipeline_draws_the_same(make: Callable[[], Any], targets: Mapping[str, Any], tmp_path: Path) -> None:
    pipe, fresh = adapted(make, targets), make()
    base, wanted = image(fresh), image(pipe)
    result = hra_fx.save_as_lora(pipe, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [NAME]
    fresh.load_lora_weights(tmp_path)
    assert change_error(image(fresh), wanted, base) < 1e-5
    assert torch.equal(image(pipe), wanted)
    layers = [key for part in targets for key in getattr(pipe, part).state_dict() if key.endswith("hra_u.default")]
    assert (result.format, result.rank, len(result.errors)) == ("diffusers", 3, len(layers))
    assert {path.split(".")[0] for path in result.errors} == set(targets)


def test_a_single_file_has_the_names_of_kohya(tmp_path: Path) -> None:
    """For ComfyUI and others. diffusers converts them back."""
    pipe, fresh = adapted(), stable_diffusion()
    base, wanted = image(fresh), image(pipe)
    hra_fx.save_as_lora(pipe, tmp_path / "style.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["style.safetensors"]
    with safe_open(tmp_path / "style.safetensors", "pt") as file:
        names = {key.partition(".")[0] for key in file.keys()}  # noqa: SIM118
    assert {"lora_unet_conv_in", "lora_te1_text_model_encoder_layers_0_mlp_fc1"} < names
    fresh.load_lora_weights(tmp_path, weight_name="style.safetensors")
    assert change_error(image(fresh), wanted, base) < 1e-5
    with pytest.raises(AdapterError, match=r"style\.safetensors: .* single safetensors files for models of diffusers"):
        hra_fx.save_as_lora(pipe.text_encoder, tmp_path / "style.safetensors")


def test_one_of_two_adapters_that_only_some_parts_have(tmp_path: Path) -> None:
    pipe, fresh = stable_diffusion(), stable_diffusion()
    base = image(fresh)
    adapt(pipe.unet, UNET, "first")
    adapt(pipe.text_encoder, CLIP, "first")
    adapt(pipe.unet, ["to_k", "to_v", "conv2", "ff.net.0.proj"], "second", seed=2)
    hra_fx.set_adapter(pipe.unet, "second")
    hra_fx.disable_adapters(pipe.text_encoder)
    hra_fx.save_as_lora(pipe, tmp_path, "second")
    fresh.load_lora_weights(tmp_path)
    assert change_error(image(fresh), image(pipe), base) < 1e-5


def test_diffusers_writes_the_same_file(tmp_path: Path) -> None:
    """After it has loaded our file."""
    fresh = stable_diffusion()
    hra_fx.save_as_lora(adapted(targets={"unet": UNET, "text_encoder": ["q_proj", "out_proj"]}), tmp_path / "ours")
    fresh.load_lora_weights(tmp_path / "ours", adapter_name="default")
    states = {part: peft.get_peft_model_state_dict(getattr(fresh, part)) for part in ("unet", "text_encoder")}
    states["text_encoder"] = convert_state_dict_to_diffusers(states["text_encoder"])
    layers = {f"{part}_lora_layers": state for part, state in states.items()}
    metadata = _collate_lora_metadata({"unet": fresh.unet, "text_encoder": fresh.text_encoder})
    fresh.save_lora_weights(tmp_path / "theirs", **layers, **metadata)
    ours, ours_fields = stored(tmp_path / "ours")
    theirs, their_fields = stored(tmp_path / "theirs")
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    targets = {key for key in ours_fields if key.endswith(".target_modules")}
    assert len(targets) == 2
    assert all(set(ours_fields[key]) == set(their_fields[key]) for key in targets)
    assert {key: value for key, value in ours_fields.items() if key not in targets}.items() <= their_fields.items()


def test_a_single_unet(tmp_path: Path) -> None:
    pipe, fresh, alone = stable_diffusion(), stable_diffusion(), stable_diffusion()
    base = image(fresh)
    pipe.unet = hra_fx.get_peft_model(pipe.unet, hra_fx.HRAConfig(r=4, target_modules=UNET, init_weights=False))
    hra_fx.save_as_lora(pipe.unet, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [NAME]
    fresh.load_lora_weights(tmp_path)
    alone.unet.load_lora_adapter(tmp_path, prefix="unet", use_safetensors=True)
    assert change_error(image(fresh), image(pipe), base) < 1e-5
    assert torch.equal(image(alone), image(fresh))
    hra_fx.save_as_lora(pipe.unet, tmp_path, dtype="bfloat16")
    assert {tensor.dtype for tensor in stored(tmp_path)[0].values()} == {torch.bfloat16}


def test_a_single_text_encoder_is_a_transformers_model(tmp_path: Path) -> None:
    fresh = stable_diffusion()
    pipe, base = adapted(targets={"text_encoder": CLIP}), image(fresh)
    result = hra_fx.save_as_lora(pipe.text_encoder, tmp_path)
    assert result.format == "peft"
    fresh.text_encoder.load_adapter(tmp_path)
    assert change_error(image(fresh), image(pipe), base) < 1e-5


def of_the_second_transformer() -> Any:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "num_layers": 1}
    first, second = (diffusers.WanTransformer3DModel(**sizes, text_dim=8, freq_dim=16, ffn_dim=16) for _ in range(2))
    adapt(second, ["to_q"])
    return diffusers.WanPipeline(None, None, None, None, first, second, boundary_ratio=0.5)


def unconditional() -> Any:
    pipe = diffusers.DDIMPipeline(stable_diffusion().unet, diffusers.DDIMScheduler())
    adapt(pipe.unet, ["to_q"])
    return pipe


def circular() -> Any:
    pipe = stable_diffusion()
    pipe.unet.conv_in.padding_mode = "circular"
    adapt(pipe.unet, ["conv_in"])
    return pipe


#: What is saved, the error and a part of its message.
REFUSED: list[tuple[Callable[[], Any], type[HRAError], str]] = [
    (
        lambda: adapted(targets={"unet": ["to_q"], "vae": ["conv_in"]}),
        AdapterError,
        "vae: load_lora_weights of diffusers loads only into unet, text_encoder without",
    ),
    (stable_diffusion, AdapterError, "StableDiffusionPipeline: no part of it has adapters (vae, text_encoder,"),
    (lambda: "pipe", AdapterError, "`model_or_pipeline` must be a torch.nn.Module or a diffusers pipeline, got str."),
    (unconditional, AdapterError, "unet: load_lora_weights of diffusers loads into no part of this pipeline"),
    (
        lambda: adapted(targets={"text_encoder": ["k_proj"]}, modules_to_save=["final_layer_norm"]),
        CheckpointError,
        "final_layer_norm.bias: diffusers does not load trained modules or biases with a LoRA",
    ),
    (of_the_second_transformer, AdapterError, "transformer_2: load_lora_weights of diffusers loads only into transf"),
    (circular, UnsupportedLayerError, "conv_in: "),
]


@pytest.mark.parametrize(("make", "kind", "message"), REFUSED)
def test_refused_before_anything_is_written(
    make: Callable[[], Any], kind: type[HRAError], message: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        hra_fx.save_as_lora(make(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unknown_names(tmp_path: Path) -> None:
    pipe = adapted(targets={"unet": ["to_q"], "text_encoder": ["k_proj"]})
    with pytest.raises(AdapterError, match=r"got \['default', 'other'\]\. There are text_encoder: 'default'; unet:"):
        hra_fx.save_as_lora(pipe, tmp_path, ["default", "other"])
