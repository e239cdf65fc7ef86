"""The kinds of error: one base, and `ValueError` where a caller's argument is to blame."""

from __future__ import annotations

import pickle

import pytest

from hra_fx import errors

ARGUMENT = {"AdapterError", "CheckpointError", "ConfigError", "SelectionError", "VisualizeError"}
KINDS = [name for name in errors.__all__ if name not in ("HRAError", "HRAWarning")]


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_an_hra_error_and_pickles(name: str) -> None:
    error = getattr(errors, name)("layer: reason")
    assert isinstance(error, errors.HRAError)
    assert isinstance(error, ValueError) == (name in ARGUMENT)
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (type(error), "layer: reason")


def test_capture_error_carries_its_reason() -> None:
    assert (
        errors.CaptureError("a hook on 'fc'").reason == str(errors.CaptureError("a hook on 'fc'")) == "a hook on 'fc'"
    )


def test_warning_is_a_user_warning() -> None:
    assert issubclass(errors.HRAWarning, UserWarning)
    assert not issubclass(errors.HRAWarning, errors.HRAError)
