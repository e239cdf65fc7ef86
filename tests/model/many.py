"""Small models with several adapters, a dense oracle for them, and a snapshot of everything that such a model has."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import tiny
import torch
from adapting import randomise
from layers.checking import dense_weights
from oracles import relative_error
from torch import Tensor, nn

import hra_fx
from hra_fx.layers.trained_copies import all_copies

F64 = torch.float64
#: Copies of modules and biases next to reflections.
SAVED: dict[str, Any] = {"modules_to_save": ["head", "norm"], "bias": "all"}
#: Weights that are large enough for every layer to affect the output.
_TEXT: dict[str, Any] = tiny.SMALL | {"vocab_size": 32, "initializer_range": 0.4}


class Net(nn.Module):
    """Two layers to adapt, a norm, and a head for `modules_to_save`: `(n, 6) -> (n, 3)`."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.second = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.norm(self.first(x))))))


def net(dtype: torch.dtype = F64) -> Net:
    """A `Net` in eval mode, always with the same values."""
    torch.manual_seed(0)
    return Net().to(dtype).eval()


def llama(**options: Any) -> nn.Module:
    settings = {**_TEXT, "num_key_value_heads": 1, "tie_word_embeddings": False, **options}
    return tiny.llama(**settings).to(F64).eval()


def bert() -> nn.Module:
    return tiny.bert(**_TEXT, num_labels=3).to(F64).eval()


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def ids() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(0, 32, (2, 5), generator=torch.Generator().manual_seed(1))}


def config(*targets: str, **fields: Any) -> hra_fx.HRAConfig:
    """A configuration, by default of rank 2."""
    return hra_fx.HRAConfig(**{"r": 2, "target_modules": list(targets), **fields})


def turn(model: nn.Module, seed: int = 2) -> None:
    """Give every adapter random vectors, far from the start, and other values in its copies."""
    randomise(model, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for owner, copies in all_copies(model).values():
            for adapter in copies.copied:
                for tensor in copies.tensors(owner, adapter).values():
                    if tensor.is_floating_point():
                        tensor.copy_(tensor + torch.rand(tensor.shape, dtype=F64, generator=generator))


def adapted(base: nn.Module, **configs: hra_fx.HRAConfig) -> tuple[nn.Module, nn.Module]:
    """A plain copy of `base`, and `base` itself with these adapters at random values; the first is active."""
    plain = copy.deepcopy(base).requires_grad_(False)
    (name, first), *others = configs.items()
    hra_fx.transform(base, first, name)
    for other, settings in others:
        hra_fx.add_adapter(base, other, settings)
    turn(base)
    return plain, base


def three(dtype: torch.dtype = F64) -> tuple[nn.Module, nn.Module]:
    """A plain `Net`, and one with three active adapters: two on each of two layers."""
    plain, model = adapted(
        net(), a=config("first"), b=config("first", "second", r=3), c=config("second", apply_GS=True)
    )
    hra_fx.set_adapter(model, ["a", "b", "c"])
    return plain.to(dtype), model.to(dtype)


def weights(plain: nn.Module, model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Name -> `W Q_a Q_b ...` for every layer that one of these adapters rotates, from the weights of `plain`."""
    return {name: weight.detach() for name, weight in dense_weights(plain, model, list(names)).items()}


def oracle(plain: nn.Module, model: nn.Module, names: Iterable[str], inputs: Any, **others: Tensor) -> Tensor:
    """Output of the base model with the rotated weights, and with `others`."""
    replaced = weights(plain, model, names) | others
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})
    output = torch.func.functional_call(plain, replaced, args, kwargs)
    return getattr(output, "logits", output)


def run(model: nn.Module, inputs: Any) -> Tensor:
    output = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return getattr(output, "logits", output)


def assert_close(actual: Tensor, wanted: Tensor, bound: float = 1e-10) -> None:
    assert relative_error(actual, wanted) < bound


def flags(model: nn.Module) -> dict[str, bool]:
    """Name -> whether the parameter is trained."""
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def seen(model: nn.Module) -> dict[str, Any]:
    """A snapshot of a model: containers and tensors by identity, plain attributes by value."""
    picture: dict[str, Any] = {"config": str(getattr(model, "config", None))}
    for path, part in model.named_modules():
        picture[f"{path}:class"] = (type(part), id(part), part.training)
        for key, value in vars(part).items():
            if key in ("_parameters", "_buffers", "_modules"):
                picture[f"{path}:{key}"] = [(name, id(child)) for name, child in value.items()]
            else:
                picture[f"{path}:{key}"] = repr(value)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        values = None if tensor.is_meta else tensor.detach().clone().nan_to_num(7.0).flatten().tolist()
        picture[f"tensor {name}"] = (id(tensor), tensor._version, tensor.requires_grad, values)
    return picture


@contextlib.contextmanager
def refuses(model: nn.Module, text: str, kind: type[Exception] = hra_fx.AdapterError) -> Iterator[Any]:
    """The block raises this error, whose message matches `text`, and leaves the model unchanged."""
    before = seen(model)
    with pytest.raises(kind, match=text) as caught:
        yield caught
    assert seen(model) == before
