"""The lists of public names agree: what is loaded lazily, what type checkers read, and the errors."""

from __future__ import annotations

import ast
import inspect

import hra_fx
from hra_fx import errors


def for_type_checkers() -> dict[str, str]:
    """Public name -> module, of the imports under `if TYPE_CHECKING`."""
    tree = ast.parse(inspect.getsource(hra_fx))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    assert all(alias.asname == alias.name for node in imports for alias in node.names)
    return {alias.name: str(node.module).removeprefix("hra_fx.") for node in imports for alias in node.names}


def test_lazy_names_are_those_that_type_checkers_see() -> None:
    assert for_type_checkers() == hra_fx._HOMES


def test_every_error_is_public_and_nothing_else() -> None:
    assert set(hra_fx.__all__) == {*hra_fx._HOMES, *errors.__all__}
    assert all(getattr(hra_fx, name) is getattr(errors, name) for name in errors.__all__)
    defined = {name for name, value in vars(errors).items() if inspect.isclass(value)}
    assert defined - set(errors.__all__) == {"CaptureError"}  # caught inside the library


def test_every_public_name_is_loaded_from_its_home() -> None:
    for name in hra_fx.__all__:
        assert getattr(hra_fx, name).__name__ == ("HRAModel" if name == "PeftModel" else name)
