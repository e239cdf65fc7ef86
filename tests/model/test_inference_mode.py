"""What is made in inference mode, also from a file, can be trained outside of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model.many import adapted, assert_close, config, net, normal, oracle, run
from oracles import dense_q
from torch import Tensor, nn

import hra_fx


def gradient(plain: nn.Module, vectors: Tensor, x: Tensor) -> Tensor:
    """Of the sum of the outputs of `Net`, by the dense product, by the vectors of its second layer."""
    leaf = vectors.detach().clone().requires_grad_()
    new = {"second.weight": plain.second.weight.detach() @ dense_q(leaf)}
    torch.func.functional_call(plain, new, (x,)).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def check_trainable(plain: nn.Module, model: nn.Module, name: str) -> None:
    x = normal(3, 6)
    vectors = model.second.hra_u[name]
    assert not vectors.is_inference()
    assert vectors.requires_grad
    run(model, x).sum().backward()
    assert_close(vectors.grad, gradient(plain, vectors, x))
    torch.optim.SGD([vectors], lr=0.1).step()
    assert_close(run(model, x), oracle(plain, model, [name], x))


@pytest.mark.parametrize("into", ["plain", "beside", "in place"])
def test_what_is_loaded_in_inference_mode_is_trained_on(into: str, tmp_path: Path) -> None:
    plain, other = adapted(net(), a=config("second", r=4))
    hra_fx.save_adapter(other, tmp_path)
    model = net()
    if into != "plain":
        name, target = ("a", "second") if into == "in place" else ("z", "first")
        hra_fx.transform(model, config(target, r=4), name)
    with torch.inference_mode():
        hra_fx.load_adapter(model, tmp_path, "a", is_trainable=True)
        hra_fx.set_adapter(model, "a")
    assert torch.equal(model.second.hra_u["a"], other.second.hra_u["a"])
    check_trainable(plain, model, "a")


def test_copies_that_are_loaded_in_inference_mode_are_trained_on(tmp_path: Path) -> None:
    _, other = adapted(net(), a=config("second", modules_to_save=["head"]))
    hra_fx.save_adapter(other, tmp_path)
    model = net()
    with torch.inference_mode():
        hra_fx.load_adapter(model, tmp_path, "a", is_trainable=True)
    x = normal(3, 6)
    assert not any(tensor.is_inference() for tensor in model.state_dict(keep_vars=True).values())
    assert torch.equal(run(model, x), run(other, x))
    run(model, x).sum().backward()
    hidden = torch.tanh(other.second(torch.tanh(other.norm(other.first(x)))))
    assert_close(model.head.weight.grad, hidden.sum(dim=0).expand(3, 8))
