"""A small model with everything that a configuration can name, adapted by PEFT and by hra_fx, and their comparison."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import peft
import torch
from adapting import randomise as randomise_vectors
from oracles import dense_vectors, gradient_of_vectors, pairs_of, relative_error
from peft.tuners.hra.layer import HRALayer
from torch import Tensor, nn
from torch.nn.utils import parametrize

import hra_fx

F32, F64 = torch.float32, torch.float64
TOLERANCE = {F32: 1e-5, F64: 1e-9}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(8, 8)
        self.value = nn.Linear(8, 8, bias=False)
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(torch.tanh(self.query(x)) * self.value(x))


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Net(nn.Module):
    """An embedding, blocks, a convolution, a nested head with BatchNorm, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.body = Body()
        self.conv = nn.Conv2d(2, 3, 3, padding=1)
        self.norm = nn.LayerNorm(9)
        self.head = nn.Sequential(nn.Linear(9, 7), nn.BatchNorm1d(7), nn.Sequential(nn.Tanh(), nn.Linear(7, 5)))
        self.classifier = nn.Linear(5, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.body(self.embed(tokens))  # (batch, 6, 8)
        x = self.conv(x.view(len(x), 2, 6, 4)).mean(3).flatten(1)  # (batch, 3 * 6)
        return self.classifier(self.head(self.norm(x[:, ::2])))


def net(dtype: torch.dtype = F32) -> Net:
    """The same random model each time, in eval mode, with statistics that are not those of the start."""
    torch.manual_seed(0)
    model = Net()
    model.head[1].running_mean.normal_()
    model.head[1].running_var.uniform_(0.5, 2.0)
    return model.to(dtype).eval()


def tokens(seed: int = 1, batch: int = 5) -> Tensor:
    return torch.randint(11, (batch, 6), generator=torch.Generator().manual_seed(seed))


@contextmanager
def peft_warnings_ignored() -> Iterator[None]:
    """PEFT warns of the odd ranks that are tried, and of heads that are no embeddings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def by_peft(base: nn.Module, adapter_name: str = "default", **fields: Any) -> Any:
    """A copy of `base` with PEFT's HRA."""
    with peft_warnings_ignored():
        return peft.get_peft_model(
            copy.deepcopy(base), peft.HRAConfig(**copy.deepcopy(fields)), adapter_name=adapter_name
        )


class _Pairs(nn.Module):
    """Vectors from sums and differences, as a parametrization of torch."""

    def forward(self, pairs: Tensor) -> Tensor:
        return dense_vectors(pairs).to(pairs.dtype)

    def right_inverse(self, vectors: Tensor) -> Tensor:
        return pairs_of(vectors).to(vectors.dtype)


def in_pairs(model: Any, adapter_name: str = "default") -> Any:
    """PEFT's model, whose own layers train sums and differences, by torch's parametrization."""
    for module in model.modules():
        if isinstance(module, HRALayer) and adapter_name in module.hra_u:
            parametrize.register_parametrization(module.hra_u, adapter_name, _Pairs())
    return model


def by_us(base: nn.Module, adapter_name: str = "default", **fields: Any) -> Any:
    """A copy of `base` with our HRA."""
    return hra_fx.get_peft_model(copy.deepcopy(base), hra_fx.HRAConfig(**fields), adapter_name)


def pair(first: dict[str, Any], second: dict[str, Any] | None = None) -> tuple[Any, Any]:
    """The model of PEFT and ours, with one adapter or with two, "default" and "other"."""
    theirs, ours = by_peft(net(), **first), by_us(net(), **first)
    if second:
        with peft_warnings_ignored():
            theirs.add_adapter("other", peft.HRAConfig(**copy.deepcopy(second)))
        ours.add_adapter("other", hra_fx.HRAConfig(**second))
    return theirs, ours


#: What PEFT adapts in `net`, in models that hra_fx takes over or reads.
CASES: dict[str, dict[str, Any]] = {
    "linear and convolution": {"r": 4, "target_modules": ["query", "value", "conv"]},
    "odd rank, regex": {"r": 3, "target_modules": r".*\.(query|out)"},
    "Gram-Schmidt, convolution": {"r": 2, "target_modules": ["conv", "out"], "apply_GS": True},
    "all-linear, some layers": {"r": 2, "target_modules": "all-linear", "exclude_modules": ["head.0"]},
    "trained modules": {"r": 2, "target_modules": ["query"], "modules_to_save": ["head", "classifier"]},
    "all biases": {"r": 2, "target_modules": ["query", "out"], "bias": "all"},
}


def randomised_by_peft(case: str = "linear and convolution") -> Any:
    """PEFT's model in float64 at random values."""
    model = by_peft(net(F64), **CASES[case])
    randomise(model)
    return model


def with_two_by_peft() -> Any:
    """The same with a second adapter, which is active, while the first one is frozen."""
    model = randomised_by_peft()
    with peft_warnings_ignored():
        model.add_adapter("other", peft.HRAConfig(r=3, target_modules=["query", "out"], init_weights=False))
    randomise_vectors(model, "other")
    model.set_adapter("other")
    return model


def opened_by_peft(base: nn.Module, folder: Path, adapter_name: str = "default", **options: Any) -> Any:
    with peft_warnings_ignored():
        return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder, adapter_name, **options)


