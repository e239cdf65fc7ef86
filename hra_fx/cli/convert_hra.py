"""Convert an adapter's folder between the formats of PEFT and `hra_fx.save_adapter`.

Both have the same two files. Files of hra_fx may also contain how a chain splits into an anchor and trained vectors (as
metadata), and the vectors before Gram-Schmidt; PEFT ignores both. Files of PEFT may contain copies of base weights.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from hra_fx.cli.screen import count, show_heading, show_json

if TYPE_CHECKING:
    from torch import Tensor

    from hra_fx.checkpoint.disk.adapter_files import AdapterFiles


def convert_hra(source: str, out: Path, *, for_peft: bool, as_json: bool) -> None:
    """Write an adapter in the format of PEFT or hra_fx, and print what was written."""
    from hra_fx.checkpoint.disk.adapter_files import read_adapter
    from hra_fx.checkpoint.folder import write
    from hra_fx.checkpoint.saving import RESUME

    files = read_adapter(source)
    kept = _kept(files, for_peft=for_peft)
    config = dataclasses.replace(files.config, extra={}, peft_version=None)
    splits = {RESUME: files.metadata[RESUME]} if not for_peft and RESUME in files.metadata else {}
    write(out, config.to_json_string(), kept, splits)
    dropped = [key for key in files.tensors if key not in kept]
    fields = [*sorted(files.config.extra), *(["peft_version"] if files.config.peft_version else [])]
    layers, frozen = len(files.chains), files.resume["anchor"] if for_peft else 0
    if as_json:
        done = {"folder": out, "form": "peft" if for_peft else "hra_fx", "layers": layers, "r": config.r}
        show_json({**done, "anchor": frozen, "dropped": dropped, "fields": fields})
        return
    left_out = [count(len(dropped), "tensor")] if dropped else []
    left_out += [f"configuration fields {', '.join(fields)}"] if fields else []
    anchor = f", {frozen} of them frozen before" if frozen else ""
    show_heading(
        f"HRA adapter in {out}, in the format of {'PEFT' if for_peft else 'hra_fx'}",
        {
            "reflections": f"{config.r} in each of {count(layers, 'layer')}{anchor}",
            "dropped": ", ".join(left_out) or "nothing",
        },
    )


def _kept(files: AdapterFiles, *, for_peft: bool) -> dict[str, Tensor]:
    """The tensors that the new format has."""
    from hra_fx.checkpoint.keys import PREFIX, VECTORS
    from hra_fx.layers.target import REFLECTION

    kept = {}
    for key, tensor in files.tensors.items():
        name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
        last = name.rpartition(".")[2]
        ours = last == REFLECTION or name in files.full or (last == VECTORS and files.resume["anchor"] > 0)
        if (last != VECTORS) if for_peft else ours:
            kept[key] = tensor
    return kept
