"""`fold_checkpoint`: merge adapters into the weights of a checkpoint on disk."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from rich.filesize import decimal
from torch import Tensor

from hra_fx.checkpoint.adapter import read_adapter
from hra_fx.checkpoint.disk.architecture import PIPELINE, Source, base_folder
from hra_fx.checkpoint.disk.plan import FilePlan, plan_fold
from hra_fx.checkpoint.disk.writing import write_result
from hra_fx.config import CONFIG_NAME
from hra_fx.errors import CheckpointError, HRAWarning
from hra_fx.selection.suggestions import some_of

_SHOWN = 4
Adapters: TypeAlias = Source | Sequence[Source]


@dataclass(frozen=True)
class CheckpointReport:
    """The result of a fold on disk.

    Attributes:
        folder: the new checkpoint.
        rotated: names of the tensors that were rotated.
        given: names of the tensors that an adapter replaced or added (`modules_to_save`, `bias`).
        untied: name of a new tensor -> name of the tensor that it was tied to in the base model.
        rounding: largest relative error `|W'' - W'|_F / |W'|_F` of the cast to the file's dtype, measured on the first
            rows of each weight.
        roughest: the tensor with this error.
        bytes: total size of the folder.
        seconds: run time.
        kept: files that were copied although they contain weights of the base model.
        verified: whether row norms and copies were checked.

    Example:
        >>> print(CheckpointReport(Path("folded"), ("a.weight",), (), {}, 1.6e-3, "a.weight", 2_300_000, 0.5))
        folded: 1 tensor rotated, 2.3 MB in 0.5 s
          relative rounding error up to 1.6e-03 (a.weight)
    """

    folder: Path
    rotated: tuple[str, ...]
    given: tuple[str, ...]
    untied: Mapping[str, str]
    rounding: float
    roughest: str
    bytes: int
    seconds: float
    kept: tuple[Path, ...] = ()
    verified: bool = False

    def __str__(self) -> str:
        """A summary in a few lines."""
        count = f"{len(self.rotated)} tensor{'s' * (len(self.rotated) != 1)} rotated"
        count += f", {len(self.given)} from the adapter" if self.given else ""
        lines = [f"{self.folder}: {count}, {decimal(self.bytes)} in {self.seconds:.1f} s"]
        if self.roughest:
            lines.append(f"  relative rounding error up to {self.rounding:.1e} ({self.roughest})")
        if self.verified:
            lines.append("  verified: row norms are preserved, everything else is identical")
        if self.untied:
            lines.append(f"  untied: {some_of([f'{new} (from {old})' for new, old in self.untied.items()], _SHOWN)}")
        if self.given:
            lines.append(f"  from the adapter: {some_of(self.given, _SHOWN)}")
        if self.kept:
            lines.append(f"  not folded: {some_of([file.name for file in self.kept], _SHOWN)}")
        return "\n".join(lines)


def fold_checkpoint(
    base_dir: Source,
    adapter_dir: Adapters | Mapping[str, Adapters],
    out_dir: Source,
    *,
    columns: Collection[str] | None = None,
    overwrite: bool = False,
    verify: bool = False,
    progress: bool = True,
) -> CheckpointReport:
    """Fold adapters into a checkpoint on disk, `W <- W Q`, one file after the other, without loading the model.

    All other tensors, metadata, the tokenizer and other files are copied unchanged; dtypes do not change. 16-bit
    weights are rotated in float32, wider ones in float64. Trained `bias` and `modules_to_save` replace the tensors of
    the base model. A weight tied to the embeddings gets its own tensor, and `tie_word_embeddings` becomes False in
    `config.json`, as in `hra_fx.fold`. Experts may be stored as 3-D tensors, or as one matrix for each expert, which
    transformers merges when it loads the model.

    Files are written to a hidden folder `.<name>.*.partial` next to `out_dir`, which is renamed at the end and removed
    after an error. So `out_dir` is complete or unchanged. A process that is killed leaves the hidden folder. To find
    the layout of weights, their names and tied weights, the model that `config.json` describes is built without
    weights, if an installed library supports it.

    Args:
        base_dir: a folder with safetensors files, as saved by `save_pretrained` of transformers, diffusers or timm; one
            file, or several with an index.
        adapter_dir: folder of an adapter (or its Hub name), saved by PEFT or hra_fx; or several, in order; or, for a
            diffusers pipeline, a mapping from subfolders of `base_dir` to adapters. No mapping is needed if the
            adapters are in subfolders with the names of the pipeline's parts.
        out_dir: the folder to create. It must not be inside `base_dir` or contain it.
        columns: layers that store their weight as `(in, out)`: ends of their paths, or of the names of parameters.
            Only for layers that `config.json` does not describe. `None` for unknown.
        overwrite: replace `out_dir` if it exists, after everything is written.
        verify: read the result again, and check that row norms are preserved up to rounding and everything else is
            equal.
        progress: show a progress bar on a terminal.

    Returns:
        A report. Printing it shows a summary in a few lines.

    Raises:
        CheckpointError: a file is missing, damaged, a pickle, or does not fit; or writing failed. The message names the
            file and the key.
        FoldError: a rotated weight is not finite, tied weights cannot be untied, or `verify` found a difference. After
            any error, `base_dir` and `out_dir` are unchanged.

    Warns:
        HRAWarning: the folder still contains other files with weights of the base model; or the model ties its weights
            again when it is loaded.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from safetensors.torch import save_file
        >>> from torch import nn
        >>> from hra_fx import HRAConfig, save_adapter, transform
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     base, adapter, out = (Path(folder, name) for name in ("base", "adapter", "out"))
        ...     base.mkdir()
        ...     save_file(nn.Sequential(nn.Linear(6, 4)).state_dict(), base / "model.safetensors")
        ...     save_adapter(transform(nn.Sequential(nn.Linear(6, 4)), HRAConfig(r=2, target_modules=["0"])), adapter)
        ...     fold_checkpoint(base, adapter, out, verify=True).rotated
        ('0.weight',)
    """
    begin = time.perf_counter()
    base, out = base_folder(base_dir), Path(os.path.realpath(out_dir))
    sources = _by_folder(base, adapter_dir)
    _check_apart(base, out, (source for several in sources.values() for source in several))
    adapters = {part: [read_adapter(source) for source in several] for part, several in sources.items()}
    plan = plan_fold(base, adapters, columns, base_dir)
    rounding = write_result(base, out, plan, overwrite=overwrite, verify=verify, progress=progress)
    changes = [
        (file.part + name, change)
        for file in plan.files.values()
        if isinstance(file, FilePlan)
        for name, change in file.tensors.items()
    ]
    roughest = max(rounding, key=lambda name: rounding[name], default="")
    report = CheckpointReport(
        folder=out,
        rotated=tuple(name for name, change in changes if isinstance(change, tuple)),
        given=tuple(name for name, change in changes if isinstance(change, Tensor)),
        untied=plan.untied,
        rounding=rounding.get(roughest, 0.0),
        roughest=roughest,
        bytes=sum(file.stat().st_size for file in out.rglob("*") if file.is_file()),
        seconds=time.perf_counter() - begin,
        kept=tuple(file.relative_to(base) for file in plan.kept),
        verified=verify,
    )
    if plan.retied_by:
        text = (
            f"{out}: {plan.retied_by[0]} sets tie_word_embeddings=True when it is loaded, and ignores config.json. Set "
            "it to False right after from_pretrained."
        )
        warnings.warn(text, HRAWarning, stacklevel=2)
    if report.kept:
        names = ", ".join(file.as_posix() for file in report.kept[:4])
        text = f"{out}: {names} still contain the base model's weights. Delete them, or do not load them."
        warnings.warn(text, HRAWarning, stacklevel=2)
    return report


def _check_apart(base: Path, out: Path, sources: Iterable[Source]) -> None:
    """Check that the output folder does not overlap with the base or with an adapter."""
    if out.is_file():
        raise CheckpointError(f"{out}: is a file. Choose another output folder.")
    inputs = {"the base": base} | {f"adapter {source}": Path(os.path.realpath(source)) for source in sources}
    for name, folder in inputs.items():
        if out == folder or out in folder.parents or (name == "the base" and folder in out.parents):
            raise CheckpointError(
                f"{out}: the output folder overlaps with {name}, {folder}. Choose a folder outside of it."
            )


def _by_folder(base: Path, adapter_dir: Adapters | Mapping[str, Adapters]) -> dict[str, list[Source]]:
    if isinstance(adapter_dir, Mapping):
        named = {_inside(base, name): _listed(given) for name, given in adapter_dir.items()}
    else:
        named = {"": _listed(adapter_dir)}
    if not named or not all(named.values()):
        raise CheckpointError("adapter_dir must name at least one adapter. Pass one or more folders, in order.")
    if isinstance(adapter_dir, Mapping) or not (base / PIPELINE).is_file():
        return named
    parts: dict[str, list[Source]] = {}
    for source in named[""]:
        for folder in _parts_of(base, source):
            parts.setdefault(folder.name, []).append(folder)
    return parts


def _parts_of(base: Path, source: Source) -> list[Path]:
    """The subfolders of an adapter folder, which must have the names of parts of the pipeline."""
    found = [file.parent for file in sorted(Path(source).glob(f"*/{CONFIG_NAME}"))]
    others = [folder for folder in found if not (base / folder.name).is_dir()]
    if others or not found or (Path(source) / CONFIG_NAME).is_file():
        raise CheckpointError(
            f"{others[0] if others else source}: the pipeline {base} has no part for this adapter. Name the part: "
            f"adapter_dir={{'unet': {str(source)!r}}} (--part unet)."
        )
    return found


def _listed(given: Adapters | None) -> list[Source]:
    return [given] if isinstance(given, (str, os.PathLike)) else list(given or ())


def _inside(base: Path, name: str) -> str:
    folder = Path(os.path.normpath(base / name))
    if not folder.is_dir() or (folder != base and base not in folder.parents):
        parts = ", ".join(repr(part.name) for part in sorted(base.iterdir()) if part.is_dir())
        raise CheckpointError(f"{base}: no such subfolder {name!r} (adapter_dir, --part). It has {parts or 'none'}.")
    return "" if folder == base else folder.relative_to(base).as_posix()
