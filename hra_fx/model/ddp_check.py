"""What `DistributedDataParallel` does not know of: vectors that were put in, or set to be trained, after it was made.

It lists the parameters whose gradients it averages once, when it wraps a model, and goes on without a word when another
one is trained: the processes would drift apart.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from hra_fx.compat import active_ddp
from hra_fx.errors import AdapterError
from hra_fx.model.state import inventory

_KNOWN = "_hra_averaged"


def check_averaged(root: nn.Module) -> None:
    """Refuse a forward inside of `DistributedDataParallel` that would train what it does not average.

    Raises:
        AdapterError: naming a parameter.
    """
    wrapper = active_ddp()
    if wrapper is None or not torch.is_grad_enabled():
        return
    trained = [parameter for parameter in _of_adapters(root) if parameter.requires_grad]
    if all(id(parameter) in vars(wrapper).get(_KNOWN, ()) for parameter in trained):
        return
    vars(wrapper)[_KNOWN] = known = {id(parameter) for parameter in _averaged(wrapper)}
    ignored = set(wrapper.parameters_to_ignore)
    for path, parameter in wrapper.module.named_parameters():
        if any(parameter is one for one in trained) and id(parameter) not in known and path not in ignored:
            raise AdapterError(
                f"{path}: DistributedDataParallel would not average its gradient, for it was not trained yet when the "
                "model was wrapped, and the processes would drift apart. Wrap the model anew after hra_fx.set_adapter, "
                "add_adapter or load_adapter: DistributedDataParallel(wrapper.module)."
            )


def _of_adapters(root: nn.Module) -> Iterable[Tensor]:
    parts = inventory(root)
    for reflection in parts.reflections:
        yield from reflection.parameters()
    for owner, copies in parts.copies:
        for adapter in copies.copied:
            yield from copies.tensors(owner, adapter).values()


def _averaged(wrapper: DistributedDataParallel) -> Iterable[Tensor]:
    """Asked of the buckets themselves, since nothing else at the wrapper tells what was trained when it was made."""
    buckets = wrapper.reducer._get_zeros_like_grad_buckets()
    return (parameter for bucket in buckets for parameter in bucket.parameters())
