"""`fold_checkpoint`: from the folder of a model and adapters to the folder of the folded model."""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from hra_fx.api.load import load_adapter
from hra_fx.atomic_write import flush
from hra_fx.checkpoint.model_folder import CONFIG, IN_MEMORY, WEIGHTS, Source, load_model, stored_dtypes
from hra_fx.config import CONFIG_NAME
from hra_fx.errors import CheckpointError, HRAWarning
from hra_fx.model.fold import fold
from hra_fx.model.state import adapted_layers
from hra_fx.model.switch import set_adapter
from hra_fx.removed import without_removed_arguments
from hra_fx.selection.suggestions import some_of

#: Endings of other files with weights.
_OTHERS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".gguf", ".onnx")


@dataclass(frozen=True)
class CheckpointReport:
    """The result of `fold_checkpoint`: the new folder, and the paths of the layers with rotated weights.

    Example:
        >>> print(CheckpointReport(Path("folded"), ("model.layers.0.q_proj",)))
        folded: 1 layer rotated
    """

    folder: Path
    rotated: tuple[str, ...]

    def __str__(self) -> str:
        """One line."""
        return f"{self.folder}: {len(self.rotated):,} layer{'s' * (len(self.rotated) != 1)} rotated"


@without_removed_arguments
def fold_checkpoint(
    base_dir: Source,
    adapter_dir: Source | Sequence[Source],
    out_dir: Source,
) -> CheckpointReport:
    """Fold adapters into the model of a folder, `W <- W Q`, and write the folder of the folded model.

    The model is loaded on the CPU with the class that its `config.json` names, so the memory must hold the whole model
    and a few copies of one layer. `load_adapter` checks the adapters before anything is written. Weights are then
    written by `save_pretrained`, with the same keys and dtypes, and all other files are copied: the tokenizer, the chat
    template, and code. Tensors that the class does not use, such as heads for multi-token prediction, are not written.

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
        AdapterError, FoldError, UnsupportedLayerError: as for `load_adapter` and `fold`. After any error, `base_dir`
            and `out_dir` are unchanged.

    Warns:
        HRAWarning: tensors that the class does not use are not written; or the folder still contains other files with
            weights of the base model.

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
    base, out = Path(os.path.abspath(base_dir)), Path(os.path.realpath(out_dir))
    sources = [adapter_dir] if isinstance(adapter_dir, str | os.PathLike) else list(adapter_dir)
    if not sources:
        raise CheckpointError("adapter_dir must name at least one adapter. Pass one or more folders, in order.")
    _check_folders(base, out)
    with _staged(out) as folder:
        rotated = _write_folded(base, sources, folder)
        others = _copy_others(base, folder)
    if others:
        text = f"{out}: {some_of(others, 4)} may contain the base model's weights. Delete them, or do not load them."
        warnings.warn(text, HRAWarning, stacklevel=3)
    return CheckpointReport(out, rotated)


def load_base(folder: Path) -> tuple[Any, list[str]]:
    """Load the model of a folder on the CPU; and list the tensors that its class does not use."""
    if (folder / CONFIG_NAME).exists():
        raise CheckpointError(
            f"{folder / CONFIG_NAME}: there is an adapter in the folder of the base model, and from_pretrained would "
            "load it with the model. Name the base model before the adapters, or move this adapter to another folder."
        )
    return load_model(folder)


def load_adapters(model: Any, adapters: Sequence[Source]) -> list[str]:
    """Load several adapters into a model. Returns their names, in order."""
    names = [f"adapter_{i}" for i in range(1, len(adapters) + 1)]
    for name, source in zip(names, adapters, strict=True):
        load_adapter(model, source, name)
    return names


def _write_folded(base: Path, adapters: Sequence[Source], target: Path) -> tuple[str, ...]:
    """Write the weights of the folded model, and its configuration if it changes. Returns the paths of the layers."""
    model, unused = load_base(base)
    if unused:
        text = f"{base}: {type(model).__name__} does not use {some_of(unused, 4)}, so the result lacks them."
        warnings.warn(text, HRAWarning, stacklevel=4)
    before = _configuration(model)
    names = load_adapters(model, adapters)
    paths = (*adapted_layers(model),)
    set_adapter(model, names)
    fold(model)
    saved = target / "saved"
    saved.mkdir()
    if generation := getattr(model, "generation_config", None):
        model.generation_config = type(generation)()  # the base's is copied; transformers does not save every one
    # Not in larger files than those of the base.
    model.save_pretrained(saved, max_shard_size=max(file.stat().st_size for file in base.glob("*.safetensors")))
    _keep_dtypes(base, saved)
    untied = _configuration(model) != before
    for file in saved.iterdir():
        if WEIGHTS.fullmatch(file.name) or (untied and file.name == CONFIG):
            file.rename(target / file.name)
    shutil.rmtree(saved)
    return paths


def _keep_dtypes(base: Path, saved: Path) -> None:
    """Give each tensor that was saved the dtype that it has in the base, and its values there if they did not change.

    transformers loads all weights of a model in one dtype, but some have another one in the files.
    """
    stored = stored_dtypes(base)
    for file in saved.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            metadata, tensors = opened.metadata(), {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        other = [key for key, tensor in tensors.items() if key in stored and stored[key][1] != tensor.dtype]
        for key in other:
            source, dtype, _ = stored[key]
            with safe_open(source, framework="pt") as opened:
                value = opened.get_tensor(key)
            is_kept = torch.equal(value.to(tensors[key].dtype), tensors[key])
            if not is_kept and dtype.itemsize > tensors[key].dtype.itemsize:
                raise CheckpointError(
                    f"{source}: {key} has {dtype}, but most weights have {tensors[key].dtype}, so folding would lose "
                    f"precision. {IN_MEMORY}"
                )
            tensors[key] = value if is_kept else tensors[key].to(dtype)
        if other:
            written = file.with_suffix(".new")  # the tensors may be a view of the file
            save_file(tensors, written, metadata)
            written.replace(file)


def _configuration(model: Any) -> Any:
    """The configuration of a transformers model, which a fold changes if it unties weights."""
    config: Any = getattr(model, "config", None)
    return config.to_dict() if hasattr(config, "to_dict") else None


def _copy_others(base: Path, folder: Path) -> list[str]:
    """Copy all files but the weights, and those that are written already. Returns those with other weights."""

    def left_out(source: str, names: list[str]) -> list[str]:
        is_top = Path(source) == base
        return [name for name in names if is_top and (WEIGHTS.fullmatch(name) or (folder / name).is_file())]

    # Links are followed, as in the Hub cache.
    shutil.copytree(base, folder, ignore=left_out, dirs_exist_ok=True)
    others = (file.relative_to(folder).as_posix() for file in sorted(folder.rglob("*")) if file.suffix in _OTHERS)
    return [name for name in others if not WEIGHTS.fullmatch(name)]


@contextlib.contextmanager
def _staged(out: Path) -> Iterator[Path]:
    """Create a hidden folder, which becomes the output folder unless an exception is raised."""
    out.parent.mkdir(parents=True, exist_ok=True)
    staged = out.with_name(f".{out.name}.partial")
    shutil.rmtree(staged, ignore_errors=True)  # from a call that was killed
    staged.mkdir()
    try:
        yield staged
        for file in staged.rglob("*"):
            if file.is_file():
                flush(file)
        if out.is_dir():
            out.rmdir()
        staged.rename(out)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error  # the text of an OSError would contain the hidden folder
        raise CheckpointError(
            f"{out}: cannot write the result ({reason}). The output folder is unchanged. Free some space, check the "
            "disk, or choose another output folder."
        ) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _check_folders(base: Path, out: Path) -> None:
    """Check that the output folder is empty, and not in the base."""
    if (real := Path(os.path.realpath(base))) in out.parents:
        raise CheckpointError(f"{out}: the output folder is in the base, {real}. Choose a folder outside of it.")
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise CheckpointError(f"{out}: the output folder is not empty. Delete it, or choose another folder.")
