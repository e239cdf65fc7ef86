"""A layer that represents a 3-D parameter with the weights of several experts, so that it can be adapted.

A mixture of experts stores the weights of all its experts in one parameter of a module, such as `experts.gate_up_proj`.
Adapters need a separate layer for each such parameter: an `ExpertsWeight`. It becomes a child of the module,
`experts.hra_gate_up_proj`, when it gets its first adapter. The parameter itself is not moved.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from hra_fx.compat import state_modules

#: Prefix of the name of a child that represents a parameter of its module.
CHILD = "hra_"
#: Whether experts of these transformers classes, which do not set `is_transposed`, store `(experts, in, out)`.
_IS_TRANSPOSED = {
    "Llama4TextExperts": True,
    **dict.fromkeys(("InklingSharedExperts", "JetMoeParallelExperts", "LongcatFlashExperts", "Step3p7Experts"), False),
}


class ExpertsWeight(nn.Module):
    """One 3-D parameter of a module.

    Attributes:
        owner: the module that has the parameter. It is not a child of this one.
        parameter: the name of the parameter.
        fan_in_fan_out: whether it is stored as `(experts, in, out)` instead of `(experts, out, in)`.
        experts: the number of experts.
        width: `d`, the size of the input.
    """

    owner: nn.Module

    def __init__(self, owner: nn.Module, parameter: str) -> None:
        """Represent `owner.<parameter>`."""
        super().__init__()
        vars(self)["owner"] = owner  # setattr would make it a child
        self.parameter = parameter
        self.fan_in_fan_out = bool(is_transposed(owner))
        weight: Tensor = owner._parameters[parameter]  # type: ignore[assignment]
        self.experts = weight.shape[0]
        self.width = weight.shape[1 if self.fan_in_fan_out else 2]
        self.out = weight.shape[2 if self.fan_in_fan_out else 1]

    @property
    def weight(self) -> Tensor:
        """What the owner returns for the parameter: `W Q` while the model runs, and otherwise the parameter."""
        weight: Tensor = getattr(self.owner, self.parameter)
        return weight

    def forward(self) -> Tensor:
        """Read the parameter from its owner, which rotates it. In a graph, this call replaces the read."""
        return self.weight

    def extra_repr(self) -> str:
        """The parameter and its sizes, also for tables and errors."""
        return f"{type(self.owner).__name__}.{self.parameter} {self.experts}x({self.width}->{self.out})"


def parameter_of(path: str) -> str:
    """The name of the parameter that the layer with this path represents: `experts.up` for `experts.hra_up`."""
    owner, _, child = path.rpartition(".")
    return f"{owner}.{child.removeprefix(CHILD)}".lstrip(".")


def is_transposed(owner: nn.Module) -> bool | None:
    """Whether the 3-D parameters of a module are `(experts, in, out)`; `None` if this is unknown.

    transformers sets the attribute `is_transposed`. PEFT reads it too.
    """
    given = getattr(owner, "is_transposed", None)
    return given if isinstance(given, bool) else _IS_TRANSPOSED.get(type(owner).__name__)


def stacked_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(path of the module, module, name of the parameter) of every 3-D parameter of a model that is not a kernel."""
    for path, module in state_modules(model):
        if isinstance(module, (nn.Conv1d, nn.ConvTranspose1d, nn.ParameterDict)):
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.dim() == 3:
                yield path, module, name
