"""`lift`: a program of `torch.export` becomes a GraphModule that can be adapted, trained, saved and folded."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adapting import QUIET, randomise
from graph_modules import COPIES, X, config
from layers.checking import assert_same, gradients, normal, vectors_of
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from tracing.models import TRACED, Creates, Shared, Two

import hra_fx
from hra_fx.errors import AdapterError, HRAWarning

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def loaded(program: ExportedProgram) -> ExportedProgram:
    """A program without the code of its model."""
    file = io.BytesIO()
    torch.export.save(program, file)
    return torch.export.load(io.BytesIO(file.getvalue()))


def exported(model: nn.Module, *args: Tensor, **options: Any) -> ExportedProgram:
    shapes = tuple({0: Dim.AUTO} for _ in args)
    return loaded(torch.export.export(model, args, dynamic_shapes=shapes, **options))


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, LAYERS)}


def adapted(base: nn.Module, program: ExportedProgram, settings: hra_fx.HRAConfig) -> tuple[Any, Any]:
    """The eager adapted model, and the lifted program with the same vectors."""
    eager = hra_fx.transform(copy.deepcopy(base), settings)
    randomise(eager)
    lifted = hra_fx.transform(hra_fx.lift(program), settings)
    assert not any(lifted.load_state_dict(eager.state_dict(), strict=False))
    return eager, lifted


def check_same(eager: nn.Module, lifted: nn.Module, *args: Tensor, **kwargs: Tensor) -> None:
    """Outputs, gradients of the vectors, and files are the same."""
    found, wanted = lifted(*args, **kwargs), eager(*args, **kwargs)
    assert type(found) is type(wanted)
    assert_same(found, wanted)
    leaves = vectors_of(eager)
    assert vectors_of(lifted).keys() == leaves.keys()
    mine = gradients(found, [vectors_of(lifted)[path] for path in leaves])
    for one, other in zip(mine, gradients(wanted, list(leaves.values())), strict=True):
        assert_same(one, other, rtol=1e-8)


def check_files(eager: nn.Module, lifted: nn.Module, folder: Path) -> None:
    for name, model in (("eager", eager), ("lifted", lifted)):
        hra_fx.save_adapter(model, folder / name)
    for file in (folder / "eager").iterdir():
        assert file.read_bytes() == (folder / "lifted" / file.name).read_bytes()


class Tied(Two):
    """Two layers that share a weight, each with its own bias, and one that shares its weight with embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8)
        self.right.weight = self.left.weight
        self.table = nn.Embedding(5, 8)
        self.second.weight = self.table.weight

    def middle(self, hidden: Tensor) -> Tensor:
        return torch.tanh(self.right(torch.relu(self.left(hidden)))) + self.table(hidden.argmax(1) % 5)


#: TorchDynamo, which `strict` uses, has other names for tied tensors.
MODELS = [(make, False) for make in (*TRACED, Tied, Creates)] + [(Tied, True), (Shared, True)]


@pytest.mark.parametrize(("make", "strict"), MODELS)
def test_a_lifted_program_is_the_eager_model(make: type[nn.Module], strict: bool, tmp_path: Path) -> None:
    base = make().double().eval()
    program = exported(base, X, strict=strict)
    settings = config(*layers_of(base))
    eager, lifted = adapted(base, program, settings)
    assert {key for key in lifted.state_dict() if ".hra_u." not in key} == program.state_dict.keys()
    assert layers_of(lifted).keys() == layers_of(eager).keys()
    for x in (X, normal(3, 7, 6)):
        for model in (lifted, *(copied(lifted) for copied in COPIES)):
            check_same(eager, model.train(), x)  # the mode is that of the program
    check_files(eager, lifted, tmp_path)
    assert_same(hra_fx.load_adapter(hra_fx.lift(program), tmp_path / "eager")(X), eager(X))


