"""`set_scale`: a part of an adapter, along the geodesic from the base model."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from model.many import adapted, assert_close, config, net, normal, turn
from oracles import dense_power as power, dense_product, layer_q
from torch import Tensor, nn

import hra_fx


def one() -> tuple[nn.Module, nn.Module]:
    return adapted(net(), a=config("first", r=4))


def output(plain: nn.Module, q: Tensor, x: Tensor) -> Tensor:
    return torch.func.functional_call(plain, {"first.weight": plain.first.weight @ q}, (x,))


@pytest.mark.parametrize("alpha", [0, 0.3, 1])
def test_the_ends_are_exact_and_a_report_has_a_part_of_the_angle(alpha: float) -> None:
    """`test_any_order.py` compares outputs, gradients and folds with powers of `Q`, for every kind of adapter."""
    plain, model = one()
    q, x = layer_q(model.first, ["a"]).detach(), normal(4, 6)
    full = model(x)
    hra_fx.set_scale(model, "a", alpha)
    if alpha in (0, 1):
        assert torch.equal(model(x), full if alpha else plain(x))
    assert hra_fx.orthogonality_loss(model).requires_grad is (alpha == 1)
    (row,) = hra_fx.report(model)
    assert row.angle == pytest.approx(alpha * float(torch.linalg.eigvals(q).angle().max()), abs=1e-6)
    assert row.orthogonality < 1e-12


def test_16_bits_do_not_change_a_scaled_rotation() -> None:
    model = hra_fx.transform(net(torch.float32), config("first", r=4), "a")
    with torch.no_grad():
        model.first.hra_u["a"][..., 1] = 0.01
    hra_fx.set_scale(model, "a", 0.5)
    q = dense_product(model.first.hra_u.chain("a"))
    model.bfloat16()
    assert torch.equal(dense_product(model.first.hra_u.chain("a")), q) and not torch.equal(q, torch.eye(6).double())
    assert_close(model(normal(4, 6).bfloat16()).double(), output(net(), q, normal(4, 6)), 0.02)


def test_a_refusal_at_the_second_layer_restores_the_first() -> None:
    model = adapted(net(), a=config("first", "second", pairs=False))[1]
    hra_fx.set_scale(model, "a", 0.3)
    with torch.no_grad():
        model.second.hra_u["a"][:, 1] = 0
    before, x = model.first.hra_u.chain("a").clone(), normal(4, 6)
    wanted = model(x)
    with pytest.raises(hra_fx.AdapterError, match=r"^second: adapter 'a': an odd number of reflections"):
        hra_fx.set_scale(model, "a", 0.5)
    assert torch.equal(model.first.hra_u.chain("a"), before)
    assert torch.equal(model(x), wanted)


def test_a_state_has_the_vectors_of_full_scale_and_a_file_those_of_the_current_scale(tmp_path: Path) -> None:
    (plain, model), (_, other) = one(), one()
    turn(other, seed=5)
    q, x = layer_q(model.first, ["a"]).detach(), normal(4, 6)
    hra_fx.set_scale(model, "a", 0.2)
    hra_fx.set_scale(other, "a", 0.5)
    with pytest.raises(
        hra_fx.AdapterError, match=r"^first\.hra_u\.a: adapter 'a' has a scale\. Call hra_fx\.set_scale"
    ):
        other.load_state_dict(model.state_dict())
    hra_fx.set_scale(other, "a", 1)
    other.load_state_dict(model.state_dict())
    assert_close(other(x), output(plain, q, x))
    hra_fx.save_adapter(model, tmp_path)
    loaded = hra_fx.load_adapter(net(), tmp_path, is_trainable=True)
    assert_close(loaded(x), output(plain, power(q, 0.2), x), 1e-8)
    loaded(x).sum().backward()
    assert loaded.first.hra_u["default"].grad.any()


def test_a_file_of_a_scaled_gram_schmidt_adapter_has_plain_reflections(tmp_path: Path) -> None:
    """Gram-Schmidt of their vectors would be another rotation."""
    _, model = adapted(net(), a=config("first", r=4, apply_GS=True))
    x = normal(4, 6)
    full = model(x)
    hra_fx.set_scale(model, "a", 0.3)
    wanted = model(x)
    hra_fx.save_adapter(model, tmp_path)
    assert_close(hra_fx.load_adapter(net(), tmp_path)(x), wanted, 1e-8)
    theirs = peft.PeftModel.from_pretrained(net(), str(tmp_path))
    for run in (theirs, theirs.merge_and_unload()):
        assert_close(run(x), wanted, 1e-8)
    assert not torch.allclose(wanted, full, atol=1e-2)
