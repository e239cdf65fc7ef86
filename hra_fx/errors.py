"""The errors and the warning that hra_fx raises: one base class, one named kind for each sort of trouble.

A message reads "<layer or field>: <what is wrong, with both values>. <the way out>." Kinds that report a bad argument
are also `ValueError`, so that code written for PEFT's `ValueError` goes on catching them.
"""

from __future__ import annotations

__all__ = [
    "AdapterError",
    "CaptureError",
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
    """Base of every error that hra_fx raises on purpose; catch it to catch them all."""


class ConfigError(HRAError, ValueError):
    """A configuration that cannot be used: a field of the wrong type or value, fields that exclude each other, an
    unknown field, or a configuration file that is missing, broken or written for another method."""


class SelectionError(HRAError, ValueError):
    """The configuration does not fit the model: no layer matched, a matched module is of another kind, or
    there are no default targets for this architecture."""


class UnsupportedLayerError(HRAError):
    """A matched layer that cannot carry reflections; the message names the layer, the reason and the way out."""


class CaptureError(HRAError):
    """A region that could not be traced safely. It is raised and caught inside the library: a refused region falls back
    to smaller ones, and `reason` is what the report shows for it.

    >>> CaptureError("a forward hook on 'layer1.conv'").reason
    "a forward hook on 'layer1.conv'"
    """

    def __init__(self, reason: str) -> None:
        """Keep `reason`, a phrase without a full stop that says why the region was refused."""
        super().__init__(reason)
        self.reason = reason


class AdapterError(HRAError, ValueError):
    """An adapter name or an adapter state that does not fit: an unknown name, a name that is taken or not usable as a
    module name, or an operation that the current state does not allow."""


class CheckpointError(HRAError, ValueError):
    """A file of an adapter that is missing, damaged, or does not fit the model; it names the file, and the key."""


class FoldError(HRAError):
    """Folding was refused or gave a weight that is not finite; no weight of the model was changed."""


class GraphInvariantError(HRAError):
    """A rewritten graph breaks a rule that every rewritten graph keeps; the message names the node and the rule."""


class VerificationError(HRAError):
    """`transform(..., verify=True)` found a rewritten model that does not compute what its folded self does; the
    message names the first region, or the layer, and the model is as it was."""


class VisualizeError(HRAError, ValueError):
    """A picture that cannot be drawn: an unknown file ending, or a graph that the asked format cannot hold."""


class HRAWarning(UserWarning):
    """Every warning of hra_fx has this category, so that one filter silences them or turns them into errors."""
