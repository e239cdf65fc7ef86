"""The inputs that models of transformers and diffusers are called with, by the names in models.tsv.

Floats come from torch's generator, which the caller seeds; `size` picks the length or the side out of a pair.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from zoo.entry import Call

Inputs = Callable[[int, int], Call]

WORDS = 50
IMAGE = 49  # the token that stands for a part of an image
LENGTHS, SIDES, LATENTS = (9, 12), (32, 48), (8, 16)


def words(batch: int, length: int, vocabulary: int = WORDS) -> Tensor:
    """Token ids `(batch, length)` without special tokens."""
    return torch.randint(3, vocabulary, (batch, length))


def padding(batch: int, length: int) -> Tensor:
    """Attention mask `(batch, length)`; the first text is two tokens shorter."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, -2:] = 0
    return mask


def leading(batch: int, length: int) -> Tensor:
    """A mask `(batch, length)` that has the first token alone."""
    return (torch.arange(length) == 0).long().expand(batch, length)


def shorter(batch: int, length: int) -> Tensor:
    """Target tokens, fewer than those of the source."""
    return words(batch, length - 4)


def normal(*shape: int) -> Callable[[int, int], Tensor]:
    """A tensor `(batch, *shape)`."""
    return lambda batch, _: torch.randn(batch, *shape)


def uniform(*shape: int) -> Callable[[int, int], Tensor]:
    """The same, from 0 to 1."""
    return lambda batch, _: torch.rand(batch, *shape)


def drawn(extra: dict[str, Any], batch: int, length: int) -> dict[str, Any]:
    """What is callable is made for this batch and length (or side), the rest is as it stands."""
    return {name: value(batch, length) if callable(value) else value for name, value in extra.items()}


# ---- texts and images ----


def tokens(lengths: tuple[int, ...] = LENGTHS, *, masked: bool = True, **extra: Any) -> Inputs:
    """`input_ids`, `attention_mask` where `masked`, and `extra`, tensors or makers of them."""

    def call(batch: int, size: int) -> Call:
        inputs: dict[str, Any] = {"input_ids": words(batch, lengths[size])}
        if masked:
            inputs["attention_mask"] = padding(batch, lengths[size])
        return (), inputs | drawn(extra, batch, lengths[size])

    return call


def images(sides: tuple[int, ...] = SIDES, **extra: Any) -> Inputs:
    """`pixel_values` `(batch, 3, side, side)`, and `extra`."""

    def call(batch: int, size: int) -> Call:
        side = sides[size]
        return (), {"pixel_values": torch.randn(batch, 3, side, side)} | drawn(extra, batch, side)

    return call


def frames(batch: int, size: int) -> Call:
    """A short video: two frames."""
    return (), {"pixel_values": torch.randn(batch, 2, 3, SIDES[size], SIDES[size])}