class Images(nn.Module):
    """Convolutions of each dimension with other settings, one of them called with two; a batch norm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(6, 4, 3, padding="same", dilation=2)
        self.two = nn.Conv2d(1, 4, 3, stride=(1, 2), padding=(1, 0), bias=False)
        self.three = nn.Conv3d(2, 4, 2, groups=2, padding_mode="replicate", padding=1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        flat = self.one(x[:, :, None].expand(-1, -1, 5))
        image = self.norm(self.two(flat[:, None]))
        image = torch.relu(image) + F.conv2d(image[:, :1], self.two.weight, padding="same").mean((1, 2, 3), True)
        solid = self.three(image.reshape(x.shape[0], 2, 1, 2, -1))
        return {"out": F.dropout(solid, 0.5, self.training).flatten(1), "more": flat}


@pytest.mark.parametrize("training", [False, True])
def test_convolutions_are_layers_with_their_settings(training: bool, tmp_path: Path) -> None:
    base = Images().double().train(training)
    program = exported(base, X)
    eager, lifted = adapted(base, program, config("one", "two", "three"))
    calls = [str(node.target) for node in lifted.graph.find_nodes(op="call_module")]
    assert [path for path in calls if path in layers_of(base)] == ["one", "two", "three"]
    torch.manual_seed(5)
    found = lifted.train(not training)(X)
    torch.manual_seed(5)
    assert_same(found, eager.train(training)(X))
    assert_same(lifted.get_buffer("norm.running_var"), eager.get_buffer("norm.running_var"))
    check_files(eager, lifted, tmp_path)


def test_gpt_2_has_the_layers_and_files_of_the_model(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_embd": 8, "n_layer": 2, "n_head": 2, "vocab_size": 11, "n_positions": 8}
    model = GPT2LMHeadModel(GPT2Config(**sizes, use_cache=False)).double().eval()
    ids = torch.arange(8).view(2, 4)
    eager, lifted = adapted(model, exported(model, ids), hra_fx.HRAConfig(r=2, target_modules=["c_attn", "c_fc"]))
    assert vectors_of(lifted)["transformer.h.1.mlp.c_fc"].shape == (8, 2)
    assert_same(lifted(ids).logits, eager(ids).logits)
    check_files(eager, lifted, tmp_path)
    assert_same(hra_fx.fold(lifted)(ids).logits, eager(ids).logits)


def llama(*, tied: bool) -> tuple[nn.Module, ExportedProgram, dict[str, Tensor]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings = LlamaConfig(vocab_size=16, use_cache=False, tie_word_embeddings=tied, **sizes)
    model = LlamaForCausalLM(settings).double().eval()
    batch = {name: torch.randint(0, 16, (2, 4)) for name in ("input_ids", "labels")}
    shapes = {name: dict.fromkeys(range(2), Dim.AUTO) for name in batch}
    return model, loaded(torch.export.export(model, (), batch, dynamic_shapes=shapes)), batch


def test_a_language_model_is_trained_and_folded_without_its_code(tmp_path: Path) -> None:
    base, program, batch = llama(tied=True)
    flags = {name: tensor.requires_grad for name, tensor in program.state_dict.items()}
    other = {name: torch.randint(0, 16, (3, 7)) for name in batch}
    eager, lifted = adapted(base, program, hra_fx.HRAConfig(r=2, target_modules=["q_proj", "down_proj", "lm_head"]))
    check_same(eager, lifted, **other)
    check_files(eager, lifted, tmp_path)
    with pytest.raises(AssertionError, match=r"captured for inputs with `input_ids\.size.*labels\.size"):
        lifted(batch["input_ids"], other["labels"])
    optimizer = torch.optim.AdamW([p for p in lifted.parameters() if p.requires_grad], lr=0.1)
    lifted(**other).loss.backward()
    optimizer.step()
    wanted = lifted(**other).logits.detach()
    with pytest.warns(HRAWarning, match="untied: lm_head"):
        hra_fx.fold(lifted)
    assert_same(lifted(**other).logits, wanted)
    # The fold has given the layer its own weight, which the first program does not have.
    shapes = {name: {0: Dim.AUTO, 1: Dim.AUTO} for name in batch}
    program = torch.export.export(lifted, (), batch, dynamic_shapes=shapes)
    assert_same(program.module()(**other).logits, wanted)
    assert {name: tensor.requires_grad for name, tensor in program.state_dict.items()} == flags


def test_a_lifted_program_has_the_default_targets_of_its_model_and_is_written_as_lora(tmp_path: Path) -> None:
    base, program, batch = llama(tied=False)
    eager, lifted = adapted(base, program, hra_fx.HRAConfig(r=2))
    assert vectors_of(lifted).keys() == vectors_of(eager).keys()
    assert_same(lifted(**batch).logits, eager(**batch).logits)
    for name, model in (("eager", eager), ("lifted", lifted)):
        hra_fx.save_as_lora(model, tmp_path / name)
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("eager", "lifted")]
    assert files[0].read_bytes() == files[1].read_bytes()


@QUIET
def test_a_decomposed_program_is_lifted_where_the_decomposition_is_that_of_a_layer() -> None:
    base = Images().double().eval()
    program = exported(base, X).run_decompositions()
    eager, lifted = adapted(base, program, config("one", "two", "three"))
    check_same(eager, lifted, X)
    program = exported(Two().double().eval(), X).run_decompositions()
    assert list(layers_of(hra_fx.lift(program))) == ["first", "second"]


class Ambiguous(Two):
    """Reads a tied weight in its own forward, by a name that the program does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 8)
        self.second.weight = self.table.weight

    def middle(self, hidden: Tensor) -> Tensor:
        return hidden + self.table.weight.sum(0)


class Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6, 5))
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.inner.weight @ self.weight


def test_operators_that_are_not_layers_stay() -> None:
    model = Ambiguous().double()
    assert list(layers_of(hra_fx.lift(exported(model, X)))) == ["first"]
    message = r"no operator that can be .*; inner\.weight is used by aten\.matmul.*Transform the model before you exp"
    with pytest.raises(AdapterError, match=message):
        hra_fx.lift(exported(Transposed().double(), X))
    with pytest.raises(AdapterError, match=r"with a parameter named '<layer>\.weight'\. If the program was dec"):
        hra_fx.lift(exported(nn.Tanh(), X))


@QUIET
def test_what_cannot_be_lifted_is_refused() -> None:
    program = torch.export.export(Two().double(), (X,))
    with pytest.raises(AdapterError, match=r"expected an ExportedProgram, got Two\. Call torch\.export\.export"):
        hra_fx.lift(Two())
    adapted = torch.export.export(hra_fx.transform(Two().double(), config()), (X,))
    with pytest.raises(AdapterError, match=r"already has the adapter first\.hra_u\.default\. Export the folded"):
        hra_fx.lift(adapted)
    for operators in (program, program.module()):
        with pytest.raises(AdapterError, match=r"of operators, .* hra_fx\.transform\(hra_fx\.lift\(program\), config"):
            hra_fx.transform(operators, config())
    for function in (hra_fx.fold, hra_fx.report):
        with pytest.raises(AdapterError, match=r"got ExportedProgram\. Convert the program with hra_fx\.lift"):
            function(program)
        with pytest.raises(AdapterError, match=r"of operators, not of layers with .*load_state_dict\(graph\.state_d"):
            function(adapted.module())


class Uses(nn.Module):
    """A buffer as a table, a weight as a table and as a layer, and a weight of one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.both, self.row = nn.Linear(6, 8), nn.Embedding(5, 8), nn.LayerNorm(8)
        self.register_buffer("weight", torch.randn(5, 8))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        ids = hidden.argmax(-1) % 5
        hidden = hidden + F.embedding(ids, self.weight) + self.both(ids) + F.linear(hidden, self.row.weight)[..., None]
        return F.linear(hidden, self.both.weight)


def test_weights_that_are_not_the_matrix_of_a_layer_stay() -> None:
    base = Uses().double().eval()
    program = exported(base, X)
    assert_same(hra_fx.lift(program)(X), base(X))
    eager, lifted = adapted(base, program, config("first"))
    check_same(eager, lifted, X)
