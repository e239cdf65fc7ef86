"""The texts of a leaf: name of a module below its parent, its class and shape, its parameters."""

from __future__ import annotations

from torch import nn

from hra_fx.layers.target import REFLECTION, describe


def name_of(path: str) -> str:
    """The last part of a qualified name, with the part before it if the last one is a number.

    >>> name_of("encoder.layer.0.query"), name_of("encoder.layer.0")
    ('query', 'layer.0')
    """
    parts = path.split(".")
    start = -2 if len(parts) > 1 and parts[-1].partition("@")[0].isdigit() else -1
    return ".".join(parts[start:])


def describe_module(module: nn.Module) -> str:
    """Class and shape of a layer; the class of any other module.

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
