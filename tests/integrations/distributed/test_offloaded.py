"""Models that accelerate offloads, before or after `transform`, against the same model in memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import accelerate
import moe_models
import pytest
import torch
import transformers
from accelerate.hooks import remove_hook_from_submodules
from integrations.distributed.offloading import (
    CPU,
    EVERY,
    MLP,
    OFFLOADS,
    WHEN,
    offload,
    same_files,
    same_functions,
)
from integrations.distributed.trained import CASES, F64, adapted, close, output, train, trained
from second_device import LAZY

import hra_fx
from hra_fx.errors import FoldError


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize(("name", "way"), EVERY)
def test_a_model_runs_as_in_memory(name: str, way: str, when: str, tmp_path: Path) -> None:
    case = CASES[name]
    wanted = output(case.model().eval(), case)
    model = WHEN[when](case, way, tmp_path)
    for _ in range(2):
        assert close(output(model, case), wanted)
    assert any(parameter.is_meta for parameter in model.parameters())
    with hra_fx.disable_adapters(model):
        assert close(output(model, case), output(case.base().eval(), case))
    hra_fx.delete_adapter(model, "default")
    assert close(output(model, case), output(case.base().eval(), case))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("way", ["CPU", "disk"])
def test_a_model_in_the_dtypes_of_users(way: str, when: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Autocast is asked for a device, and has none for a weight that is offloaded."""
    case = replace(MLP, dtype=dtype)
    plain, model = case.model(), WHEN[when](case, way, tmp_path)
    x = case.data()[0].to(dtype)
    for enabled in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            assert torch.equal(model(x), plain(x))


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("way", ["CPU", "disk"])
def test_experts(way: str, when: str, implementation: str, tmp_path: Path) -> None:
    """Their vectors are read, by the weight that is read, and not called."""
    plain = hra_fx.transform(moe_models.built("mixtral", F64, implementation), moe_models.experts_config())
    moe_models.randomise(plain)
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
@pytest.mark.parametrize("way", OFFLOADS)
def test_functions_that_need_the_vectors(way: str, when: str, tmp_path: Path) -> None:
    plain, model = MLP.model().eval(), WHEN[when](MLP, way, tmp_path / "offload")
    same_functions(model, plain, tmp_path)
    assert model[0]._parameters["weight"].is_meta
    assert close(output(model, MLP), output(plain, MLP))


@pytest.mark.parametrize("way", ["CPU", "CPU, for another device", "disk"])
def test_vectors_are_trained_while_weights_are_offloaded(way: str, tmp_path: Path) -> None:
    plain, model = MLP.model(), WHEN["before"](MLP, way, tmp_path)
    assert train(model, MLP) == pytest.approx(train(plain, MLP), abs=1e-9)
    found, wanted = trained(model), trained(plain)
    assert found.keys() == wanted.keys()
    assert all(close(found[key], wanted[key]) for key in wanted)


# ---- folding ----


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("way", ["CPU", "CPU, for another device", "CPU, in a device map"])
@pytest.mark.parametrize("name", ["mlp, whole", "convolutions"])
def test_a_fold_goes_layer_by_layer(name: str, way: str, when: str, tmp_path: Path) -> None:
    case = CASES[name]
    model, folded = WHEN[when](case, way, tmp_path), case.model()
    ours, theirs = hra_fx.plan_fold(model), hra_fx.plan_fold(folded)
    assert [layer.change for layer in ours.layers] == pytest.approx([layer.change for layer in theirs.layers])
    ours.apply()
    theirs.apply()
    wanted = output(folded, case)
    assert not any("hra_" in key for key in model.state_dict())
    assert next(model.parameters()).is_meta
    assert close(output(model, case), wanted)
    remove_hook_from_submodules(model)
    found, expected = model.state_dict(), folded.state_dict()
    assert all(close(found[key], expected[key]) for key in expected)


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
    with pytest.raises(FoldError, match=r"^model\.layers\.1\.\S+: accelerate loads its weight from files"):
        hra_fx.fold(model)
    assert close(output(model, case), output(plain, case))
    assert {path: path.read_bytes() for path in files} == files
