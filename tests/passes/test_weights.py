"""The passes over reads of adapted weights: marked, one node inserted for each, taken back, and every rule broken."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from hra_fx.errors import GraphInvariantError
from hra_fx.layers.target import META, LayerTarget, NodeTag
from passes.fold import FoldPass
from passes.insert import InsertPass
from passes.match import MatchPass
from passes.verify import VerifyPass


class Doubling(nn.Module):
    """In place of reflections: twice the input, or twice the weight."""

    def forward(self, x: Tensor | None = None, *, weight: Tensor | None = None) -> Tensor:
        given = x if weight is None else weight
        assert given is not None
        return 2 * given


class Rotated(nn.Linear):
    """What the passes need of an adapted layer: the base weight under its other name, and a container."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.hra_base = nn.Parameter(self.weight.detach().clone())
        self.hra_u = Doubling()

    def forward(self, input: Tensor, reflected: Tensor | None = None) -> Tensor:
        return F.linear(input if reflected is None else reflected, self.hra_base, self.bias)


class Net(nn.Module):
    """A weight read twice and one read once, an attention that reads two by itself, and a call of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.once, self.called = Rotated(4, 4), Rotated(4, 4), Rotated(4, 4)
        self.attn = nn.MultiheadAttention(4, 2)
        self.other = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.twice.weight) + x @ self.twice.weight
        x = self.called(self.once(F.linear(x, self.once.weight, self.once.bias)))
        return self.attn(x, x, x)[0] + F.linear(x, self.other.weight)


SITES = {
    "twice": LayerTarget("twice", "linear", is_called=False),
    "once": LayerTarget("once", "linear", is_called=False),
    "called": LayerTarget("called", "linear"),
    "attn": LayerTarget("attn", "attention", is_called=False),
    "attn.out_proj": LayerTarget("attn.out_proj", "linear", is_called=False),
}


def traced() -> fx.GraphModule:
    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
            return True

    net = Net()
    module = fx.GraphModule(net, Tracer().trace(net))
    for name in ("twice", "once"):  # as `hra_fx.tracing.graph_module` does
        module.set_submodule(name, net.get_submodule(name))
    return module


def rewritten() -> fx.GraphModule:
    module = traced()
    for step in (MatchPass(SITES), InsertPass()):
        step(module)
    return module


def nodes_of(module: fx.GraphModule, target: str) -> list[fx.Node]:
    return [node for node in module.graph.nodes if node.target == target]


def notes(module: fx.GraphModule) -> list[tuple[str, NodeTag]]:
    return [(str(node.target), node.meta[META]) for node in module.graph.nodes if META in node.meta]


def test_match_marks_reads_readers_and_calls() -> None:
    module, match = traced(), MatchPass(SITES)
    before = str(module.graph)
    assert match(module).modified
    assert str(module.graph) == before
    reads = len(nodes_of(module, "twice.weight"))
    assert match.calls == {"twice": reads, "once": 2, "called": 1, "attn": 1, "attn.out_proj": 1}
    assert notes(module) == [
        *[("twice.weight", NodeTag("twice", "linear", "weight"))] * reads,
        ("once.weight", NodeTag("once", "linear", "weight")),
        ("once", NodeTag("once", "linear", "reader")),
        ("called", NodeTag("called", "linear", "layer")),
        ("attn", NodeTag("attn", "attention", "reader", ("attn.out_proj",))),
    ]
    for target in ("once.bias", "other.weight"):
        assert all(META not in node.meta for node in nodes_of(module, target))


def test_a_read_of_metadata_alone_is_not_marked() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.once = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x.to(self.once.weight.dtype).view(-1, self.once.weight.size(1)) / self.once.weight.shape[0]

    module, match = fx.symbolic_trace(Asks()), MatchPass(SITES)
    assert nodes_of(module, "once.weight")
    assert not match(module).modified and match.calls == {}


def test_a_reader_names_only_sites_inside_it() -> None:
    module = traced()
    match = MatchPass({"attn.out_proj": SITES["attn.out_proj"], "attention": LayerTarget("attention", "linear")})
    match(module)
    assert match.calls == {"attn.out_proj": 1}
    assert notes(module) == [("attn", NodeTag("attn.out_proj", "linear", "reader"))]


def test_a_layer_of_two_paths_is_one_site() -> None:
    """By whichever path a graph reads it, the mark bears the first; a reader of both says it once."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = self.b = nn.MultiheadAttention(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(x, x, x)[0]

    module = fx.symbolic_trace(Two())
    site = LayerTarget("a", "attention", is_called=False)
    match = MatchPass({"a": site, "b": site})
    match(module)
    assert match.calls == {"a": 1}
    assert [note for _, note in notes(module)] == [NodeTag("a", "attention", "reader")]


def test_match_stands_where_the_graph_is() -> None:
    module = traced()
    sites = {f"tower.{path}": LayerTarget(f"tower.{path}", site.kind, site.is_called) for path, site in SITES.items()}
    match = MatchPass(sites | {"once": SITES["once"]}, "tower")
    match(module)
    assert match.calls.keys() == sites.keys()


