"""The model card beside an adapter. Source: PEFT 0.21, `PeftModel.create_or_update_model_card`."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from hra_fx.checkpoint.base_model import base_model_name
from hra_fx.checkpoint.folder import write_files
from hra_fx.layers.class_swap import original_class
from hra_fx.model.state import root_of
from hra_fx.version import VERSION

CARD_NAME = "README.md"
#: Placeholder for the location of the adapters, which is unknown when the card is written.
PLACE = "folder-or-name-of-this-repository"

_CARD = """---
library_name: peft
---

# HRA adapter of {title}

Householder reflection adaptation ([HRA](https://arxiv.org/abs/2405.17484)), saved by hra_fx {version} in PEFT's format.
To load it over its base model:

```python
import hra_fx

model = hra_fx.load_adapter(base, "{place}"{option})
```
"""


def create_or_update_model_card(model: nn.Module, output_dir: str | os.PathLike[str]) -> None:
    """Write the model card of all adapters. If the folder has one, only its metadata is updated."""
    from huggingface_hub import ModelCard, ModelCardData

    root, configs = root_of(model)[0], root_of(model)[1].configs
    path, own = Path(output_dir, CARD_NAME), original_class(root)
    base = next((name for config in configs.values() if (name := base_model_name(root, config))), None)
    first = "default" if "default" in configs else next(iter(configs))
    option = "" if first == "default" else f', subfolder="{first}"'
    text = _CARD.format(title=base or own.__name__, version=VERSION, place=PLACE, option=option)
    card = ModelCard.load(path) if path.exists() else ModelCard(text)
    present = card.data.to_dict()
    # The Hub does not accept a card with a folder as the base model.
    named = {} if base is None or os.path.isdir(base) else {"base_model": base}
    tags = {"hra", "hra_fx", *(present.get("tags") or ()), *(getattr(root, "model_tags", None) or ())}
    tags |= {own.__module__.partition(".")[0]} & {"transformers", "diffusers", "timm"}
    tags |= {f"base_model:adapter:{name}" for name in named.values()}
    # The files have PEFT's format.
    card.data = ModelCardData(**present | {"library_name": "peft", "tags": sorted(tags)} | named)
    write_files(path.parent, {CARD_NAME: str(card).encode()})
