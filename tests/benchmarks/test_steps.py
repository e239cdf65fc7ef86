"""What is measured: the steps, whose weights they use, and memory."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from speed.memory import peaks
from speed.methods import METHODS, Method
from speed.models import WORKLOADS, Workload, linear
from speed.setting import Setting
from speed.steps import plain_model, run_of, steps_of

TINY = "llama-64x1"


def test_the_frozen_base_runs_backward_through_all_layers() -> None:
    setting = Setting(TINY, "training", 4)
    plain = plain_model(setting)
    reached: list[str] = []
    for path in ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "lm_head"):
        layer = plain.get_submodule(path)
        layer.register_full_backward_hook(lambda *_, path=path: reached.append(path))
    frozen = Method("frozen", lambda base, workload, r: plain)
    steps, left_out = steps_of(setting, ["frozen"], {"frozen": frozen})
    assert left_out == {}
    steps["frozen"].run(None)
    assert sorted(reached) == ["lm_head", "model.layers.0.mlp.down_proj", "model.layers.0.self_attn.q_proj"]
    assert all(weight.grad is None for weight in plain.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_linear_gives_the_gradient_of_its_input_with_and_without_adapters(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(WORKLOADS, "linear-16", linear(16))
    inputs: dict[str, torch.Tensor] = {}

    def watched(key: str) -> Method:
        def put(base: torch.nn.Module, workload: Workload, r: int) -> torch.nn.Module:
            model = METHODS[key].put(base, workload, r)
            model.register_forward_pre_hook(lambda *given: inputs.update({key: given[-1]["input"]}), with_kwargs=True)
            return model

        return dataclasses.replace(METHODS[key], put=put)

    methods = ("base", "lora", "peft-hra", "ours", "ours-gs")
    known = {key: watched(key) for key in methods}
    steps, left_out = steps_of(Setting("linear-16", "training", 4, dtype), methods, known)
    assert left_out == {}
    for key, step in steps.items():
        step.run(None)
        assert inputs[key].dtype == getattr(torch, dtype)
        assert inputs[key].grad is not None and inputs[key].grad.shape == (4, 16), key


def test_a_compiled_method_is_one_graph() -> None:
    key = "ours"
    compiled = dataclasses.replace(METHODS[key], compiled={"backend": "aot_eager", "fullgraph": True})
    steps, left_out = steps_of(Setting(TINY, "training", 4, compiled=True), [key], {key: compiled})
    assert left_out == {}
    steps[key].run(None)
    torch._dynamo.reset()


def test_methods_share_base_weights_unless_they_need_their_own() -> None:
    setting = Setting(TINY, "training", 4)
    models: dict[str, torch.nn.Module] = {}

    def keeping(key: str) -> Method:
        def put(base: torch.nn.Module, workload: object, r: int) -> torch.nn.Module:
            models[key] = base
            return base

        return dataclasses.replace(METHODS[key], put=put)

    steps_of(setting, list(METHODS), {key: keeping(key) for key in METHODS})
    places = {key: next(model.parameters()).data_ptr() for key, model in models.items()}
    assert {key for key, place in places.items() if place != places["base"]} == {"base-again", "folded"}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_training_step_is_its_gradients_and_an_optimizer() -> None:
    moved, grads = dict[str, bool](), dict[str, torch.Tensor]()
    for mode in ("gradients", "training"):
        setting = Setting(TINY, mode, 4)  # type: ignore[arg-type]
        model = METHODS["lora"].put(plain_model(setting), WORKLOADS[TINY], 8)
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        before = [weight.detach().clone() for weight in trained]
        run = run_of(model, METHODS["lora"], setting)
        run()
        grads[mode] = torch.cat([weight.grad.flatten() for weight in trained if weight.grad is not None])
        moved[mode] = any(not torch.equal(now, then) for now, then in zip(trained, before, strict=True))
    assert moved == {"gradients": False, "training": True}
    torch.testing.assert_close(grads["gradients"], grads["training"])


def test_peak_memory_is_that_of_a_process_of_its_own() -> None:
    setting = Setting(TINY, "memory", 512)
    measured = peaks(setting, ("ours",), rounds=1)
    assert measured.left_out == {}
    (grown,) = measured.values["ours"]
    # Logits of 512 x 1024 in float32 and their gradient are 4 MB; the whole model is less than that.
    assert grown is not None and 4e6 < grown < 60e6