def saved_by_peft(model: Any, folder: Path, **options: Any) -> Path:
    with peft_warnings_ignored():
        model.save_pretrained(folder, **options)
    return folder


def plain_name(name: str, adapter: str = "default") -> str:
    """The name of the base model's for a parameter or buffer of PEFT's model."""
    for wrapper in ("base_model.model.", ".base_layer"):
        name = name.replace(wrapper, "", 1)
    return name.replace(f".modules_to_save.{adapter}", "", 1)


def trained(model: nn.Module, adapter: str = "default") -> dict[str, nn.Parameter]:
    """Name in the base model -> parameter, for all that have a gradient."""
    return {plain_name(name, adapter): p for name, p in model.named_parameters() if p.requires_grad}


def _holds_pairs(name: str, parameter: Tensor) -> bool:
    return ".hra_u" in name and parameter.dim() == 3


def randomise(model: nn.Module, seed: int = 2) -> None:
    """Random values for all that is trained, in the order of names that both sides share, and for saved statistics.

    Pairs get the same vectors as the other side.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(trained(model).items()):
            pairs = _holds_pairs(name, parameter)
            shape = parameter.flatten(1).shape if pairs else parameter.shape
            drawn = torch.randn(shape, dtype=F64, generator=generator)
            if pairs:
                parameter.copy_(pairs_of(drawn))
                continue
            parameter.copy_(drawn if parameter.dim() > 1 else parameter + drawn / 2)


def gradients(model: nn.Module, x: Tensor | dict[str, Tensor]) -> dict[str, Tensor]:
    """The output, and the gradient of everything that is trained, of vectors for pairs, by its name in the base."""
    model.zero_grad()
    output = model(x) if isinstance(x, Tensor) else model(**x)[0]
    upstream = torch.randn(output.shape, dtype=F64, generator=torch.Generator().manual_seed(99)).to(output.dtype)
    output.backward(upstream)
    found = {
        name: gradient_of_vectors(p.grad) if _holds_pairs(name, p) and p.grad is not None else p.grad
        for name, p in trained(model).items()
    }
    return {"": output.detach()} | {name: grad.clone() for name, grad in found.items() if grad is not None}


def agree(theirs: nn.Module, ours: nn.Module, x: Tensor | dict[str, Tensor], dtype: torch.dtype) -> None:
    """The same output, the same trained parameters by name, and the same gradient of each."""
    wanted, got = gradients(theirs, x), gradients(ours, x)
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        # The Frobenius norm of all gradients bounds what rounding may leave in one that cancels.
        floor = 1e-3 * max(float(other.norm()) for other in wanted.values())
        assert relative_error(got[name], value, floor=floor) < TOLERANCE[dtype], name


def same_line(theirs: Any, ours: Any) -> None:
    """The same line from `print_trainable_parameters`, and the same counts."""
    lines = []
    for model in (theirs, ours):
        with redirect_stdout(io.StringIO()) as out:
            model.print_trainable_parameters()
        lines.append(out.getvalue())
    assert lines[1] == lines[0]
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()


def same_tensors(left: Path, right: Path, bound: float = 0.0) -> None:
    """Two adapter files with the same keys and, up to a relative error, the same values.

    Vectors become pairs when they are loaded, and vectors again when they are saved, with the rounding of both.
    """
    from safetensors.torch import load_file

    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (left, right))
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert value.dtype == b[key].dtype, key
        assert relative_error(value, b[key]) <= bound, key
