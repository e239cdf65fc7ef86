"""The errors and the warning of hra_fx: one base class, and one subclass for each kind of problem.

A message reads "<layer or field>: <what is wrong, with the given value>. <what to do>." Errors about an argument are
also `ValueError`, so that code written for PEFT's `ValueError` catches them.
"""

from __future__ import annotations

__all__ = [
    "AdapterError",
    "CheckpointError",
    "ConfigError",
    "FoldError",
    "GraphInvariantError",
    "HRAError",
    "HRAWarning",
    "SelectionError",
    "UnsupportedLayerError",
    "VerificationError",
    "VisualizeError",
]


class HRAError(Exception):
    """Base class of every error that hra_fx raises on purpose."""


class ConfigError(HRAError, ValueError):
    """A configuration cannot be used: a field has a wrong type or value or is unknown, fields exclude each other, or a
    configuration file is missing, broken or written for another method."""


class SelectionError(HRAError, ValueError):
    """The configuration does not fit the model: no layer matches, a matched module is not a supported layer, or this
    architecture has no default targets."""


class UnsupportedLayerError(HRAError):
    """A matched layer cannot be adapted; the message names the layer, the reason and what to do."""


class CaptureError(HRAError):
    """A module could not be traced safely. Raised and caught inside the library, which shows `reason`.

    >>> CaptureError("a forward hook on 'layer1.conv'").reason
    "a forward hook on 'layer1.conv'"
    """

    def __init__(self, reason: str) -> None:
        """Keep `reason`, a phrase without a full stop."""
        super().__init__(reason)
        self.reason = reason


class AdapterError(HRAError, ValueError):
    """An adapter does not fit the model: its name is unknown, taken or cannot be used as a module name, or the current
    state of the model does not allow the operation."""


class CheckpointError(HRAError, ValueError):
    """A file of an adapter is missing, damaged, or does not fit the model; the message names the file and the key."""


class FoldError(HRAError):
    """A fold was refused, or a folded weight would not be finite; no weight of the model was changed."""


class GraphInvariantError(HRAError):
    """A rewritten graph breaks an invariant; the message names the node and the invariant."""


class VerificationError(HRAError):
    """`transform(..., verify=True)`: the transformed model does not compute what its folded weights do; the message
    names the first module whose output differs, or the layer. The model is unchanged."""


class VisualizeError(HRAError, ValueError):
    """A picture cannot be drawn: the file ending is unknown, or the format cannot hold the graph."""


class HRAWarning(UserWarning):
    """The category of every warning of hra_fx: filter it to silence them or to turn them into errors."""
