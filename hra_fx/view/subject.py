"""The modules of a picture: the boxes of adapted layers, names, classes and parameters."""

from __future__ import annotations

from torch import fx, nn

from hra_fx.layers.adapted_layer import AdaptedLayer
from hra_fx.layers.target import REFLECTION, describe
from hra_fx.model.state import AdapterState, adapted_layers, get_state
from hra_fx.passes.nodes import normalize_path
from hra_fx.view.tree import Leaf


def boxes_of(model: nn.Module) -> dict[str, Leaf]:
    """The box of each adapted layer, by path."""
    state = get_state(model)
    return {path: _box(path, layer, state) for path, layer in adapted_layers(model).items()}


def classes_of(model: nn.Module) -> dict[str, str]:
    """The class names of all modules by path. A `GraphModule` knows those that it replaced with plain modules."""
    classes = {path: type(part).__name__ for path, part in model.named_modules(remove_duplicate=False)}
    plain = {path for path, part in model.named_modules() if type(part) is nn.Module}
    for node in model.graph.nodes if isinstance(model, fx.GraphModule) else ():
        for path, cls in (node.meta.get("nn_module_stack") or {}).values():
            if (normal := normalize_path(path)) in plain:
                classes[normal] = cls.rpartition(".")[2] if isinstance(cls, str) else cls.__name__
                plain.remove(normal)
    return classes


def _box(path: str, layer: AdaptedLayer, state: AdapterState | None) -> Leaf:
    reflection, used = layer.hra_u, layer.hra_u.active
    if state is not None and reflection.unmerged is not None:  # merged adapters are also in use
        used = tuple(name for name in state.active if name in reflection)
    return Leaf(
        name=name_of(path),
        detail=describe_module(layer),
        kind="adapted_layer",
        op="eager",
        target=path,
        place=(),
        marks=(path,),
        width=reflection.width,
        rank=sum(reflection.specs[name].r for name in used),
        paths=(path,),
        parameters=sum(parameter.numel() for parameter in own_parameters(layer)),
    )


def name_of(path: str) -> str:
    """The last part of a qualified name; if it is a number, with the part before it.

    >>> name_of("encoder.layer.0.query"), name_of("encoder.layer.0")
    ('query', 'layer.0')
    """
    parts = path.split(".")
    start = -2 if len(parts) > 1 and parts[-1].partition("@")[0].isdigit() else -1
    return ".".join(parts[start:])


def describe_module(module: nn.Module) -> str:
    """The class and shape of a layer, or the class of any other module.

    >>> describe_module(nn.Linear(4, 8)), describe_module(nn.ReLU())
    ('Linear 4→8', 'ReLU')
    """
    text = describe(module).replace("->", "→")
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and set(module.stride) != {1}:
        text += f", stride {module.stride[0] if len(set(module.stride)) == 1 else module.stride}"
    return text


def own_parameters(module: nn.Module) -> list[nn.Parameter]:
    """A module's parameters without its adapters.

    >>> [tuple(parameter.shape) for parameter in own_parameters(nn.Linear(4, 8))]
    [(8, 4), (8,)]
    """
    return [parameter for path, parameter in module.named_parameters() if REFLECTION not in path.split(".")]
