"""Stable Diffusion: adapt the text encoder and the UNet, with the configurations of PEFT's documentation.

The pipeline is tiny and has random weights; for a real one use `StableDiffusionPipeline.from_pretrained(...)`.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import hra_fx

TEXT_ENCODER = hra_fx.HRAConfig(r=8, target_modules=["k_proj", "q_proj", "v_proj", "out_proj", "fc1", "fc2"])
UNET = hra_fx.HRAConfig(
    r=8, target_modules=["proj_in", "proj_out", "to_k", "to_q", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
)


def tokenizer(folder: str) -> CLIPTokenizer:
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    Path(folder, "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    Path(folder, "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(f"{folder}/vocab.json", f"{folder}/merges.txt", model_max_length=16)


def pipeline(folder: str) -> StableDiffusionPipeline:
    torch.manual_seed(0)
    words = tokenizer(folder)
    text = CLIPTextConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=16, bos_token_id=52, eos_token_id=53,
    )  # fmt: skip
    blocks = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
              "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(16, 16), down_block_types=("DownEncoderBlock2D",) * 2,
                          up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=8),
        text_encoder=CLIPTextModel(text), tokenizer=words, scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        unet=UNet2DConditionModel(sample_size=8, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
                                  cross_attention_dim=32, attention_head_dim=8, **blocks),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image(pipe: StableDiffusionPipeline) -> torch.Tensor:
    noise = torch.Generator().manual_seed(0)
    return torch.from_numpy(pipe("a dog", num_inference_steps=2, generator=noise, output_type="np").images)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        pipe = pipeline(folder)
        before = image(pipe)
        pipe.text_encoder = hra_fx.get_peft_model(pipe.text_encoder, TEXT_ENCODER)
        pipe.unet = hra_fx.get_peft_model(pipe.unet, UNET)
        pipe.text_encoder.print_trainable_parameters()
        pipe.unet.print_trainable_parameters()
        print(f"adapted, not trained, max. change of a pixel: {(image(pipe) - before).abs().max().item():.1e}")

        parts = [*pipe.text_encoder.parameters(), *pipe.unet.parameters()]
        optimizer = torch.optim.AdamW([p for p in parts if p.requires_grad], lr=1e-2)
        latents, noise, time = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([100, 500])
        tokens = pipe.tokenizer(["a photo of sks dog"] * 2, padding="max_length", truncation=True, return_tensors="pt")
        for step in range(3):
            words = pipe.text_encoder(tokens.input_ids)[0]
            predicted = pipe.unet(pipe.scheduler.add_noise(latents, noise, time), time, words).sample
            loss = torch.nn.functional.mse_loss(predicted, noise)
            print(f"step {step}  loss {loss.item():.4f}")
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        trained = image(pipe)
        pipe.text_encoder.save_pretrained(f"{folder}/text_encoder")
        pipe.unet.save_pretrained(f"{folder}/unet")
        fresh = pipeline(folder)
        hra_fx.load_adapter(fresh.text_encoder, f"{folder}/text_encoder")
        hra_fx.load_adapter(fresh.unet, f"{folder}/unet")
        print(f"loaded into a fresh pipeline: {(image(fresh) - trained).abs().max().item():.1e}")
        hra_fx.fold(fresh.text_encoder)
        hra_fx.fold(fresh.unet)
        print(f"folded:                       {(image(fresh) - trained).abs().max().item():.1e}")

        hra_fx.save_as_lora(pipe, f"{folder}/lora")
        plain = pipeline(folder)
        plain.load_lora_weights(f"{folder}/lora")
        print(f"as LoRA, without hra_fx:      {(image(plain) - trained).abs().max().item():.1e}")


if __name__ == "__main__":
    main()
