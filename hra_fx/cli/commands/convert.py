"""`hra-fx convert`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from hra_fx.cli.options import Json, Overwrite
from hra_fx.cli.screen import count, show_heading, show_json

EXAMPLES = (
    "hra-fx convert my-adapter for-peft --to peft",
    "hra-fx convert from-peft my-adapter --to hra_fx",
)


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
    from hra_fx.cli.converting import convert_adapter

    done = convert_adapter(source, out, to.value, overwrite=overwrite)
    if as_json:
        show_json(done)
        return
    anchor = f", {done.anchor} of them frozen before" if done.anchor else ""
    show_heading(
        f"HRA adapter in {done.folder}, in the format of {'PEFT' if to is Form.peft else 'hra_fx'}",
        {
            "reflections": f"{done.r} in each of {count(done.layers, 'layer')}{anchor}",
            "dropped": ", ".join(_dropped(done.dropped, done.fields)) or "nothing",
        },
    )


def _dropped(tensors: tuple[str, ...], fields: tuple[str, ...]) -> list[str]:
    named = [f"configuration fields {', '.join(fields)}"] if fields else []
    return [count(len(tensors), "tensor"), *named] if tensors else named
