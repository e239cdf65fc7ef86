"""What `transform(..., trace=True)` refuses: the model stays as it was."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from adapting import picture
from torch import Tensor, nn
from tracing.captured import bert, tokens
from tracing.graph_mode import Branches, X, config
from tracing.models import Dropout, Two

import hra_fx
from hra_fx.errors import AdapterError, SelectionError


class Breaks(Two):
    """Neither torch.fx nor torch.export can trace it."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.second(hidden * 2 if float(hidden.sum().detach()) > 0 else hidden)


def under(context: Callable[[], Any]) -> type[Two]:
    """A model that torch.fx cannot trace, with all layers under a context."""

    def forward(self: Branches, x: Tensor) -> dict[str, Tensor]:
        with context():
            return Branches.forward(self, x)

    return type("Under", (Branches,), {"forward": forward})


ERRORS: dict[str, tuple[type[nn.Module], dict[str, Any], type[Exception], str]] = {
    "torch.fx": (Branches, {}, AdapterError, r"torch\.fx cannot trace Branches: it branches on a value"),
    "torch.export": (Breaks, {"example_inputs": X}, AdapterError, "torch.export cannot capture Breaks"),
    "autocast": (
        under(lambda: torch.autocast("cpu", torch.bfloat16)),
        {"example_inputs": X},
        AdapterError,
        r"first is called under torch\.autocast or another grad mode",
    ),
    "no_grad": (
        under(torch.no_grad),
        {"example_inputs": X},
        AdapterError,
        r"first is called under torch\.autocast or another grad mode",
    ),
    "selection": (Dropout, {"config": config("nowhere")}, SelectionError, "nowhere"),
    "modules_to_save": (Dropout, {"config": config(modules_to_save=["nowhere"])}, SelectionError, "nowhere"),
    "example_inputs": (Branches, {"example_inputs": 3}, AdapterError, "example_inputs must be a tensor, .*, got int"),
}


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")  # a new name in transformers 6
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.to("meta"), "bert.embeddings.word_embeddings.weight is on the meta device"),
        (lambda model: model.train().gradient_checkpointing_enable(), "checkpoints its activations, which a graph"),
    ],
)
def test_a_state_that_a_graph_would_drop_is_refused(change: Callable[[Any], object], message: str) -> None:
    model = bert()
    change(model)
    before = picture(model)
    with pytest.raises(AdapterError, match=message):
        hra_fx.transform(model, config("query"), trace=True, example_inputs=tokens(2, 5))
    assert picture(model) == before


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_leaves_the_model_as_it_was(name: str) -> None:
    make, options, kind, message = ERRORS[name]
    model = make().double().eval()
    before = picture(model)
    with pytest.raises(kind, match=message):
        hra_fx.transform(model, **({"config": config(), "trace": True} | options))
    assert picture(model) == before
    assert model(X) is not None


def test_a_refusal_of_torch_export_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    before = logger.disabled
    with pytest.raises(AdapterError, match=r"torch\.export cannot capture Breaks"):
        hra_fx.transform(Breaks().double(), config(), trace=True, example_inputs=X)
    assert capfd.readouterr() == ("", "")
    assert logger.disabled is before


def test_a_model_with_adapters_is_refused() -> None:
    model = hra_fx.transform(Dropout(), config("first"))
    with pytest.raises(AdapterError, match=r"trace=True: Dropout already has adapters.*hra_fx\.graphs\(model\)"):
        hra_fx.transform(model, config("second"), "other", trace=True)
