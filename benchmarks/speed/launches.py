"""What a step launches, by name, as torch's profiler records it.

An operator is a launch if it computes, and either has a kernel for the device or calls no other one that does: of
`linear`, which is made of others, `addmm` counts, and nothing within `addmm`. Its schema says whether it computes: it
writes to an argument, or returns a tensor that is not a view of one. Operators that only allocate memory are left out
by name. Kernels that inductor generates for a CPU count as operators.

On CUDA, the calls of the runtime and driver that launch a kernel or replay a graph are counted too. The replay of a
CUDA graph is one launch, for any number of kernels in it. Copies and fills by the runtime are not kernels.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Run = Callable[[], object]

#: cudaLaunchKernel, cudaLaunchKernelExC, cudaLaunchCooperativeKernel, cuLaunchKernel, cuLaunchKernelEx; of a graph
#: cudaGraphLaunch.
_KERNEL = re.compile(r"cu(da)?(Launch(Cooperative)?Kernel|GraphLaunch)")
#: With `torch._inductor.config.cpp.enable_kernel_profile`.
_GENERATED_FOR_CPU = re.compile(r"(graph_\d+_)?cpp_fused_")
GENERATED = "generated kernel"
#: They return memory as it is, or a view that their schema does not call one.
_ALLOCATION = re.compile(r"(new_)?empty(_|$)|_unsafe_view$|unsafe_(split|chunk)")


def operators(run: Run) -> Counter[str]:
    """The launched operators of one run, on any device."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    events: Any = profiler.events()
    return Counter(name for event in events if event.cpu_parent is None for name in within(event))


def kernels(run: Run) -> Counter[str]:
    """The launches of one run on a CUDA device, by the name of the call.

    Raises:
        RuntimeError: the profiler saw none, which it does if it has no access to the device's counters.
    """
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    found = launch_calls(profiler.key_averages())
    if not found:
        raise RuntimeError("The profiler saw no launches on the CUDA device.")
    return found


def launch_calls(averages: Iterable[Any]) -> Counter[str]:
    """Those among the profiler's averages, each with its `key` and `count`."""
    return Counter({event.key: event.count for event in averages if _KERNEL.match(event.key)})


def within(event: Any) -> Iterator[str]:
    """The names of the launches of an event of the profiler: itself, or those of its children."""
    if has_kernel(event.name):
        yield event.name
        return
    found = [name for child in event.cpu_children for name in within(child)]
    if found:
        yield from found
    elif _GENERATED_FOR_CPU.match(event.name):
        yield GENERATED
    elif is_launch(event.name):
        yield event.name


@functools.cache
def has_kernel(name: str) -> bool:
    """Whether an operator of this name is a launch, whatever it calls."""
    # Some overloads are TorchScript's alone, and not known to the dispatcher.
    names = _dispatched().intersection(overload.name() for overload in _computing(name))
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(one, key) for one in names for key in ("CPU", "CUDA"))


@functools.cache
def _dispatched() -> frozenset[str]:
    return frozenset(torch._C._dispatch_get_all_op_names())


@functools.cache
def is_launch(name: str) -> bool:
    """Whether an operator of this name is a launch if it calls none.

    >>> [is_launch(f"aten::{name}") for name in ("mm", "add_", "transpose", "detach_", "empty_like", "item")]
    [True, True, False, False, False, False]
    """
    return bool(_computing(name))


def _computing(name: str) -> list[Any]:
    """The overloads of an ATen operator that compute."""
    library, _, operator = name.rpartition("::")
    if library != "aten" or _ALLOCATION.match(operator):
        return []
    packet = getattr(torch.ops.aten, operator)
    return [overload for overload in (getattr(packet, one) for one in packet.overloads()) if _computes(overload)]


def _computes(overload: Any) -> bool:
    """Whether an operator writes to an argument, or returns a tensor that is not a view of one."""
    schema = overload._schema
    if torch.Tag.inplace_view in overload.tags:
        return False
    writes = any(argument.alias_info is not None and argument.alias_info.is_write for argument in schema.arguments)
    return writes or any("Tensor" in str(result.type) and result.alias_info is None for result in schema.returns)
