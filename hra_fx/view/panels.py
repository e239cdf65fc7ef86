"""The panels of a picture: an overview of the model, and one panel for each kind of block that is closed there.

The total number of boxes has a limit, so that the picture fits a page. Every adapted layer is in exactly one box of the
overview; a panel shows the inside of such boxes.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field, replace
from math import ceil
from string import ascii_uppercase

from hra_fx.view.repeats import merge_repeats, runs_where, signature
from hra_fx.view.tree import Item, Leaf, Scope, contract, cut, joined, span

BUDGET = 60
_OVERVIEW = 24
_PANEL = 20
#: A scope inside the model with more items than this also merges neighbors of different sizes.
_ROOMY = 8
#: Maximum length of the list of operations in a box.
_KINDS = 28
#: Repeated blocks with more items than this stay closed in the overview.
_SMALL = 3


@dataclass(frozen=True)
class Block:
    """A box of a panel: a leaf, a closed scope, or an open one with its parts.

    Attributes:
        item: what it stands for.
        parts: the blocks inside an open scope, `None` for a single box.
        letter: letter of the panel that shows the inside, if any.
    """

    item: Item
    parts: tuple[Block, ...] | None = None
    letter: str = ""

    def boxes(self) -> Iterator[Block]:
        """All blocks that are single boxes."""
        if self.parts is None:
            yield self
        else:
            for part in self.parts:
                yield from part.boxes()


@dataclass(frozen=True)
class Panel:
    """One panel.

    Attributes:
        letter: empty for the overview.
        block: what it shows.
        used: names of the blocks whose inside it shows.
        title: its heading; `""` for a panel that is alone, or has a letter.
    """

    letter: str
    block: Block
    used: tuple[str, ...] = ()
    title: str = ""


def plan(root: Scope, budget: int = BUDGET) -> list[Panel]:
    """The overview, then the panels of the closed blocks, in order of appearance.

    Args:
        root: the tree of a model.
        budget: maximum number of boxes in all panels.
    """
    return _Planner(budget, bool(root.marks)).panels(_fitted(root, min(budget, _OVERVIEW)))


def opened(root: Scope, depth: int, focus: str = "") -> Panel:
    """One panel with `depth` levels of modules open, of any size.

    Args:
        root: the tree of a model, or of a module in it.
        depth: 0 for closed children.
        focus: path of that module.
    """
    return Panel("", _opened(root, depth + len(focus.split(".")) * bool(focus)))


def _opened(item: Item, levels: int) -> Block:
    is_open = isinstance(item, Scope) and (not item.path or item.path.count(".") < levels)
    if isinstance(item, Leaf) or not is_open:
        return Block(item)
    return Block(item, tuple(_opened(part, levels) for part in item.items))


@dataclass
class _Planner:
    budget: int
    adapted_only: bool  # whether blocks without adapted layers stay closed
    opened: dict[int, Scope] = field(default_factory=dict)  # by id; keeps the scopes alive
    letters: dict[Hashable, str] = field(default_factory=dict)
    used: dict[str, list[str]] = field(default_factory=dict)

    def panels(self, root: Scope) -> list[Panel]:
        """Open scopes panel by panel until the budget is used, then build the blocks."""
        left = self.budget - self._open(root, min(self.budget, _OVERVIEW))
        drawn = [("", root)]
        for _, scope in drawn:  # grows while it is read
            for closed in self._closed(scope):
                looks = _looks(closed)
                if looks not in self.letters:
                    if len(closed.items) < 2 or len(closed.items) > left or len(drawn) > len(ascii_uppercase):
                        continue
                    self.letters[looks] = ascii_uppercase[len(drawn) - 1]
                    left -= self._open(closed, min(left, _PANEL))
                    drawn.append((self.letters[looks], closed))
                self.used.setdefault(self.letters[looks], []).append(_full_name(closed))
        names = {letter: tuple(dict.fromkeys(used)) for letter, used in self.used.items()}
        return [Panel(letter, self._block(scope), names.get(letter, ())) for letter, scope in drawn]

    def _open(self, root: Scope, limit: int) -> int:
        """Open what fits, outer scopes first; identical blocks all or none. Returns the number of boxes."""
        self.opened[id(root)] = root
        boxes = len(root.items)
        while True:
            groups: dict[Hashable, list[Scope]] = {}
            for scope in sorted(self._closed(root), key=lambda scope: scope.path.count(".")):
                groups.setdefault(_looks(scope), []).append(scope)
            for group in groups.values():
                more = sum(len(scope.items) - 1 for scope in group)
                once = len(group) == 1 and (group[0].count == 1 or root.path)
                if boxes + more <= limit and (once or len(group[0].items) <= _SMALL):
                    self.opened.update((id(scope), scope) for scope in group)
                    boxes += more
                    break
            else:
                return boxes

    def _closed(self, scope: Scope) -> Iterator[Scope]:
        """The closed scopes in a panel that are worth opening."""
        for item in scope.items:
            if isinstance(item, Scope) and id(item) in self.opened:
                yield from self._closed(item)
            elif isinstance(item, Scope) and self._matters(item):
                yield item

    def _matters(self, scope: Scope) -> bool:
        return bool(scope.marks) or not self.adapted_only

    def _block(self, item: Item, *, root: bool = True) -> Block:
        if isinstance(item, Leaf):
            return Block(item)
        if id(item) in self.opened and (root or _looks(item) not in self.letters):
            return Block(item, tuple(self._block(part, root=False) for part in item.items))
        return Block(item, letter=self.letters.get(_looks(item), "") if self._matters(item) else "")


def _full_name(scope: Scope) -> str:
    name = scope.path if scope.path.endswith(scope.name) else span(scope)
    return f"{name} × {scope.count}" if scope.count > 1 else name


def _looks(scope: Scope) -> Hashable:
    return signature(replace(scope, count=1), sizes=False)


def _fitted(scope: Scope, limit: int) -> Scope:
    """A scope with at most `limit` items at each level: merge blocks that differ in size only, then runs of operations,
    then any runs."""
    items = tuple(_fitted(item, _PANEL) if isinstance(item, Scope) else item for item in scope.items)
    scope = replace(scope, items=items)
    if len(scope.items) > (_ROOMY if scope.path else limit):
        scope = merge_repeats(scope, sizes=False)
    if len(scope.items) > limit:
        scope = contract(scope, runs_where(len(scope.items), lambda index: _plain(scope, index)), _operations)
    if len(scope.items) > limit:
        scope = contract(scope, _slices(scope, limit), _gathered)
    return scope


def _plain(scope: Scope, index: int) -> bool:
    pair = scope.items[index - 1 : index + 1]
    return all(isinstance(item, Leaf) and item.kind in ("op", "module", "eager") for item in pair)


def _operations(scope: Scope, run: range) -> Item:
    """A run of leaves without adapted layers as one leaf."""
    leaves = [item for item in scope.items[run[0] : run[-1] + 1] if isinstance(item, Leaf)]
    kinds = dict.fromkeys(
        kind
        for leaf in leaves
        for kind in ([leaf.detail.partition(" ")[0]] if leaf.kind == "module" else _last(leaf.name).split(", "))
    )
    first, last = leaves[0].name.partition(",")[0], (leaves[-1].last or leaves[-1].name).rpartition(", ")[2]
    return replace(
        joined(leaves),
        name=f"{first} … {last}",
        detail=_listed(list(kinds)),
        target=", ".join(leaf.target for leaf in leaves),
        count=1,
        last="",
    )


def _listed(words: list[str]) -> str:
    """A list of words, as many as fit.

    >>> _listed(["view", "transpose", "scaled_dot_product_attention", "reshape"])
    'view, transpose, …'
    """
    shown = 1
    while shown < len(words) and len(", ".join(words[: shown + 1])) <= _KINDS:
        shown += 1
    return ", ".join(words[:shown]) + ", …" * (shown < len(words))


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _slices(scope: Scope, limit: int) -> list[range]:
    """Equal runs of the items between the inputs and the outputs."""
    kinds = [item.kind if isinstance(item, Leaf) else "scope" for item in scope.items]
    inner = [index for index, kind in enumerate(kinds) if kind not in ("input", "output")]
    first, last = inner[0], inner[-1]
    room = max(limit - (len(kinds) - (last + 1 - first)), 1)
    size = max(ceil((last + 1 - first) / room), 2)
    runs = [range(start, min(start + size, last + 1)) for start in range(first, last + 1, size)]
    return [run for run in runs if len(run) > 1]


def _gathered(scope: Scope, run: range) -> Item:
    first, last = scope.items[run[0]], scope.items[run[-1]]
    name = f"{first.name} … {last.last or last.name}"
    return _fitted(cut(scope, run, name, f"{len(run)} steps"), _PANEL)
