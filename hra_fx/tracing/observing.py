"""One call of a copy of the model, to see how its modules are called and who reads which weight."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from hra_fx.errors import AdapterError, CaptureError
from hra_fx.layers.class_swap import original_class
from hra_fx.model.example_inputs import Call, fresh, random_kept
from hra_fx.overlooked import WeightWatch
from hra_fx.tracing.call_signature import Calling, observed


class Observed(NamedTuple):
    """What one call of a model showed.

    Attributes:
        callings: path of a module -> how each call of it was made, or why there is no one way.
        read: path of a layer whose weight another module uses -> which one.
    """

    callings: dict[str, Calling | str]
    read: dict[str, str]


NOTHING = Observed({}, {})


def observe(model: nn.Module, call: Call, layers: Mapping[str, nn.Module]) -> Observed:
    """Call a copy of the model, in the mode in which it is, from the random state that there is; nothing is changed.

    Args:
        model: the model, not transformed yet.
        call: positional and keyword arguments.
        layers: path -> layer that is to be adapted.

    Raises:
        AdapterError: the model does not run on them.
    """
    try:
        twin = copy.deepcopy(model)  # weights and all, for a forward may write any tensor
    except Exception as error:  # whatever some attribute of the model's makes of a copy
        raise AdapterError(
            f"example_inputs: {type(model).__name__} cannot be copied ({type(error).__name__}: {error}), and a copy is "
            "what is called. Leave example_inputs out, or make it ready to be copied."
        ) from error
    seen: dict[str, Calling | str] = {}
    for path, module in twin.named_modules():
        module.register_forward_pre_hook(_recorder(path, seen), with_kwargs=True)
    watch = WeightWatch(twin, {path: twin.get_submodule(path) for path in layers})
    args, kwargs = fresh(call)
    with random_kept(), watch:
        try:
            twin(*args, **kwargs)
        except Exception as error:  # whatever the model's own code makes of the inputs
            raise AdapterError(
                f"example_inputs: {type(model).__name__} does not run on them ({type(error).__name__}: {error}). Give "
                "inputs that the model takes."
            ) from error
    return Observed(seen, watch.found)


def _recorder(path: str, seen: dict[str, Calling | str]) -> Any:
    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kind: Any = original_class(module)
        try:
            calling: Calling | str = observed(kind, args, kwargs)
        except CaptureError as error:
            calling = error.reason
        except (TypeError, ValueError):  # no signature, or a call that its forward will refuse
            calling = "it is called in a way that its signature does not tell"
        before = seen.setdefault(path, calling)
        if isinstance(before, Calling) and not (isinstance(calling, Calling) and before.is_like(calling)):
            seen[path] = "it is called in several ways"

    return record
