"""Models that accelerate offloads, before or after `transform`, against the same model in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

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
)
from integrations.distributed.trained import CASES, F64, SIZES, adapted, close, output, train, trained
from safetensors.torch import load_file
from second_device import LAZY
from torch import Tensor, nn

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
def test_adapters_that_start_again(way: str, when: str, tmp_path: Path) -> None:
    plain, model = MLP.model().eval(), WHEN[when](MLP, way, tmp_path)
    for each in (plain, model):
        torch.manual_seed(3)
        hra_fx.reset_adapters(each)
    found, wanted = (vectors_of(each) for each in (model, plain))
    assert all(torch.equal(found[name].cpu(), wanted[name]) for name in wanted)
    assert close(output(model, MLP), output(MLP.base(), MLP))


def vectors_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if ".hra_u." in name}


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("way", OFFLOADS)
def test_functions_that_need_the_vectors(way: str, when: str, tmp_path: Path) -> None:
    plain, model = MLP.model().eval(), WHEN[when](MLP, way, tmp_path / "offload")
    second = hra_fx.transform(MLP.base(), hra_fx.HRAConfig(r=2, init_weights=False, target_modules=["0", "2"]))
    hra_fx.save_adapter(second, tmp_path / "second")
    steps: list[Callable[[nn.Module], object]] = [
        lambda model: hra_fx.add_adapter(model, "c", hra_fx.HRAConfig(r=4, target_modules=["0", "4"])),
        lambda model: hra_fx.load_adapter(model, tmp_path / "second", "b"),
        lambda model: hra_fx.set_adapter(model, ["b", "default"]),
        lambda model: hra_fx.set_scale(model, "b", 0.5),
        lambda model: hra_fx.set_scale(model, "b", 1),
        lambda model: hra_fx.load_adapter(model, tmp_path / "second", "b"),
        lambda model: hra_fx.combine(model, ["b", "default"], "both"),
        lambda model: hra_fx.set_adapter(model, "both"),
        lambda model: hra_fx.delete_adapter(model, "c"),
        lambda model: hra_fx.set_adapter(model, ["default", "b"]),
    ]
    for index, step in enumerate(steps):
        for each in (plain, model):
            torch.manual_seed(3)  # new vectors are random
            step(each)
        assert close(output(model, MLP), output(plain, MLP)), index
    assert close(hra_fx.orthogonality_loss(model), hra_fx.orthogonality_loss(plain))
    for each in (plain, model):
        torch.manual_seed(3)
        hra_fx.reset_adapters(each, "b")
    assert close(output(model, MLP), output(plain, MLP))
    assert model[0]._parameters["weight"].is_meta
    ours, theirs = hra_fx.report(model).rows, hra_fx.report(plain).rows
    assert [row.share for row in ours] == pytest.approx([row.share for row in theirs])
    wanted, found = saved(plain, tmp_path / "plain"), saved(model, tmp_path / "offloaded")
    assert wanted.keys() == found.keys()
    assert all(close(wanted[key], found[key]) for key in wanted)
    assert close(output(model, MLP), output(plain, MLP))


def saved(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    hra_fx.save_adapter(model, folder, "default")
    hra_fx.save_as_lora(model, folder / "lora")
    return load_file(folder / "adapter_model.safetensors") | load_file(folder / "lora" / "adapter_model.safetensors")


@pytest.mark.parametrize("way", OFFLOADS)
def test_a_report_of_offloaded_vectors(way: str, tmp_path: Path) -> None:
    model = WHEN["after"](MLP, way, tmp_path)
    assert model[0].hra_u["default"].is_meta
    ours, theirs = hra_fx.report(model).rows, hra_fx.report(MLP.model()).rows
    for name in ("share", "angle", "orthogonality"):
        assert [getattr(row, name) for row in ours] == pytest.approx([getattr(row, name) for row in theirs])
    assert model[0].hra_u["default"].is_meta


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
    model, folded = WHEN[when](case, way, tmp_path), hra_fx.fold(case.model())
    wanted = output(folded, case)
    hra_fx.fold(model)
    assert not any("hra_" in key for key in model.state_dict())
    assert next(model.parameters()).is_meta
    assert close(output(model, case), wanted)
    remove_hook_from_submodules(model)
    found, expected = model.state_dict(), folded.state_dict()
    assert all(close(found[key], expected[key]) for key in expected)


def test_a_fold_of_some_adapters_and_its_plan(tmp_path: Path) -> None:
    model, plain = WHEN["before"](MLP, "CPU", tmp_path), MLP.model()
    for each in (model, plain):
        torch.manual_seed(3)
        hra_fx.add_adapter(each, "b", hra_fx.HRAConfig(r=2, init_weights=False, target_modules=["0"]))
        hra_fx.set_adapter(each, ["default", "b"])
    ours, theirs = hra_fx.plan_fold(model, "default"), hra_fx.plan_fold(plain, "default")
    assert [layer.change for layer in ours.layers] == pytest.approx([layer.change for layer in theirs.layers])
    ours.apply()
    theirs.apply()
    assert close(output(model, MLP), output(plain, MLP))
    assert list(model[0].hra_u) == ["b"]
    assert not hasattr(model[2], "hra_u")


@pytest.mark.parametrize("when", WHEN)
def test_a_fold_into_a_head_that_is_tied_leaves_the_embeddings(when: str) -> None:
    def tied() -> Any:
        torch.manual_seed(0)
        sizes = {**SIZES, "num_key_value_heads": 1, "tie_word_embeddings": True}
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).to(F64)

    plain, model = tied(), tied()
    head = hra_fx.HRAConfig(r=4, init_weights=False, target_modules=["lm_head"])
    for step in ["offload", "transform"] if when == "before" else ["transform", "offload"]:
        torch.manual_seed(1)
        hra_fx.transform(model, head) if step == "transform" else accelerate.cpu_offload(model, execution_device=CPU)
    torch.manual_seed(1)
    ids = torch.arange(5)[None]
    wanted = hra_fx.transform(plain, head)(ids).logits
    assert close(model(ids).logits, wanted)
    with pytest.warns(hra_fx.HRAWarning, match="untied: lm_head"):
        hra_fx.fold(model)
    assert not model.config.tie_word_embeddings
    assert close(model(ids).logits, wanted)


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


class Generator(nn.Sequential):
    """A model whose `generate` calls it twice."""

    def generate(self, x: Tensor) -> Tensor:
        return self(x) + self(x)


def test_generate_of_a_model_that_its_first_call_moves() -> None:
    """Factors that were computed at the start of `generate` are on the device of before, and are not used."""
    plain, model = Generator(*MLP.base()), Generator(*MLP.base())
    for each in (plain, model):
        torch.manual_seed(3)
        hra_fx.transform(each, hra_fx.HRAConfig(r=2, init_weights=False, target_modules=["0", "2", "4"]))
    _, hook = accelerate.cpu_offload_with_hook(model, execution_device=LAZY)
    hook.offload()
    with torch.no_grad():
        assert close(model.generate(MLP.data()[0].to(LAZY)), plain.generate(MLP.data()[0]))


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
    wanted, found = saved(plain, tmp_path / "plain"), saved(model, tmp_path / "offloaded")
    assert wanted.keys() == found.keys()
    assert all(close(wanted[key], found[key], 1e-6) for key in wanted)  # float32 in the files
    with pytest.raises(FoldError, match=r"^model\.layers\.1\.\S+: accelerate loads its weight from files"):
        hra_fx.fold(model)
    assert close(output(model, case), output(plain, case))
    assert {path: path.read_bytes() for path in files} == files
