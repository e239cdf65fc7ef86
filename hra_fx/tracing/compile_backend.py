"""`torch.compile(model, backend="hra_fx")`: runs passes on the graphs of TorchDynamo, then another backend.

These graphs contain the reflections of all layers of a call, across modules: layers that read the same value can share
a product, and all factors can be computed in one batch.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from hra_fx.compat import inductor_mode_options, lookup_backend
from hra_fx.errors import ConfigError
from hra_fx.kernels.compile_ops import REFLECTED_BY, REFLECTED_ROWS, UNIT_FACTORS
from hra_fx.layers.target import LayerOperators
from passes.hoist import HoistPass
from passes.share import SharePass

#: The names of its operators for `torch.utils.checkpoint`.
_CHECKPOINTS = ("tag_activation_checkpoint", "wrap_activation_checkpoint")
_OURS = {"backend": "inductor", "share": True, "hoist": True}


def hra_fx(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a graph of TorchDynamo. `torch.compile` calls this function.

    Args:
        graph_module: the graph, with one node for each reflection. It is modified.
        example_inputs: its inputs.
        mode: the mode of inductor.
        options: `backend`, which compiles the result (`"inductor"` by default, `"aot_eager"`, `"eager"` or any other
            name that torch knows); `share` and `hoist`, whether these passes run (True by default). All other options
            are passed to inductor.

    Raises:
        ConfigError: `mode`, or an option of inductor, with another backend.

    Example:
        >>> import torch, hra_fx
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4))
        >>> model = hra_fx.transform(model, hra_fx.HRAConfig(r=2, target_modules=["0"]))
        >>> compiled = torch.compile(model, backend="hra_fx", options={"backend": "eager"})
        >>> compiled(torch.ones(3, 6)).shape
        torch.Size([3, 4])
    """
    settings = {**_OURS, **(options or {})}
    inner, share, hoist = (settings.pop(name) for name in _OURS)
    keywords: dict[str, Any] = {}
    if inner == "inductor":
        keywords["config_patches"] = {**_patches(mode), **settings}
    elif mode or settings:
        asked = ", ".join([*settings, *(["mode"] if mode else [])])
        raise ConfigError(
            f"torch.compile(backend='hra_fx'): {asked} can be given for inductor only, not for {inner!r}."
        )
    rewrite(graph_module, share=share, hoist=hoist)
    compiled: Callable[..., Any] = lookup_backend(inner)(graph_module, list(example_inputs), **keywords)
    return compiled


def rewrite(graph_module: fx.GraphModule, *, share: bool, hoist: bool) -> None:
    """Run the passes on a graph, and on the checkpointed graphs in it.

    Branches (`torch.cond`) and loops are not changed: their outputs and gradients must have equal strides, and slices
    of a batch do not.
    """
    operators = LayerOperators(REFLECTED_ROWS, UNIT_FACTORS, REFLECTED_BY)
    chosen = [made(operators) for made, wanted in ((SharePass, share), (HoistPass, hoist)) if wanted]
    waiting = [graph_module]
    while waiting:
        part = waiting.pop()
        for step in chosen:
            step(part)
        waiting += _checkpointed(part)


def _checkpointed(graph_module: fx.GraphModule) -> list[fx.GraphModule]:
    """The bodies of the checkpoints in a graph."""
    bodies = []
    for node in graph_module.graph.nodes:
        if getattr(node.target, "__name__", "") in _CHECKPOINTS:
            names = [str(one.target) for one in node.all_input_nodes if one.op == "get_attr"]
            found = [operator.attrgetter(name)(graph_module) for name in names]
            bodies += [body for body in found if isinstance(body, fx.GraphModule)]
    return bodies


def _patches(mode: str | None) -> dict[str, Any]:
    if not mode or mode == "default":
        return {}
    return inductor_mode_options(mode)
