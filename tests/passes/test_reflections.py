"""The passes match, insert, fold and verify: what is marked and inserted, that fold undoes it, and each broken rule."""

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
    """Weights that are read twice and once, layers that are called twice and by keyword, and an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.once, self.called, self.named = (Rotated(4, 4) for _ in range(4))
        self.attn = nn.MultiheadAttention(4, 2)
        self.other = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.twice.weight) + x @ self.twice.weight
        x = self.called(self.once(F.linear(x, self.once.weight, self.once.bias)))
        x = self.named(input=torch.tanh(self.called(x)))
        return self.attn(x, x, x)[0] + self.other(F.linear(x, self.other.weight))


SITES = {
    "twice": LayerTarget("twice", "linear", reflects_input=False),
    "once": LayerTarget("once", "linear", reflects_input=False),
    "called": LayerTarget("called", "linear"),
    "named": LayerTarget("named", "linear"),
    "attn": LayerTarget("attn", "attention", reflects_input=False),
    "attn.out_proj": LayerTarget("attn.out_proj", "linear", reflects_input=False),
}


class Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def traced() -> fx.GraphModule:
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


# ---- match ----


def test_match_marks_reads_readers_and_calls_by_their_targets() -> None:
    module, match = traced(), MatchPass(SITES)
    for node in nodes_of(module, "named"):
        node.name = "something"  # names of nodes are made up by fx
    before = str(module.graph)
    result = match(module)
    assert result.modified and result.graph_module is module
    assert str(module.graph) == before
    reads = len(nodes_of(module, "twice.weight"))
    assert match.calls == {"twice": reads, "once": 2, "called": 2, "named": 1, "attn": 1, "attn.out_proj": 1}
    assert notes(module) == [
        *[("twice.weight", NodeTag("twice", "linear", "weight"))] * reads,
        ("once.weight", NodeTag("once", "linear", "weight")),
        ("once", NodeTag("once", "linear", "reader")),
        *[("called", NodeTag("called", "linear", "layer"))] * 2,
        ("named", NodeTag("named", "linear", "layer")),
        ("attn", NodeTag("attn", "attention", "reader", ("attn.out_proj",))),
    ]


def test_without_sites_no_pass_changes_anything() -> None:
    module, match = traced(), MatchPass({})
    assert not any(step(module).modified for step in (match, InsertPass(), FoldPass(), VerifyPass()))
    assert match.calls == {} and notes(module) == []


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


def test_a_reader_names_only_sites_inside_it_and_one_of_two_paths_once() -> None:
    module = traced()
    match = MatchPass({"attn.out_proj": SITES["attn.out_proj"], "attention": LayerTarget("attention", "linear")})
    match(module)
    assert match.calls == {"attn.out_proj": 1}
    assert notes(module) == [("attn", NodeTag("attn.out_proj", "linear", "reader"))]
    module = traced()
    site = LayerTarget("first", "attention", reflects_input=False)
    match = MatchPass({"attn": site, "attn.again": site})
    match(module)
    assert notes(module) == [("attn", NodeTag("first", "attention", "reader"))]


def test_match_knows_where_in_the_model_the_graph_is() -> None:
    module = traced()
    sites = {
        f"tower.{path}": LayerTarget(f"tower.{path}", site.kind, site.reflects_input) for path, site in SITES.items()
    }
    match = MatchPass(sites | {"once": SITES["once"]}, "tower")
    match(module)
    assert match.calls.keys() == sites.keys()


# ---- insert and fold ----


def test_insert_adds_one_node_for_each_read_and_each_call() -> None:
    module = traced()
    before = len(module.graph.nodes)
    reads = len(nodes_of(module, "twice.weight")) + 1
    MatchPass(SITES)(module)
    for call in nodes_of(module, "called"):
        call.meta |= {"stack_trace": "model.py, line 3", "tensor_meta": "of the output"}
    result = InsertPass()(module)
    assert result.modified and result.graph_module is module
    assert len(module.graph.nodes) == before + reads + 3
    for name in ("twice", "once"):
        assert nodes_of(module, f"{name}.weight") == []
        for base in nodes_of(module, f"{name}.hra_base"):
            (reflection,) = base.users
            assert (reflection.target, reflection.args, reflection.kwargs) == (f"{name}.hra_u", (), {"weight": base})
            assert reflection.meta[META] == NodeTag(name, "linear", "reflection")
            assert reflection.users and base.meta[META].role == "weight"
    for name in ("called", "named"):
        for call in nodes_of(module, name):
            value, reflection = call.args
            assert (reflection.target, reflection.args, call.kwargs) == (f"{name}.hra_u", (value,), {})
            assert reflection.meta[META] == NodeTag(name, "linear", "reflection")
            for key in ("nn_module_stack", "stack_trace"):
                assert reflection.meta.get(key) == call.meta.get(key)
            assert "tensor_meta" not in reflection.meta
    assert nodes_of(module, "attn.hra_u") == nodes_of(module, "attn.out_proj.hra_u") == []
    assert not VerifyPass()(module).modified


def test_a_second_run_changes_nothing() -> None:
    module = rewritten()
    before = str(module.graph), module.code, notes(module)
    for each in (module, copy.deepcopy(module)):
        MatchPass(SITES)(each)
        assert not InsertPass()(each).modified
        assert not VerifyPass()(each).modified
        assert (str(each.graph), each.code, notes(each)) == before


def test_insert_refuses_a_call_without_a_traced_input() -> None:
    module = traced()
    MatchPass(SITES)(module)
    (call,) = nodes_of(module, "named")
    call.args, call.kwargs = (3.0,), {}
    with pytest.raises(GraphInvariantError, match=r"node 'named'.*named has no traced input"):
        InsertPass()(module)


@pytest.mark.parametrize("steps", [(MatchPass(SITES),), (MatchPass(SITES), InsertPass())], ids=["match", "insert"])
def test_fold_undoes_the_other_passes_node_for_node(steps: tuple[Callable[[fx.GraphModule], object], ...]) -> None:
    plain, module = traced(), traced()
    for step in steps:
        step(module)
    assert FoldPass()(module).modified
    assert notes(module) == []
    (call,) = nodes_of(plain, "named")
    if len(steps) > 1:  # layer(input=x) becomes layer(x), the same call
        call.args, call.kwargs = (call.kwargs["input"],), {}
    assert [node.format_node() for node in module.graph.nodes] == [node.format_node() for node in plain.graph.nodes]
    assert not FoldPass()(module).modified


def test_what_is_inserted_computes_with_what_the_reflection_gives() -> None:
    torch.manual_seed(0)
    plain, module = traced(), rewritten()
    with torch.no_grad():
        for name in ("twice", "once", "called", "named"):
            plain.get_submodule(name).weight.copy_(2 * module.get_submodule(name).hra_base)
        # A reader is called as it is, and reads the weight itself.
        plain.once.hra_base = module.once.hra_base
        plain.called.hra_base, plain.named.hra_base = plain.called.weight, plain.named.weight
    shared = ("attn", "bias", "other")
    state = {name: value for name, value in plain.state_dict().items() if any(part in name for part in shared)}
    module.load_state_dict(state, strict=False)
    x = torch.randn(3, 4)
    torch.testing.assert_close(module(x), plain(x))


# ---- verify ----


def read_the_bare_weight(module: fx.GraphModule) -> None:
    nodes_of(module, "once.hra_base")[0].target = "once.weight"


def read_the_weight_beside_its_reflection(module: fx.GraphModule) -> None:
    base, linear = nodes_of(module, "once.hra_base")[0], nodes_of(module, "once")[0].args[0]
    linear.args = (linear.args[0], base, linear.args[2])


def reflect_a_weight_twice(module: fx.GraphModule) -> None:
    base = nodes_of(module, "once.hra_base")[0]
    (reflection,) = base.users
    with module.graph.inserting_after(reflection):
        again = module.graph.call_module("once.hra_u", kwargs={"weight": base})
    again.meta[META] = reflection.meta[META]
    output = module.graph.output_node()
    output.args = ((output.args[0], again),)


def reflect_it_by_another_layer(module: fx.GraphModule) -> None:
    nodes_of(module, "once.hra_u")[0].target = "twice.hra_u"


def leave_a_reflection_unread(module: fx.GraphModule) -> None:
    (reflection,) = nodes_of(module, "once.hra_u")
    linear = next(iter(reflection.users))
    linear.args = (linear.args[0], nodes_of(module, "once.bias")[0], linear.args[2])


def remove_the_mark(module: fx.GraphModule) -> None:
    del nodes_of(module, "once.hra_u")[0].meta[META]


def replace_the_mark(module: fx.GraphModule) -> None:
    nodes_of(module, "once.hra_u")[0].meta[META] = {"role": "reflection"}


def remove_the_mark_of_the_weight(module: fx.GraphModule) -> None:
    del nodes_of(module, "once.hra_base")[0].meta[META]


def remove_the_reflection_of_a_weight(module: fx.GraphModule) -> None:
    (reflection,) = nodes_of(module, "once.hra_u")
    reflection.replace_all_uses_with(reflection.kwargs["weight"])
    module.graph.erase_node(reflection)


def remove_the_reflection_of_a_call(module: fx.GraphModule) -> None:
    (call,) = nodes_of(module, "named")
    call.args = call.args[:1]
    module.graph.erase_node(nodes_of(module, "named.hra_u")[0])


def add_a_keyword(module: fx.GraphModule) -> None:
    nodes_of(module, "named")[0].kwargs = {"scale": 2.0}


def read_the_reflection_of_another_layer(module: fx.GraphModule) -> None:
    (call,) = nodes_of(module, "named")
    call.args = (call.args[0], nodes_of(module, "called.hra_u")[1])


def read_a_number_for_a_reflection(module: fx.GraphModule) -> None:
    (call,) = nodes_of(module, "named")
    call.args = (call.args[0], 3.0)
    module.graph.erase_node(nodes_of(module, "named.hra_u")[0])


def reflect_another_value(module: fx.GraphModule) -> None:
    nodes_of(module, "named.hra_u")[0].args = (nodes_of(module, "once")[0],)


def give_the_reflection_two_inputs(module: fx.GraphModule) -> None:
    (reflection,) = nodes_of(module, "named.hra_u")
    reflection.args = (*reflection.args, *reflection.args)


def read_the_reflection_elsewhere(module: fx.GraphModule) -> None:
    output = module.graph.output_node()
    output.args = ((output.args[0], nodes_of(module, "named.hra_u")[0]),)


RULES: list[tuple[Callable[[fx.GraphModule], None], str]] = [
    (read_the_bare_weight, "node 'once_weight': reads once.weight, expected hra_base and its reflection"),
    (read_the_weight_beside_its_reflection, "node 'once_weight': is the weight of an adapted layer but is read by"),
    (reflect_a_weight_twice, "node 'once_weight': is the weight of an adapted layer but has 2 reflections, expected"),
    (reflect_it_by_another_layer, "node 'once_weight': is the weight of an adapted layer but is read by 'once_hra_u'"),
    (remove_the_reflection_of_a_weight, "node 'once_weight': is the weight of an adapted layer but is read by"),
    (leave_a_reflection_unread, "node 'once_hra_u': is an unused reflection"),
    (remove_the_mark, "node 'once_hra_u': calls a reflection but is not marked"),
    (replace_the_mark, "node 'once_hra_u': calls a reflection but is not marked"),
    (remove_the_mark_of_the_weight, "node 'once_weight': reads a base weight but is not marked"),
    (remove_the_reflection_of_a_call, "node 'named': calls an adapted layer with 1 arguments, expected the input"),
    (add_a_keyword, "node 'named': calls an adapted layer with 2 arguments, expected the input and its reflection"),
    (read_the_reflection_of_another_layer, "node 'called_hra_u_1': is a reflection of called but is read by 'named'"),
    (read_a_number_for_a_reflection, "node 'named': calls named with 3.0, which is not a reflection of that layer"),
    (reflect_another_value, "node 'named': reads tanh, but its reflection reads once"),
    (give_the_reflection_two_inputs, "node 'named': reads tanh, but its reflection reads tanh"),
    (read_the_reflection_elsewhere, "node 'named_hra_u': is a reflection of named but is read by 'output'"),
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


def test_a_graph_that_is_not_well_formed_is_refused() -> None:
    module = rewritten()
    nodes_of(module, "named")[0].append(nodes_of(module, "named.hra_u")[0])  # read before it is made
    with pytest.raises(Exception, match="named_hra_u"):
        VerifyPass()(module)
