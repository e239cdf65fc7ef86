"""`fold_checkpoint`: from the folder of a model and adapters to the folder of the folded model."""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hra_fx.api.load import load_adapter
from hra_fx.checkpoint.model_folder import CONFIG, WEIGHTS, Source, load_model, stored_dtypes
from hra_fx.errors import CheckpointError, HRAWarning
from hra_fx.model.fold import fold
from hra_fx.model.state import adapted_layers
from hra_fx.model.switch import set_adapter
from hra_fx.selection.suggestions import some_of

#: Names of files of weights, in any format. Those of the base model are not copied.
_WEIGHTS = re.compile(r".*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|ot|gguf|onnx)(\.index\.json)?")


@dataclass(frozen=True)
class CheckpointReport:
    """The result of `fold_checkpoint`: the new folder, and the paths of the layers with rotated weights."""

    folder: Path
    rotated: tuple[str, ...]

    def __str__(self) -> str:
        """One line."""
        return f"{self.folder}: {len(self.rotated):,} layer{'s' * (len(self.rotated) != 1)} rotated"


def fold_checkpoint(
    base_dir: Source,
    adapter_dir: Source | Sequence[Source],
    out_dir: Source,
) -> CheckpointReport:
    """Fold adapters into the model of a folder, `W <- W Q`, and write the folder of the folded model.

    The model is loaded on the CPU with the class that its `config.json` names, so the memory must hold the whole model
    and a few copies of one layer. `load_adapter` checks the adapters before anything is written. Weights are then
    written by `save_pretrained`, with the same keys and dtypes. All other files are copied (the tokenizer, the chat
    template, code), except for other files of weights beside them. Tensors that the class does not use, such as heads
    for multi-token prediction, are not written.

    The new folder is written as `.<name>.partial` beside `out_dir`, and renamed at the end. So `out_dir` is complete or
    unchanged. After an error the hidden folder is removed; if the process is killed, the next call removes it.

    Args:
        base_dir: a folder with `config.json` and safetensors files, as saved by transformers or diffusers. For a
            pipeline of diffusers, this is the folder of one of its parts, such as `"pipeline/unet"`.
        adapter_dir: folder of an adapter (or its Hub name), saved by PEFT or hra_fx; or several, in order.
        out_dir: the folder to create, which must be empty if it exists. It must not be inside `base_dir`.

    Returns:
        The new folder, and the rotated layers.

    Raises:
        CheckpointError: a file is missing, damaged, a pickle, or does not fit; or writing failed.
        ConfigError: the configuration of an adapter is invalid.
        AdapterError, FoldError, UnsupportedLayerError: as for `load_adapter` and `fold`. After any error, `base_dir`
            and `out_dir` are unchanged.

    Warns:
        HRAWarning: tensors that the class does not use, or ties to others, are not written.

    Example:
        >>> import tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from hra_fx import HRAConfig, save_adapter, transform
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=16))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     base, adapter, out = (Path(folder, name) for name in ("base", "adapter", "out"))
        ...     model.save_pretrained(base)
        ...     save_adapter(transform(model, HRAConfig(r=2, target_modules=["q_proj"])), adapter)
        ...     fold_checkpoint(base, adapter, out).rotated
        ('model.layers.0.self_attn.q_proj',)
    """
    base, out = Path(os.path.realpath(base_dir)), Path(os.path.realpath(out_dir))
    sources = [adapter_dir] if isinstance(adapter_dir, str | os.PathLike) else list(adapter_dir)
    if base in out.parents:
        raise CheckpointError(f"{out}: the output folder is in the base, {base}. Choose a folder outside of it.")
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise CheckpointError(f"{out}: the output folder is not empty. Delete it, or choose another folder.")
    staged = out.with_name(f".{out.name}.partial")
    shutil.rmtree(staged, ignore_errors=True)  # from a call that was killed
    try:
        staged.mkdir(parents=True)
        rotated = _write_folded(base, sources, staged)
        staged.rename(out)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error  # the text of an OSError would contain the hidden folder
        raise CheckpointError(
            f"{out}: cannot write the result ({reason}). The output folder is unchanged. Free some space, check the "
            "disk, or choose another output folder."
        ) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    if missing := sorted(stored_dtypes(base).keys() - stored_dtypes(out).keys()):
        text = f"{out}: has no {some_of(missing, 4)}, which the class of the model does not use, or ties to others."
        warnings.warn(text, HRAWarning, stacklevel=2)
    return CheckpointReport(out, rotated)


def load_adapted(base: Path, adapters: Sequence[Source]) -> tuple[Any, list[str]]:
    """Load the model of a folder on the CPU, with several adapters. Returns it with their names, in order."""
    if not adapters:
        raise CheckpointError("adapter_dir must name at least one adapter. Pass one or more folders, in order.")
    model = load_model(base)
    names = [f"adapter_{i}" for i in range(1, len(adapters) + 1)]
    for name, source in zip(names, adapters, strict=True):
        load_adapter(model, source, name)
    return model, names


def _write_folded(base: Path, adapters: Sequence[Source], target: Path) -> tuple[str, ...]:
    """Write the folded model, and copy all other files. Returns the paths of the rotated layers."""
    model, names = load_adapted(base, adapters)
    paths, before = (*adapted_layers(model),), str(model.config)
    set_adapter(model, names)
    fold(model)
    saved = target / "saved"
    if generation := getattr(model, "generation_config", None):
        model.generation_config = type(generation)()  # the base's is copied; transformers does not save every one
    # Not in larger files than those of the base.
    model.save_pretrained(saved, max_shard_size=max(file.stat().st_size for file in base.glob("*.safetensors")))
    dtypes = stored_dtypes(base)
    for file in saved.iterdir():
        if file.suffix == ".safetensors" and len({*dtypes.values()}) > 1:  # the model has one dtype in memory
            tensors = {key: one.to(dtypes.get(key, one.dtype)) for key, one in load_file(file).items()}
            save_file(tensors, target / file.name, {"format": "pt"})
        # A fold that unties weights changes the configuration.
        elif WEIGHTS.fullmatch(file.name) or (file.name == CONFIG and str(model.config) != before):
            file.rename(target / file.name)
    shutil.rmtree(saved)

    def left_out(source: str, names: list[str]) -> list[str]:
        is_top = Path(source) == base
        return [name for name in names if is_top and (_WEIGHTS.fullmatch(name) or (target / name).is_file())]

    # Links are followed, as in the Hub cache.
    shutil.copytree(base, target, ignore=left_out, dirs_exist_ok=True)
    return paths