def noise(batch: int, side: int) -> Tensor:
    """By which a masked autoencoder sorts its patches; given, it draws none."""
    return torch.rand(batch, (side // 8) ** 2)


def points(batch: int, side: int) -> Tensor:
    """Two points in each image `(batch, 1, 2, 2)`."""
    return torch.rand(batch, 1, 2, 2) * side


def both(places: int = 0, **extra: Any) -> Inputs:
    """Text, with `places` tokens at its head that stand for an image, and what else a model takes."""

    def call(batch: int, size: int) -> Call:
        text = words(batch, LENGTHS[size], IMAGE - 3)
        ids = torch.cat([torch.full((batch, places), IMAGE), text], 1)
        inputs = {"input_ids": ids} | drawn(extra, batch, ids.shape[1])
        return (), inputs | {"attention_mask": padding(*ids.shape)}

    return call


def boxes(batch: int, length: int) -> Tensor:
    """A box for each word `(batch, length, 4)`, its corners in order."""
    return torch.randint(20, (batch, length, 4)).sort(-1).values


def kinds(batch: int, _: int) -> Tensor:
    """Ones for three regions of an image."""
    return torch.ones(batch, 3, dtype=torch.long)


def patches(batch: int, size: int) -> Call:
    """Images as Qwen takes them: the patches of all in one list, and how many rows and columns each one has."""
    inputs = both(4)(batch, size)[1]
    grid = torch.tensor([[1, 4, 4]]).expand(batch, 3)
    is_image = (inputs["input_ids"] == IMAGE).int()
    pixels = torch.randn(batch * 16, 96)
    return (), inputs | {"pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": is_image}


# ---- audio ----


def waves(*shape: int, times: tuple[int, int], **extra: Any) -> Inputs:
    """Samples `(batch, *shape, time)`."""

    def call(batch: int, size: int) -> Call:
        return (), {"input_values": torch.randn(batch, *shape, times[size])} | drawn(extra, batch, 5)

    return call


def spectra(field: str, times: tuple[int, ...], *, bins_first: bool = False, **extra: Any) -> Inputs:
    """Spectra of eight bins `(batch, time, 8)`, or `(batch, 8, time)` where the bins come first."""

    def call(batch: int, size: int) -> Call:
        found = torch.randn(batch, times[size], 8)
        inputs = {field: found.transpose(1, 2).contiguous() if bins_first else found}
        return (), inputs | drawn(extra, batch, (5, 7)[size])

    return call


# ---- diffusers ----


def states(batch: int, size: int) -> Tensor:
    """What a text encoder said `(batch, length, 16)`."""
    return torch.randn(batch, (5, 7)[size], 16)


def steps(batch: int, _: int) -> Tensor:
    """A time step for each."""
    return torch.randint(1000, (batch,))


def latents(shape: tuple[int, ...], name: str = "sample", **extra: Any) -> Inputs:
    """Latents `(batch, *shape, side, side)`, a time step for each, and `extra`."""

    def call(batch: int, size: int) -> Call:
        inputs = {name: torch.randn(batch, *shape, LATENTS[size], LATENTS[size]), "timestep": steps(batch, size)}
        return (), inputs | drawn(extra, batch, size)

    return call


def pictures(batch: int, size: int) -> Call:
    """A positional image, twice as large as latents."""
    return (torch.randn(batch, 3, 2 * LATENTS[size], 2 * LATENTS[size]),), {}


def hint(batch: int, size: int) -> Tensor:
    """The picture that steers a ControlNet, eight times as large as its latents."""
    return torch.randn(batch, 3, 8 * LATENTS[size], 8 * LATENTS[size])


def large(batch: int, _: int) -> dict[str, Tensor]:
    """What SDXL adds to the time step."""
    return {"text_embeds": torch.randn(batch, 16), "time_ids": torch.rand(batch, 6)}


def flux(batch: int, size: int) -> Call:
    """Flux's latents are a sequence of patches, with the place of each one."""
    side = LATENTS[size] // 2
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(side * side, 3).float()
    return (), {
        "hidden_states": torch.randn(batch, side * side, 4),
        "encoder_hidden_states": states(batch, size),
        "pooled_projections": torch.randn(batch, 16),
        "timestep": torch.rand(batch),
        "guidance": torch.rand(batch),
        "img_ids": places,
        "txt_ids": torch.zeros((5, 7)[size], 3),
    }


_IMAGE = normal(3, SIDES[0], SIDES[0])
_REGIONS = normal(3, 8)
_MELS, _HIDDEN = "input_features", "hidden_states"

CALLS: dict[str, Inputs] = {
    "tokens": tokens(),
    "tokens of 8": tokens((8, 12)),
    "tokens, unmasked": tokens(masked=False),
    "tokens, global": tokens(global_attention_mask=leading),
    "pair": tokens(decoder_input_ids=shorter),
    "pair, global": tokens((8, 12), decoder_input_ids=shorter, global_attention_mask=leading),
    "pair, masked": tokens(decoder_input_ids=words, decoder_attention_mask=padding),
    "images": images(),
    "images of 8": images((8, 16)),
    "images of 32": images((32, 64)),
    "images of 64": images((64, 128)),
    "images of any size": images(interpolate_pos_encoding=True),
    "images, masked": images(interpolate_pos_encoding=True, noise=noise),
    "images, points": images(input_points=points, multimask_output=False),
    "frames": frames,
    "waves": waves(times=(400, 560)),
    "mono": waves(1, times=(64, 96)),
    "transcribed": waves(times=(1200, 1600), decoder_input_ids=words),
    "heard": tokens(input_features=normal(1, 32, 8)),
    "bins": spectra(_MELS, (12, 16)),
    "spectra": spectra("input_values", (24,)),
    "spoken": spectra(_MELS, (24, 32), decoder_input_ids=words),
    # As many frames as the encoder has positions for, twice.
    "whispered": spectra(_MELS, (40, 40), bins_first=True, decoder_input_ids=words),
    "whispered, encoder": spectra(_MELS, (40,), bins_first=True),
    "seen": both(pixel_values=_IMAGE),
    "seen, 4": both(4, pixel_values=_IMAGE),
    "seen, 16": both(16, pixel_values=_IMAGE),
    "album": both(4, pixel_values=normal(1, 3, SIDES[0], SIDES[0])),
    "boxes": both(bbox=boxes),
    "boxes, seen": both(bbox=boxes, pixel_values=_IMAGE),
    "looks": both(visual_embeds=_REGIONS, visual_attention_mask=kinds, visual_token_type_ids=kinds),
    "regions": both(visual_feats=_REGIONS, visual_pos=uniform(3, 4)),
    "patches": patches,
    "latents": latents((4,), encoder_hidden_states=states),
    "latents, large": latents((4,), encoder_hidden_states=states, added_cond_kwargs=large),
    "latents, hint": latents((4,), encoder_hidden_states=states, controlnet_cond=hint),
    "latents alone": latents((3,)),
    "hidden": latents((4,), _HIDDEN, encoder_hidden_states=states),
    "hidden, pooled": latents((4,), _HIDDEN, encoder_hidden_states=states, pooled_projections=normal(16)),
    "hidden, classes": latents((4,), _HIDDEN, class_labels=lambda batch, _: torch.randint(5, (batch,))),
    "hidden video": latents((4, 2), _HIDDEN, encoder_hidden_states=states),
    "video": latents((4, 2), encoder_hidden_states=states),
    "video, told": latents(
        (4, 2), encoder_hidden_states=lambda batch, size: states(batch, size).repeat_interleave(2, 0)
    ),
    "video, frames first": latents((2, 8), encoder_hidden_states=normal(1, 16), added_time_ids=uniform(3)),
    "flux": flux,
    "pictures": pictures,
}
