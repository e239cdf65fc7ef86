"""Convert an adapter's folder between the formats of PEFT and `hra_fx.save_adapter`.

Both have the same two files. Files of hra_fx may also contain the vectors before Gram-Schmidt, and metadata: how a
chain splits into an anchor and trained vectors, and a row of the base model. PEFT ignores these. Files of PEFT may
contain copies of base weights. PEFT has one rank for all layers: smaller ranks are padded with pairs of equal
reflections, which cancel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from hra_fx.cli.screen import count, show_heading, show_json
from hra_fx.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from hra_fx.checkpoint.adapter import Adapter
    from hra_fx.config import HRAConfig


def convert_hra(source: str, out: Path, *, for_peft: bool, as_json: bool) -> None:
    """Write an adapter in the format of PEFT or hra_fx, and print what was written."""
    from hra_fx.checkpoint.adapter import RESUME, read_adapter
    from hra_fx.checkpoint.base_model import BASE_ROW
    from hra_fx.checkpoint.folder import write

    files = read_adapter(source)
    if for_peft and files.config.target_parameters:
        raise CheckpointError(
            f"{files.file}: the adapter is on parameters of experts (target_parameters="
            f"{files.config.target_parameters}), which PEFT's HRA does not support. Use --to lora."
        )
    kept = _kept(files, for_peft=for_peft)
    config = dataclasses.replace(files.config, extra={}, peft_version=None)
    if for_peft and config.rank_pattern:
        rank = max(chain.shape[-1] for chain in files.chains.values())
        config = dataclasses.replace(config, r=rank, rank_pattern={}, apply_GS=False)
        kept |= _of_one_rank(files, rank)
    metadata = {} if for_peft else {key: files.metadata[key] for key in (RESUME, BASE_ROW) if key in files.metadata}
    write(out, config.to_json_string(), kept, metadata)
    dropped = [key for key in files.tensors if key not in kept]
    fields = [*sorted(files.config.extra), *(["peft_version"] if files.config.peft_version else [])]
    layers, frozen = len(files.chains), max(map(files.resume.anchor, files.chains)) if for_peft else 0
    if as_json:
        done = {"folder": out, "form": "peft" if for_peft else "hra_fx", "layers": layers, "r": config.r}
        show_json({**done, "anchor": frozen, "dropped": dropped, "fields": fields})
        return
    left_out = [count(len(dropped), "tensor")] if dropped else []
    left_out += [f"configuration fields {', '.join(fields)}"] if fields else []
    anchor = f", {frozen} of them previously frozen" if frozen else ""
    show_heading(
        f"HRA adapter in {out}, in the format of {'PEFT' if for_peft else 'hra_fx'}",
        {
            "reflections": f"{_ranks(config, files.chains)} in each of {count(layers, 'layer')}{anchor}",
            "dropped": ", ".join(left_out) or "nothing",
        },
    )


def _of_one_rank(files: Adapter, rank: int) -> dict[str, Tensor]:
    """The chains of all layers, filled up to one rank."""
    from hra_fx.checkpoint.keys import reflection_key
    from hra_fx.functional.chain import padded
    from hra_fx.model.example_inputs import preserve_rng_state, seed_everything

    chains = {}
    with preserve_rng_state():
        seed_everything(0)  # the same files each time
        for path, chain in files.chains.items():
            key = reflection_key(path)
            try:
                chains[key] = padded(chain.double(), rank).to(files.tensors[key].dtype)
            except ValueError as error:
                raise CheckpointError(
                    f"{files.file}: {path}: {error}. PEFT has one rank for all layers, so it cannot represent this "
                    "adapter. Use --to lora, or train with ranks that are all even or all odd."
                ) from error
    return chains


def _ranks(config: HRAConfig, paths: Iterable[str]) -> str:
    ranks = {config.rank_of(path) for path in paths}
    return str(min(ranks)) if len(ranks) == 1 else f"{min(ranks)} to {max(ranks)}"


def _kept(files: Adapter, *, for_peft: bool) -> dict[str, Tensor]:
    """The tensors that the new format has."""
    from hra_fx.checkpoint.keys import PREFIX, VECTORS
    from hra_fx.layers.target import REFLECTION

    kept = {}
    for key, tensor in files.tensors.items():
        name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
        last = name.rpartition(".")[2]
        ours = last == REFLECTION or name in files.full or (last == VECTORS and files.resume.has_anchors)
        if (last != VECTORS) if for_peft else ours:
            kept[key] = tensor
    return kept
