"""The errors and the warning of hra_fx.

A message names the layer or field, the expected and the actual value, and a fix: "`r` must be a positive int, got 0."
Errors about arguments are also `ValueError`, so code that catches the `ValueError` of PEFT keeps working.
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
    "VisualizeError",
]


class HRAError(Exception):
    """Base class of all errors of hra_fx."""


class ConfigError(HRAError, ValueError):
    """The configuration is invalid.

    It has an unknown field, a wrong type or value, or fields that exclude each other. Or a configuration file is
    missing, damaged, or for another method.
    """


class SelectionError(HRAError, ValueError):
    """The configuration does not fit the model.

    No layer matches, a matched module does not have a supported type, or the architecture has no default targets.
    """


class UnsupportedLayerError(HRAError):
    """A selected layer, or the model, cannot be adapted. The message names the layer, the reason and a fix."""


class CaptureError(HRAError):
    """A model cannot be traced with torch.fx or torch.export. The errors of public functions show its `reason`.

    >>> CaptureError("a forward hook on 'layer1.conv'").reason
    "a forward hook on 'layer1.conv'"
    """

    def __init__(self, reason: str) -> None:
        """Store `reason`, a phrase without a final period."""
        super().__init__(reason)
        self.reason = reason


class AdapterError(HRAError, ValueError):
    """An adapter name cannot be used, or the operation is not possible in the current state.

    The name is unknown, taken or not a valid module name. Or adapters are merged, sharded or without data, for example.
    """


class CheckpointError(HRAError, ValueError):
    """A file is missing, damaged, or does not fit the model. The message names the file and the key."""


class FoldError(HRAError):
    """A weight cannot be folded. No weight was changed."""


class GraphInvariantError(HRAError):
    """A pass cannot rewrite a graph correctly. The message names the node and the reason."""


class VisualizeError(HRAError, ValueError):
    """A picture cannot be made: a wrong file extension, focus or type of model."""


class HRAWarning(UserWarning):
    """The category of all warnings of hra_fx."""