def test_insert_adds_one_node_a_read() -> None:
    module = traced()
    before = len(module.graph.nodes)
    reads = len(nodes_of(module, "twice.weight")) + 1
    MatchPass(SITES)(module)
    assert InsertPass()(module).modified
    assert len(module.graph.nodes) == before + reads + 1  # and one for the call
    for name in ("twice", "once"):
        assert nodes_of(module, f"{name}.weight") == []
        for base in nodes_of(module, f"{name}.hra_base"):
            (reflection,) = base.users
            assert (
                reflection.target == f"{name}.hra_u" and reflection.kwargs == {"weight": base} and not reflection.args
            )
            assert reflection.meta[META] == NodeTag(name, "linear", "reflection")
            assert reflection.users and base.meta[META].role == "weight"
    assert nodes_of(module, "attn.hra_u") == nodes_of(module, "attn.out_proj.hra_u") == []
    module.graph.lint()
    assert not VerifyPass()(module).modified


def test_a_second_run_changes_nothing() -> None:
    module = rewritten()
    before = str(module.graph), module.code, notes(module)
    assert not InsertPass()(module).modified
    assert not VerifyPass()(module).modified
    twin = copy.deepcopy(module)
    assert not InsertPass()(twin).modified
    assert (str(module.graph), module.code, notes(module)) == before
    assert twin.code == module.code


def test_match_after_insert_knows_the_reads_again() -> None:
    module, match = rewritten(), MatchPass(SITES)
    before = notes(module)
    match(module)
    assert notes(module) == before
    assert not InsertPass()(module).modified


def test_fold_takes_back_node_for_node() -> None:
    plain, module = traced(), rewritten()
    assert FoldPass()(module).modified
    assert notes(module) == []
    assert [node.format_node() for node in module.graph.nodes] == [node.format_node() for node in plain.graph.nodes]
    assert module.code == plain.code
    assert not FoldPass()(module).modified


def test_what_is_inserted_computes_with_what_the_reflection_gives() -> None:
    torch.manual_seed(0)
    plain, module = traced(), rewritten()
    with torch.no_grad():
        for name in ("twice", "once", "called"):
            plain.get_submodule(name).weight.copy_(2 * module.get_submodule(name).hra_base)
        # A reader is called as it is, and reads the weight itself.
        plain.once.hra_base, plain.called.hra_base = module.once.hra_base, plain.called.weight
    x = torch.randn(3, 4)
    module.load_state_dict(
        {
            name: value
            for name, value in plain.state_dict().items()
            if "attn" in name or "bias" in name or "other" in name
        },
        strict=False,
    )
    torch.testing.assert_close(module(x), plain(x))


# ---- verify ----


def read_the_bare_weight(module: fx.GraphModule) -> None:
    nodes_of(module, "once.hra_base")[0].target = "once.weight"


def read_the_weight_beside_its_reflection(module: fx.GraphModule) -> None:
    base, linear = nodes_of(module, "once.hra_base")[0], nodes_of(module, "once")[0].args[0]
    linear.args = (linear.args[0], base, linear.args[2])


def reflect_it_twice(module: fx.GraphModule) -> None:
    base = nodes_of(module, "once.hra_base")[0]
    (reflection,) = base.users
    with module.graph.inserting_after(reflection):
        again = module.graph.call_module("once.hra_u", kwargs={"weight": base})
    again.meta[META] = reflection.meta[META]
    output = module.graph.find_nodes(op="output")[0]
    output.args = ((output.args[0], again),)


def reflect_it_by_another_layer(module: fx.GraphModule) -> None:
    nodes_of(module, "once.hra_u")[0].target = "twice.hra_u"


def leave_it_unread(module: fx.GraphModule) -> None:
    (reflection,) = nodes_of(module, "once.hra_u")
    linear = next(iter(reflection.users))
    linear.args = (linear.args[0], nodes_of(module, "once.bias")[0], linear.args[2])


def forget_the_mark(module: fx.GraphModule) -> None:
    del nodes_of(module, "once.hra_u")[0].meta[META]


def forget_the_mark_of_the_weight(module: fx.GraphModule) -> None:
    del nodes_of(module, "once.hra_base")[0].meta[META]


def drop_the_reflection(module: fx.GraphModule) -> None:
    (reflection,) = nodes_of(module, "once.hra_u")
    reflection.replace_all_uses_with(reflection.kwargs["weight"])
    module.graph.erase_node(reflection)


RULES: list[tuple[Callable[[fx.GraphModule], None], str]] = [
    (read_the_bare_weight, "node 'once_weight': reads once.weight, expected hra_base and its reflection"),
    (
        read_the_weight_beside_its_reflection,
        "node 'once_weight': is the weight of an adapted layer but is read by 'linear_1'",
    ),
    (
        reflect_it_twice,
        "node 'once_weight': is the weight of an adapted layer but has 2 reflections, expected one reflection",
    ),
    (reflect_it_by_another_layer, "node 'once_weight': is the weight of an adapted layer but is read by 'once_hra_u'"),
    (drop_the_reflection, "node 'once_weight': is the weight of an adapted layer but is read by 'linear_1'"),
    (leave_it_unread, "node 'once_hra_u': is an unused reflection"),
    (forget_the_mark, "node 'once_hra_u': calls a reflection but is not marked"),
    (forget_the_mark_of_the_weight, "node 'once_weight': reads a base weight but is not marked"),
]


@pytest.mark.parametrize(("breaks", "message"), RULES, ids=[breaks.__name__ for breaks, _ in RULES])
def test_a_broken_rule_names_the_node(breaks: Callable[[fx.GraphModule], None], message: str) -> None:
    module = rewritten()
    VerifyPass()(module)
    breaks(module)
    with pytest.raises(GraphInvariantError) as caught:
        VerifyPass()(module)
    assert str(caught.value).startswith(message)
    assert str(caught.value).endswith("This is a bug in hra_fx; please open an issue.")
