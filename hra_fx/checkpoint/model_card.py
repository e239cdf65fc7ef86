"""The model card of saved adapters: their type, their base model, and how to load and deploy them.

Source of the entries and of the file name: PEFT 0.21, `PeftModel.create_or_update_model_card`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hra_fx.atomic_write import atomic_write
from hra_fx.checkpoint.base_model import base_model_name
from hra_fx.config import NOT_IN_PEFT, HRAConfig
from hra_fx.errors import CheckpointError
from hra_fx.layers.class_swap import original_class
from hra_fx.selection.suggestions import format_names
from hra_fx.version import VERSION

CARD_NAME = "README.md"
#: Placeholder for the location of the adapters, which is unknown when the card is written.
PLACE = "folder-or-name-of-this-repository"
_PIPELINES = {"CAUSAL_LM": "text-generation"}

_TEXT = """---
library_name: peft
---

# {title}

{kind} of Householder reflection adaptation ([HRA](https://arxiv.org/abs/2405.17484)), saved by hra_fx in PEFT's format.

| adapter | folder | rank | layers |
|---|---|---|---|
{rows}

## How to load

```python
import hra_fx
{base}
model = hra_fx.load_adapter(base, "{place}"{option})
```

{with_peft}

## How to deploy

As a LoRA with the same outputs, for servers such as vLLM and llama.cpp:

```python
hra_fx.save_as_lora(model, "lora")
```

Or folded into the weights, as a plain base model:

```python
model = hra_fx.fold(model)
```

### Framework versions

- hra_fx {version}
- PyTorch {torch}
"""

_WITH_PEFT = """With PEFT, instead of the last line:

```python
import peft

model = peft.PeftModel.from_pretrained(base, "{place}"{option})
```
"""
_NOT_WITH_PEFT = "PEFT's HRA has no `{field}`. For PEFT, convert the adapter to a LoRA as shown below."


def write_card(directory: Path, root: nn.Module, configs: Mapping[str, HRAConfig]) -> None:
    """Write `README.md` for adapters saved in a folder. If it exists, only its metadata is updated."""
    from huggingface_hub import ModelCard, ModelCardData

    path = directory / CARD_NAME
    try:
        card = ModelCard.load(path) if path.exists() else ModelCard(_text(root, configs))
        present = card.data.to_dict()
        card.data = ModelCardData(**{**present, **_metadata(root, configs, present.get("tags") or [])})
        directory.mkdir(parents=True, exist_ok=True)
        atomic_write(path, str(card).encode())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot write the model card ({error}). The old file is unchanged.") from error


def _metadata(root: Any, configs: Mapping[str, HRAConfig], tags: list[str]) -> dict[str, Any]:
    base = _base(root, configs)
    library = original_class(root).__module__.partition(".")[0]
    own = ["hra", "hra_fx", *([library] if library in ("transformers", "diffusers", "timm") else [])]
    # The Hub does not accept a card with a folder as the base model.
    known = base is not None and not os.path.isdir(base)
    own += [f"base_model:adapter:{base}"] if known else []
    tasks = [config.task_type for config in configs.values() if config.task_type in _PIPELINES]
    return {
        "library_name": "peft",  # the files have PEFT's format
        "tags": sorted({*tags, *own, *(getattr(root, "model_tags", None) or ())}),
        **({"base_model": base} if known else {}),
        **({"pipeline_tag": _PIPELINES[tasks[0]]} if tasks and tasks[0] else {}),
    }


def _text(root: nn.Module, configs: Mapping[str, HRAConfig]) -> str:
    base, first = _base(root, configs), "default" if "default" in configs else next(iter(configs))
    option = "" if first == "default" else f', subfolder="{first}"'
    missing = next((field for field in NOT_IN_PEFT if getattr(configs[first], field)), None)
    with_peft = _NOT_WITH_PEFT.format(field=missing) if missing else _WITH_PEFT.format(place=PLACE, option=option)
    return _TEXT.format(
        title=f"HRA adapter of {base or original_class(root).__name__}",
        kind="An adapter" if len(configs) == 1 else "Adapters",
        rows="\n".join(_row(name, config) for name, config in configs.items()),
        base=_loading(root, base),
        place=PLACE,
        option=option,
        with_peft=with_peft,
        version=VERSION,
        torch=torch.__version__,
    )


def _row(name: str, config: HRAConfig) -> str:
    """The row of an adapter in the table."""
    rank = f"{config.r}{', rank_pattern' * bool(config.rank_pattern)}{', Gram-Schmidt' * config.apply_GS}"
    given = [names for names in (config.target_modules, config.target_parameters) if names]
    layers = ", ".join(f"`{format_names(names)}`" for names in given) or "`default of the model type`"
    cell = layers.replace("|", r"\|")  # a bar ends the cell, even in code
    return f"| {name} | {'.' if name == 'default' else name} | {rank} | {cell} |"


def _loading(root: nn.Module, base: str | None) -> str:
    """The lines of code that create the base model."""
    cls = original_class(root)
    library = cls.__module__.partition(".")[0]
    if base is None or library not in ("transformers", "diffusers"):
        return f"\nbase = ...  # the base model, a {cls.__name__}"
    return f'from {library} import {cls.__name__}\n\nbase = {cls.__name__}.from_pretrained("{base}")'


def _base(root: nn.Module, configs: Mapping[str, HRAConfig]) -> str | None:
    return next((name for config in configs.values() if (name := base_model_name(root, config))), None)
