"""`fold_checkpoint` and `unfold_checkpoint`: reflections into the weights of a checkpoint on disk, and out of them."""

from __future__ import annotations

import time
import warnings
from collections.abc import Collection, Mapping

from hra_fx.checkpoint.disk.arguments import Adapters, Source, read_request
from hra_fx.checkpoint.disk.execute import Making
from hra_fx.checkpoint.disk.report import CheckpointReport
from hra_fx.checkpoint.disk.result import Result, result_of
from hra_fx.errors import HRAWarning


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
    """Fold adapters into a checkpoint on disk, `W <- W Q`, tensor by tensor: no model is made, nor held in memory.

    The result has the files of the base: tensors that no adapter changes, metadata, tokenizer and all else byte for
    byte, and every dtype. Weights of 16 bits are turned in float32, wider ones in float64. What `bias` and
    `modules_to_save` trained is in its place. A weight that is tied to the embeddings, and so not in the file, gets a
    place of its own, and `tie_word_embeddings` goes off in `config.json`, as with `hra_fx.fold`.

    All is written into the hidden folder `.<name>.partial` beside `out_dir`, and renamed at the end. Stopped at any
    moment, the same call goes on where it was; `out_dir` is whole or not there.

    Args:
        base_dir: a folder with safetensors files, as `save_pretrained` of transformers, diffusers or timm writes it;
            one file or several with an index.
        adapter_dir: the folder of an adapter (or its name on the Hub), by PEFT or hra_fx; several in their order; or,
            for a pipeline of diffusers, subfolder of `base_dir` -> that. An adapter folder here, all of whose adapters
            are in subfolders that are called as those of a pipeline, needs no mapping.
        out_dir: the folder to be made, neither in `base_dir` nor around it.
        columns: which layers store their weight as `(in, out)`: the last parts of their paths. `None`: those that are
            transformers' `Conv1D` by `config.json`, which it must not contradict.
        overwrite: replace `out_dir` where it is there, once all is written.
        verify: read all again: rows have the lengths that they had, but for rounding, and all else is equal; also
            where a call before this one was stopped when all was in its place.
        progress: show a bar, where there is a terminal.

    Returns:
        What was done; it prints in a few lines.

    Raises:
        CheckpointError: a file is missing, damaged, a pickle, or does not fit; or the disk refused. It names the file,
            and the key.
        FoldError: a rotated weight is not finite, what is tied cannot come apart, or `verify` found a difference.
            After any error `base_dir` and `out_dir` are as they were.

    Warns:
        HRAWarning: files with weights of the base are beside the folded ones; or a model ties again when it is loaded.

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
    return _run(base_dir, adapter_dir, out_dir, columns, overwrite, verify, progress, back=False)


def unfold_checkpoint(
    folded_dir: Source,
    adapter_dir: Adapters | Mapping[str, Adapters],
    out_dir: Source,
    *,
    columns: Collection[str] | None = None,
    overwrite: bool = False,
    verify: bool = False,
    progress: bool = True,
) -> CheckpointReport:
    """Take adapters out of a folded checkpoint, `W <- W' Q^T`, up to the rounding of its dtype.

    Arguments, result and errors are those of `fold_checkpoint`; several adapters are given in the order of the fold.
    What a fold untied stays untied.

    Raises:
        CheckpointError: also where an adapter has `modules_to_save` or biases, for what these replaced is lost.

    Example:
        >>> unfold_checkpoint("nowhere", "adapter", "out")
        Traceback (most recent call last):
        hra_fx.errors.CheckpointError: nowhere: there is no such folder here. A model of the Hub: ...
    """
    return _run(folded_dir, adapter_dir, out_dir, columns, overwrite, verify, progress, back=True)


def _run(
    base_dir: Source,
    adapter_dir: Adapters | Mapping[str, Adapters],
    out_dir: Source,
    columns: Collection[str] | None,
    overwrite: bool,
    verify: bool,
    progress: bool,
    *,
    back: bool,
) -> CheckpointReport:
    begin = time.perf_counter()
    request = read_request(base_dir, adapter_dir, out_dir)
    result = result_of(request, columns, back=back)
    making = Making(request, result, progress=progress)
    making.run(overwrite=overwrite, verify=verify)
    parts = result.parts.items()
    roughest = max(making.rounding, key=lambda name: making.rounding[name], default="")
    report = CheckpointReport(
        folder=request.out,
        rotated=tuple(_full(part, name) for part, plan in parts for name in plan.rotated),
        given=tuple(_full(part, name) for part, plan in parts for name in plan.given),
        untied={_full(part, new): _full(part, old) for part, plan in parts for new, old in plan.untied.items()},
        rounding=making.rounding.get(roughest, 0.0),
        roughest=roughest,
        bytes=sum(making.sizes.values()),
        seconds=time.perf_counter() - begin,
        reused=making.reused,
        kept=tuple(file.relative_to(request.base) for _, plan in parts for file in plan.kept),
        verified=verify,
    )
    _warn(result, report)
    return report


def _full(part: str, name: str) -> str:
    return f"{part}/{name}" if part else name


def _warn(result: Result, report: CheckpointReport) -> None:
    again = [kind for plan in result.parts.values() for kind in plan.returning]
    if again:
        text = (
            f"{report.folder}: {again[0]} says tie_word_embeddings=True again when it is loaded, whatever config.json "
            "says: set it to False right after from_pretrained."
        )
        warnings.warn(text, HRAWarning, stacklevel=4)
    if report.kept:
        names = ", ".join(file.as_posix() for file in report.kept[:4])
        text = f"{report.folder}: {names} hold the weights of the base still. Delete them, or do not load them."
        warnings.warn(text, HRAWarning, stacklevel=4)
