"""Models that accelerate offloads or dispatches, against the same model in memory; its hooks; and refusals."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate
import moe_models
import pytest
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_submodules
from adapting import config, picture, randomise
from integrations.distributed.offloading import (
    COPIES,
    CPU,
    DEVICES,
    EVERY,
    MLP,
    OFFLOADS,
    WHEN,
    offload,
    on_devices,
    same_files,
    same_functions,
)
from integrations.distributed.trained import CASES, F64, adapted, close, output, train, trained
from second_device import LAZY
from torch import fx, nn

import hra_fx
from hra_fx.errors import AdapterError, FoldError, UnsupportedLayerError

#: Where vectors are trained that are added to offloaded layers.
TRAINED = ("CPU", "CPU, for another device", "disk")


#: transformers 4 recomputes blocks in the other way of torch, which warns if no input needs gradients.
_REENTRANT = pytest.mark.needs("transformers>=5.6")


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize(
    ("name", "way"),
    [pytest.param(*each, marks=_REENTRANT if each[0] == "llama, checkpointing" else ()) for each in EVERY],
)
def test_a_model_does_what_it_does_in_memory(name: str, way: str, when: str, tmp_path: Path) -> None:
    """It computes, is trained where it can be, and is folded where its weights are in memory."""
    case = CASES[name]
    plain, model = case.model().eval(), WHEN[when](case, way, tmp_path)
    for _ in range(2):
        assert close(output(model, case), output(plain, case))
    with hra_fx.disable_adapters(model):
        assert close(output(model, case), output(case.base().eval(), case))
    if way in DEVICES or (when == "before" and way in TRAINED):
        assert {parameter.device for parameter in model.parameters()} == set(DEVICES.get(way, ())) or way in TRAINED
        wanted, losses = train(plain.train(), case), train(model.train(), case)
        assert losses == pytest.approx(wanted, abs=1e-9) and wanted[0] != wanted[-1]
        found, expected = trained(model), trained(plain)
        assert found.keys() == expected.keys()
        assert all(close(found[key], expected[key]) for key in expected)
    if way in OFFLOADS:
        hra_fx.delete_adapter(model, "default")
        assert close(output(model.eval(), case), output(case.base().eval(), case))
        return
    for each in (model, plain):
        hra_fx.fold(each.eval())
    assert not any("hra_" in key for key in model.state_dict())
    assert close(output(model, case), output(plain, case))
    remove_hook_from_submodules(model)
    found, expected = model.state_dict(), plain.state_dict()
    assert all(close(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize(("way", "dtype"), [("CPU", torch.float32), ("disk", torch.bfloat16)])
def test_a_model_in_the_dtypes_of_users(way: str, dtype: torch.dtype, when: str, tmp_path: Path) -> None:
    """Autocast is asked for a device, and has none for a weight that is offloaded."""
    case = replace(MLP, dtype=dtype)
    plain, model = case.model(), WHEN[when](case, way, tmp_path)
    x = case.data()[0].to(dtype)
    for enabled in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            assert torch.equal(model(x), plain(x))


@pytest.mark.needs("transformers>=5.6")
@pytest.mark.parametrize("way", ["CPU", "disk"])
@pytest.mark.parametrize(("when", "implementation"), [("before", "eager"), ("after", "batched_mm")])
def test_experts(way: str, when: str, implementation: str, tmp_path: Path) -> None:
    """Their vectors are read, by the weight that is read, and not called."""
    plain = hra_fx.transform(moe_models.built("mixtral", F64, implementation), moe_models.experts_config())
    randomise(plain)
    hra_fx.save_adapter(plain, tmp_path / "adapter")
    model = moe_models.built("mixtral", F64, implementation)
    if when == "after":
        hra_fx.load_adapter(model, tmp_path / "adapter")
    offload(model, way, tmp_path / "offload")
    if when == "before":
        hra_fx.load_adapter(model, tmp_path / "adapter")
    call = moe_models.call_of("mixtral")
    with torch.no_grad():
        assert close(model(**call).logits, plain(**call).logits)
        assert not close(plain(**call).logits, moe_models.built("mixtral", F64, implementation)(**call).logits, 1e-3)


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("way", [*OFFLOADS, "two devices"])
def test_functions_that_need_the_vectors(way: str, when: str, tmp_path: Path) -> None:
    """Those that read on every device, and on two devices all that there is."""
    plain, model = MLP.model().eval(), WHEN[when](MLP, way, tmp_path / "offload").eval()
    more: list[Callable[[Any], object]] = []
    if way == "two devices":
        more += [hra_fx.merge_adapter, hra_fx.unmerge_adapter, hra_fx.disable_adapters]
        more += [lambda model: hra_fx.set_adapter(model, ["default", "b"]), lambda model: hra_fx.fold(model, "default")]
    same_functions(model, plain, tmp_path, *more)
    assert model[0]._parameters["weight"].is_meta is (way in OFFLOADS)
    assert close(output(model, MLP), output(plain, MLP))


def test_a_model_that_is_moved_as_a_whole() -> None:
    """`cpu_offload_with_hook` moves modules, and leaves no tensor without data."""
    case = CASES["mlp, Gram-Schmidt"]
    wanted = output(case.model(), case)
    for device in (CPU, LAZY):
        for when in ("before", "after"):
            model = case.model() if when == "after" else case.base()
            _, hook = accelerate.cpu_offload_with_hook(model, execution_device=device)
            if when == "before":
                adapted(model, case)
            assert close(output(model, case), wanted)
            assert model[0].hra_u["default"].device == device
            for _ in range(2):
                hook.offload()
                assert model[0].hra_u["default"].device == CPU
                assert close(output(model, case), wanted)
            hook.offload()
            assert close(output(hra_fx.fold(model), case), wanted)


def test_a_checkpoint_that_is_loaded_from_its_files_in_each_call(tmp_path: Path) -> None:
    case = CASES["llama"]
    plain, ids = case.model().eval(), case.data()[0]
    case.base().save_pretrained(tmp_path / "base")
    hra_fx.save_adapter(plain, tmp_path / "adapter")
    files = {path: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    names = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"]
    model = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "base", device_map=dict.fromkeys(names, "cpu") | {"model.layers.1": "disk"}, dtype=F64
    )
    hra_fx.load_adapter(model, tmp_path / "adapter")
    assert any(parameter.is_meta for parameter in model.parameters())
    assert close(output(model, case), output(plain, case))
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))
    same_files(model, plain, tmp_path, within=1e-6)  # float32 in the files
    with pytest.raises(FoldError, match=r"^model\.layers\.1\.\S+: accelerate offloads its weight.*fold_checkpoint"):
        hra_fx.fold(model)
    assert close(output(model, case), output(plain, case))
    assert {path: path.read_bytes() for path in files} == files


def refuses(model: nn.Module, kind: type[Exception], message: str, call: Callable[[], object]) -> None:
    before, values = picture(model), output(model, MLP)
    found = picture(model)  # a forward replaces the tensors that are offloaded
    with pytest.raises(kind, match=message):
        call()
    after = picture(model)
    assert after["classes"] == before["classes"]
    assert after["keys"] == before["keys"]
    assert after["modes"] == found["modes"]
    assert [entry[2] for entry in after["parameters"]] == [entry[2] for entry in before["parameters"]]  # type: ignore[attr-defined]
    assert torch.equal(output(model, MLP), values)


def test_what_would_write_to_an_offloaded_weight(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"r": 2, "target_modules": ["0"]}
    message = "^0: accelerate offloads its weight, so hra_fx cannot fold or merge.*fold_checkpoint"
    overwritten = "accelerate offloads it, and would overwrite a trained copy with the base model's tensors"
    for way in OFFLOADS:
        model = offload(MLP.model(), way, tmp_path / way)
        for act in (hra_fx.merge_adapter, hra_fx.fold):
            refuses(model, FoldError, message, functools.partial(act, model))
        biases = hra_fx.HRAConfig(**settings, bias="all")
        refuses(model, UnsupportedLayerError, overwritten, functools.partial(hra_fx.add_adapter, model, "b", biases))
        remove_hook_from_submodules(model)
        hra_fx.merge_adapter(model.to(CPU))  # new vectors are where their layers were executed
        assert close(output(hra_fx.fold(model), MLP), output(MLP.model(), MLP))
    base = offload(MLP.base(), "CPU", tmp_path)
    copies = hra_fx.HRAConfig(**settings, modules_to_save=["2"])
    refuses(base, UnsupportedLayerError, overwritten, lambda: hra_fx.transform(base, copies))


@pytest.mark.parametrize("way", ["CPU", "device map"])
def test_trained_copies_that_are_offloaded(way: str, tmp_path: Path) -> None:
    hra_fx.save_adapter(COPIES.model(), tmp_path / "adapter")
    wanted = output(COPIES.model(), COPIES)
    model = offload(COPIES.model(), way, tmp_path / "offload")
    assert close(output(model, COPIES), wanted)
    message = "accelerate offloads its trained copies"
    calls: list[tuple[type[Exception], Callable[[], object]]] = [
        (AdapterError, lambda: hra_fx.disable_adapters(model)),
        (AdapterError, lambda: hra_fx.delete_adapter(model, "default")),
        (AdapterError, lambda: hra_fx.save_adapter(model, tmp_path / "other")),
        (AdapterError, lambda: hra_fx.load_adapter(model, tmp_path / "adapter")),
        (AdapterError, lambda: hra_fx.save_as_lora(model, tmp_path / "lora")),
        (FoldError, lambda: hra_fx.fold(model)),
    ]
    for kind, call in calls:
        refuses(model, kind, message, call)
    hra_fx.set_adapter(model, "default")  # exchanges nothing
    remove_hook_from_submodules(model)
    assert close(output(hra_fx.fold(model.to(CPU)), COPIES), wanted)


def test_modules_that_are_offloaded_as_a_whole(tmp_path: Path) -> None:
    blocks = ["Sequential"]
    base = accelerate.cpu_offload(nn.Sequential(MLP.base()), execution_device=CPU, preload_module_classes=blocks)
    settings = hra_fx.HRAConfig(r=2, target_modules=["0.0"])
    message = r"the model: accelerate offloads it as a whole \(preload_module_classes\)"
    refuses(base, UnsupportedLayerError, message, lambda: hra_fx.transform(base, settings))
    model = hra_fx.transform(nn.Sequential(MLP.base()), settings)
    wanted = output(model, MLP)
    accelerate.cpu_offload(model, execution_device=CPU, preload_module_classes=blocks)
    assert close(output(model, MLP), wanted)
    calls: list[tuple[type[Exception], Callable[[], object]]] = [
        (AdapterError, lambda: hra_fx.save_adapter(model, tmp_path / "other")),
        (AdapterError, lambda: hra_fx.orthogonality_loss(model)),
        (FoldError, lambda: hra_fx.fold(model)),
        (AdapterError, lambda: hra_fx.add_adapter(model, "b", settings)),
    ]
    for kind, call in calls:
        refuses(model, kind, message, call)


# ---- what is refused ----


def test_graphs_of_models_with_hooks_are_refused() -> None:
    graph, model = fx.symbolic_trace(MLP.base()), on_devices(MLP.base())
    add_hook_to_module(graph, ModelHook())
    for made, trace, kind, message in (
        (graph, False, hra_fx.UnsupportedLayerError, "it is a GraphModule, and accelerate added its hook to"),
        (model, True, hra_fx.AdapterError, "trace=True: the model has a hook of accelerate, which a graph"),
    ):
        before = output(made, MLP)
        with pytest.raises(kind, match=message):
            hra_fx.transform(made, config("0"), trace=trace)
        assert torch.equal(output(made, MLP), before)
        remove_hook_from_submodules(made)
        hra_fx.transform(made, config("0"))
