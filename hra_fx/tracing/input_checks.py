"""The conditions on the inputs of a captured graph, as a module that the graph calls first.

`torch.export` finds conditions such as "the length is at most 512" while it captures a call. They are kept as
expressions, so that copies and pickles of the graph have them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from hra_fx.compat import guard_function


class Condition(NamedTuple):
    """One condition.

    Attributes:
        code: a Python expression over `args`, the inputs of the graph.
        text: the same with the names of the inputs.
    """

    code: str
    text: str


class InputChecks(nn.Module):
    """Checks the inputs of a graph in its current mode.

    Example:
        >>> checks = InputChecks([Condition("args[0].size()[1] == 4", "x.size()[1] == 4")], [])
        >>> checks(__import__("torch").ones(2, 4))
    """

    #: Keeps the call in `graph.eliminate_dead_code()`, which would drop it because nothing reads its result.
    _is_impure = True

    def __init__(self, in_train: Sequence[Condition], in_eval: Sequence[Condition]) -> None:
        """Store the conditions of both modes."""
        super().__init__()
        self.in_train = tuple(in_train)
        self.in_eval = tuple(in_eval)
        self._make()

    def forward(self, *args: Any) -> None:
        """Check all inputs.

        Raises:
            AssertionError: an input does not fit; the message says which, and what to do.
        """
        (self._check_train if self.training else self._check_eval)(*args)

    def add(self, condition: Condition) -> None:
        """Check one more condition, in both modes."""
        self.in_train, self.in_eval = (*self.in_train, condition), (*self.in_eval, condition)
        self._make()

    def extra_repr(self) -> str:
        """The conditions of the current mode."""
        return ", ".join(condition.text for condition in (self.in_train if self.training else self.in_eval))

    def _make(self) -> None:
        self._check_train, self._check_eval = (guard_function(_code(part)) for part in (self.in_train, self.in_eval))

    def __getstate__(self) -> dict[str, Any]:
        """Without the functions, which are made from the conditions."""
        return {name: value for name, value in vars(self).items() if name not in ("_check_train", "_check_eval")}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Make the functions again."""
        vars(self).update(state)
        self._make()


def _code(conditions: Sequence[Condition]) -> str:
    """The source of a function that asserts all conditions."""
    lines = ["def check(*args):"]
    for condition in conditions:
        message = (
            f"the graph was captured for inputs with `{condition.text}`. Call the original model, or capture it "
            "for these inputs: pass them as `example_inputs` to hra_fx.transform(..., trace=True), or to "
            "torch.export.export."
        )
        lines.append(f"    torch._assert({condition.code}, {message!r})")
    return "\n".join([*lines, "    return None"])
