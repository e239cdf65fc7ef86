"""Build the model, the inputs and the step of every method for a setting."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from speed.methods import ALL, Method
from speed.models import WORKLOADS, Workload
from speed.setting import Setting
from speed.timing import Step, reason

NEW_TOKENS = 8

#: Makes a step from a model, its compiled form (or the model again), its inputs and its workload.
Make = Callable[[Any, Any, dict[str, Any], Workload], Callable[[], object]]


def steps_of(setting: Setting, methods: Sequence[str]) -> tuple[dict[str, Step], dict[str, str]]:
    """The step of each method, or why it has none."""
    plain = plain_model(setting)
    steps, left_out = dict[str, Step](), dict[str, str]()
    for key in methods:
        method = ALL[key]
        try:
            model = method.put(copy_of(plain, own_weights=method.own_weights), WORKLOADS[setting.workload], setting.r)
            steps[key] = step_of(model, method, setting)
        except Exception as error:
            left_out[key] = reason(error)
    return steps, left_out


def plain_model(setting: Setting) -> nn.Module:
    """The frozen base model of a setting, with the same weights in every call."""
    torch.manual_seed(0)
    with torch.device(setting.device):
        model = WORKLOADS[setting.workload].build()
    return model.to(setting.device, getattr(torch, setting.dtype)).requires_grad_(False)


def copy_of(model: nn.Module, *, own_weights: bool) -> nn.Module:
    """A copy of the modules and buffers; it shares the parameters unless `own_weights` is True."""
    return copy.deepcopy(model, {} if own_weights else {id(weight): weight for weight in model.parameters()})


def step_of(model: nn.Module, method: Method, setting: Setting) -> Step:
    """The step of a method."""
    run = run_of(model, method, setting)
    wait: Callable[[], None] | None = torch.cuda.synchronize if setting.device == "cuda" else None
    # A compiled model compiles in its first run, and perhaps again in the second one, which has gradients.
    return Step(finished(run, wait), warm_ups=1 if method.compiled is None else 2)


def run_of(model: nn.Module, method: Method, setting: Setting) -> Callable[[], object]:
    """A function that runs one step, and does not wait for the device."""
    workload = WORKLOADS[setting.workload]
    batch = {name: placed(value, setting) for name, value in workload.batch(setting.size).items()}
    kinds: dict[str, Make] = {"inference": inference, "generate": generating}
    make = kinds.get(setting.mode, training)
    compiler: Any = torch.compile
    called = model if method.compiled is None else compiler(model, **method.compiled)
    return make(model, called, batch, workload)


def placed(value: Any, setting: Setting) -> Any:
    """Move an input to the device and dtype of the model."""
    if not isinstance(value, Tensor):
        return value
    dtype = getattr(torch, setting.dtype) if value.is_floating_point() else None
    return value.to(setting.device, dtype)


def finished(run: Callable[[], object], wait: Callable[[], None] | None) -> Callable[[], object]:
    """A run that waits for the device."""

    def whole() -> None:
        run()
        if wait is not None:
            wait()

    return whole


def training(model: nn.Module, called: Any, batch: dict[str, Any], workload: Workload) -> Callable[[], object]:
    """Forward, backward and AdamW; for a frozen model, backward to the output of its first layer."""
    model.train()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    if not trained:
        start_gradient_at(workload.first(model))
    optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None

    def step() -> None:
        for weight in trained:
            weight.grad = None
        loss: Any = workload.output(called(**batch)).float().square().mean()
        loss.backward()
        if optimizer is not None:
            optimizer.step()

    return step


def start_gradient_at(layer: nn.Module) -> None:
    """Make the output of a frozen layer require a gradient."""
    weight = next(layer.parameters())
    nothing = nn.Parameter(torch.zeros((), dtype=weight.dtype, device=weight.device))

    def hook(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        # A compiler breaks its graph at requires_grad_; adding a zero that has a gradient costs next to nothing.
        return output + nothing if torch.compiler.is_compiling() else output.requires_grad_()

    layer.register_forward_hook(hook)


def inference(model: nn.Module, called: Any, batch: dict[str, Any], workload: Workload) -> Callable[[], object]:
    """The forward in eval mode."""
    model.eval()

    def step() -> None:
        with torch.no_grad():
            called(**batch)

    return step


def generating(model: Any, called: Any, batch: dict[str, Any], workload: Workload) -> Callable[[], object]:
    """Generate `NEW_TOKENS` tokens after a prompt, with a KV cache."""
    model.eval()
    settings = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    prompt = batch["input_ids"]

    def step() -> None:
        model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), use_cache=True, **settings)

    return step
