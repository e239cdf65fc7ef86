"""The inputs that models of transformers and diffusers are called with, by the names in models.tsv.

Floats come from torch's generator, which the caller seeds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, rand, randn

#: Keyword arguments of a call for a batch size and a length, or the side of an image.
Inputs: TypeAlias = Callable[[int, int], dict[str, Any]]
IMAGE = 49  # the token that stands for a part of an image


def words(batch: int, length: int) -> Tensor:
    """Token ids `(batch, length)` without special tokens."""
    return torch.randint(3, IMAGE - 3, (batch, length))


def padding(batch: int, length: int) -> Tensor:
    """Attention mask `(batch, length)`; the first text is two tokens shorter."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, -2:] = 0
    return mask


def leading(batch: int, length: int) -> Tensor:
    """A mask `(batch, length)` that has the first token alone."""
    return (torch.arange(length) == 0).long().expand(batch, length)


def text(batch: int, length: int, *, places: int = 0, **more: Any) -> dict[str, Any]:
    """Token ids, of which the first `places` stand for an image, their mask, and more."""
    ids = torch.cat([torch.full((batch, places), IMAGE), words(batch, length)], 1)
    return {"input_ids": ids, "attention_mask": padding(*ids.shape), **more}


def images(batch: int, side: int, **more: Any) -> dict[str, Any]:
    return {"pixel_values": randn(batch, 3, side, side), **more}


def seen(batch: int, length: int, **more: Any) -> dict[str, Any]:
    """Texts and images of one size."""
    return text(batch, length, **more, **images(batch, 32))


def boxes(batch: int, length: int) -> Tensor:
    """A box for each word `(batch, length, 4)`, its corners in order."""
    return torch.randint(20, (batch, length, 4)).sort(-1).values


def looks(batch: int, length: int) -> dict[str, Any]:
    """Texts and three regions of an image."""
    ones = torch.ones(batch, 3, dtype=torch.long)
    kinds = {"visual_attention_mask": ones, "visual_token_type_ids": ones}
    return text(batch, length, visual_embeds=randn(batch, 3, 8), **kinds)


def patches(batch: int, length: int) -> dict[str, Any]:
    """Images as Qwen takes them: the patches of all in one list, and how many rows and columns each one has."""
    is_image = (torch.arange(4 + length) < 4).int().expand(batch, 4 + length)
    grid = torch.tensor([[1, 4, 4]]).expand(batch, 3)
    more = {"pixel_values": randn(batch * 16, 96), "image_grid_thw": grid, "mm_token_type_ids": is_image}
    return text(batch, length, places=4, **more)


