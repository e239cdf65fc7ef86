"""`hra-fx convert`: convert an adapter's folder between the formats of PEFT and `hra_fx.save_adapter`.

Both have the same two files. Files of hra_fx may also contain how a chain splits into an anchor and trained vectors (as
metadata), and the vectors before Gram-Schmidt; PEFT ignores both. Files of PEFT may contain copies of base weights.
"""

from __future__ import annotations

import dataclasses
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hra_fx.cli.options import Json, Overwrite
from hra_fx.cli.screen import count, show_heading, show_json
from hra_fx.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from hra_fx.checkpoint.disk.adapter_files import AdapterFiles

EXAMPLES = (
    "hra-fx convert my-adapter for-peft --to peft",
    "hra-fx convert from-peft my-adapter --to hra_fx",
)
_CONFIG = "adapter_config.json"
_OF_MODELS = ("config.json", "model_index.json")


class Form(str, Enum):
    """The format of an adapter."""

    peft = "peft"
    hra_fx = "hra_fx"


def convert(
    source: Annotated[str, typer.Argument(metavar="IN", help="Folder of an adapter, or its name on the Hub.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Output folder.")],
    to: Annotated[Form, typer.Option("--to", help="Target format.")],
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Convert an adapter to the format of PEFT or hra_fx. Its outputs do not change.

    Both libraries also load each other's folders directly. In PEFT's format, an anchored adapter becomes plain
    reflections, all of which are trainable; in that of hra_fx, copies of base weights are dropped.
    """
    from hra_fx.checkpoint.disk.adapter_files import read_adapter
    from hra_fx.checkpoint.folder import write
    from hra_fx.checkpoint.saving import RESUME

    files = read_adapter(source)
    _check_free(out, overwrite=overwrite)
    kept = _kept(files, to)
    config = dataclasses.replace(files.config, extra={}, peft_version=None)
    splits = {RESUME: files.metadata[RESUME]} if to is Form.hra_fx and RESUME in files.metadata else {}
    write(out, config.to_json_string(), kept, splits)
    dropped = [key for key in files.tensors if key not in kept]
    fields = [*sorted(files.config.extra), *(["peft_version"] if files.config.peft_version else [])]
    layers, frozen = len(files.chains), files.resume["anchor"] if to is Form.peft else 0
    if as_json:
        done = {"folder": out, "form": to.value, "layers": layers, "r": config.r, "anchor": frozen}
        show_json({**done, "dropped": dropped, "fields": fields})
        return
    left_out = [count(len(dropped), "tensor")] if dropped else []
    left_out += [f"configuration fields {', '.join(fields)}"] if fields else []
    anchor = f", {frozen} of them frozen before" if frozen else ""
    show_heading(
        f"HRA adapter in {out}, in the format of {'PEFT' if to is Form.peft else 'hra_fx'}",
        {
            "reflections": f"{config.r} in each of {count(layers, 'layer')}{anchor}",
            "dropped": ", ".join(left_out) or "nothing",
        },
    )


def _kept(files: AdapterFiles, to: Form) -> dict[str, Tensor]:
    """The tensors that the new format has."""
    from hra_fx.checkpoint.keys import PREFIX, VECTORS
    from hra_fx.layers.target import REFLECTION

    kept = {}
    for key, tensor in files.tensors.items():
        name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
        last = name.rpartition(".")[2]
        ours = last == REFLECTION or name in files.full or (last == VECTORS and files.resume["anchor"] > 0)
        if (last != VECTORS) if to is Form.peft else ours:
            kept[key] = tensor
    return kept


def _check_free(out: Path, *, overwrite: bool) -> None:
    there = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    if _CONFIG in there:
        if not overwrite:
            raise CheckpointError(f"{out}: already contains an adapter. Choose another folder, or --overwrite.")
        return
    model = next((name for name in there if name in _OF_MODELS or name.endswith(".safetensors")), None)
    if model:
        raise CheckpointError(
            f"{out}: contains a model ({model}), and from_pretrained would load the adapter with it. Choose another "
            "folder."
        )
    if there and not overwrite:
        raise CheckpointError(f"{out}: is not empty (it contains {there[0]}). Choose another folder, or --overwrite.")
