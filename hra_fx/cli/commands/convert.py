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
    """Whose form an adapter is to have."""

    peft = "peft"
    hra_fx = "hra_fx"


def convert(
    source: Annotated[str, typer.Argument(metavar="IN", help="Folder of an adapter, or its name on the Hub.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to be written.")],
    to: Annotated[Form, typer.Option("--to", help="Who is to go on with it.")],
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Write an adapter as PEFT does, or as hra_fx does. It computes the same in both.

    Each opens the other's folders as they are. For PEFT, an anchored adapter becomes plain reflections for good, all of
    which are trained on; for hra_fx, copies of what the base model has are left out.
    """
    from hra_fx.cli.converting import convert_adapter

    done = convert_adapter(source, out, to.value, overwrite=overwrite)
    if as_json:
        show_json(done)
        return
    anchor = f", of which {done.anchor} stood frozen before" if done.anchor else ""
    show_heading(
        f"HRA adapter in {done.folder}, as {'PEFT' if to is Form.peft else 'hra_fx'} writes it",
        {
            "reflections": f"{done.r} at each of {count(done.layers, 'layer')}{anchor}",
            "left out": ", ".join(_left_out(done.dropped, done.fields)) or "nothing",
        },
    )


def _left_out(tensors: tuple[str, ...], fields: tuple[str, ...]) -> list[str]:
    named = [f"of its configuration {', '.join(fields)}"] if fields else []
    return [count(len(tensors), "tensor"), *named] if tensors else named