def states(batch: int, side: int) -> Tensor:
    """What a text encoder said `(batch, length, 16)`."""
    return randn(batch, side // 4 + 3, 16)


def latents(batch: int, side: int, shape: tuple[int, ...] = (4,), name: str = "sample", **more: Any) -> dict[str, Any]:
    """Latents `(batch, *shape, side, side)`, a time step for each, and more."""
    return {name: randn(batch, *shape, side, side), "timestep": torch.randint(1000, (batch,)), **more}


def told(batch: int, side: int, *args: Any, **more: Any) -> dict[str, Any]:
    """The same with states of a text encoder."""
    return latents(batch, side, *args, encoder_hidden_states=states(batch, side), **more)


def flux(batch: int, side: int) -> dict[str, Any]:
    """Flux's latents are a sequence of patches, with the place of each one."""
    rows, columns = torch.meshgrid(torch.arange(side // 2), torch.arange(side // 2), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1).float()
    return {
        "hidden_states": randn(batch, len(places), 4),
        "encoder_hidden_states": states(batch, side),
        "pooled_projections": randn(batch, 16),
        "timestep": rand(batch),
        "guidance": rand(batch),
        "img_ids": places,
        "txt_ids": torch.zeros(side // 4 + 3, 3),
    }


_TEXTS, _IMAGES, _LATENTS, _H = (9, 12), (32, 48), (8, 16), "hidden_states"
#: Name -> two lengths or sides, and the inputs.
CALLS: dict[str, tuple[tuple[int, int], Inputs]] = {
    "tokens": (_TEXTS, text),
    "tokens of 8": ((8, 12), text),
    "tokens, unmasked": (_TEXTS, lambda b, n: {"input_ids": words(b, n)}),
    "tokens, global": (_TEXTS, lambda b, n: text(b, n, global_attention_mask=leading(b, n))),
    "pair": (_TEXTS, lambda b, n: text(b, n, decoder_input_ids=words(b, n - 4))),
    "pair, global": (
        (8, 12),
        lambda b, n: text(b, n, decoder_input_ids=words(b, n - 4), global_attention_mask=leading(b, n)),
    ),
    "pair, masked": (
        _TEXTS,
        lambda b, n: text(b, n, decoder_input_ids=words(b, n), decoder_attention_mask=padding(b, n)),
    ),
    "images": (_IMAGES, images),
    "images of 8": ((8, 16), images),
    "images of 32": ((32, 64), images),
    "images of 64": ((64, 128), images),
    "images of any size": (_IMAGES, lambda b, n: images(b, n, interpolate_pos_encoding=True)),
    # A masked autoencoder sorts its patches by noise, and draws none if it is given.
    "images, masked": (_IMAGES, lambda b, n: images(b, n, interpolate_pos_encoding=True, noise=rand(b, n * n // 64))),
    "images, points": (_IMAGES, lambda b, n: images(b, n, input_points=rand(b, 1, 2, 2) * n, multimask_output=False)),
    "frames": (_IMAGES, lambda b, n: {"pixel_values": randn(b, 2, 3, n, n)}),
    "waves": ((400, 560), lambda b, n: {"input_values": randn(b, n)}),
    "mono": ((64, 96), lambda b, n: {"input_values": randn(b, 1, n)}),
    "transcribed": ((1200, 1600), lambda b, n: {"input_values": randn(b, n), "decoder_input_ids": words(b, 5)}),
    "heard": (_TEXTS, lambda b, n: text(b, n, input_features=randn(b, 1, 32, 8))),
    "bins": ((12, 16), lambda b, n: {"input_features": randn(b, n, 8)}),
    "spectra": ((24, 24), lambda b, n: {"input_values": randn(b, n, 8)}),
    "spoken": ((24, 32), lambda b, n: {"input_features": randn(b, n, 8), "decoder_input_ids": words(b, n // 4 - 1)}),
    # As many frames as the encoder has positions for, twice.
    "whispered": ((5, 7), lambda b, n: {"input_features": randn(b, 8, 40), "decoder_input_ids": words(b, n)}),
    "whispered, encoder": ((40, 40), lambda b, n: {"input_features": randn(b, 8, n)}),
    "seen": (_TEXTS, seen),
    "seen, 4": (_TEXTS, lambda b, n: seen(b, n, places=4)),
    "seen, 16": (_TEXTS, lambda b, n: seen(b, n, places=16)),
    "album": (_TEXTS, lambda b, n: text(b, n, places=4, pixel_values=randn(b, 1, 3, 32, 32))),
    "boxes": (_TEXTS, lambda b, n: text(b, n, bbox=boxes(b, n))),
    "boxes, seen": (_TEXTS, lambda b, n: seen(b, n, bbox=boxes(b, n))),
    "looks": (_TEXTS, looks),
    "regions": (_TEXTS, lambda b, n: text(b, n, visual_feats=randn(b, 3, 8), visual_pos=rand(b, 3, 4))),
    "patches": (_TEXTS, patches),
    "latents": (_LATENTS, told),
    "latents, large": (  # what SDXL adds to the time step
        _LATENTS,
        lambda b, n: told(b, n, added_cond_kwargs={"text_embeds": randn(b, 16), "time_ids": rand(b, 6)}),
    ),
    "latents, hint": (_LATENTS, lambda b, n: told(b, n, controlnet_cond=randn(b, 3, 8 * n, 8 * n))),
    "latents alone": (_LATENTS, lambda b, n: latents(b, n, (3,))),
    "hidden": (_LATENTS, lambda b, n: told(b, n, (4,), _H)),
    "hidden, pooled": (_LATENTS, lambda b, n: told(b, n, (4,), _H, pooled_projections=randn(b, 16))),
    "hidden, classes": (_LATENTS, lambda b, n: latents(b, n, (4,), _H, class_labels=torch.randint(5, (b,)))),
    "hidden video": (_LATENTS, lambda b, n: told(b, n, (4, 2), _H)),
    "video": (_LATENTS, lambda b, n: told(b, n, (4, 2))),
    "video, told": (
        _LATENTS,
        lambda b, n: latents(b, n, (4, 2), encoder_hidden_states=states(b, n).repeat_interleave(2, 0)),
    ),
    "video, frames first": (
        _LATENTS,
        lambda b, n: latents(b, n, (2, 8), encoder_hidden_states=randn(b, 1, 16), added_time_ids=rand(b, 3)),
    ),
    "flux": (_LATENTS, flux),
    "pictures": ((16, 32), lambda b, n: {"sample": randn(b, 3, n, n)}),
}
