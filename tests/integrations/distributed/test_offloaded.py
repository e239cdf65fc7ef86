"""Models that accelerate offloads or dispatches, against the same model in memory; its hooks; and refusals."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import accelerate
import moe_models
import pytest
import torch
import transformers
from accelerate.hooks import remove_hook_from_submodules
from adapting import config, randomise
from integrations.distributed.trained import CASES, F64, Case, adapted, close, output, train, trained
from safetensors.torch import load_file
from second_device import LAZY
from torch import Tensor, nn

import hra_fx
from hra_fx.errors import AdapterError, FoldError, UnsupportedLayerError

CPU = torch.device("cpu")
MLP, COPIES = CASES["mlp, whole"], CASES["mlp, copies"]


def dispatched(model: nn.Module, places: Mapping[str, Any] | Iterable[tuple[str, Any]], folder: Path) -> nn.Module:
    """Some parts in these places, and the others on the CPU, with hooks on every module."""
    every = dict.fromkeys((name for name, _ in model.named_children()), "cpu") | dict(places)
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)  # it takes the CPU for a place to offload to
    return accelerate.dispatch_model(model, every, main_device="cpu", offload_dir=str(folder), force_hooks=True)


def on_devices(model: nn.Module, *devices: torch.device, targets: Iterable[str] = ()) -> nn.Module:
    """The targets in turn on these devices."""
    names = [name for name, _ in model.named_children() if name in targets]
    return dispatched(model, zip(names, cycle(devices), strict=False), Path())


#: Ways that leave weights on the meta device, and those in which they are in memory.
OFFLOADS: dict[str, Callable[[nn.Module, Case, Path], nn.Module]] = {
    "CPU": lambda model, case, folder: accelerate.cpu_offload(model, execution_device=CPU),
    "CPU, for another device": lambda model, case, folder: accelerate.cpu_offload(model, execution_device=LAZY),
    "disk": lambda model, case, folder: accelerate.disk_offload(model, str(folder), execution_device=CPU) or model,
    "device map": lambda model, case, folder: dispatched(
        model, {next(name for name, _ in model.named_children()): "disk"}, folder
    ),
}
DEVICES: dict[str, Callable[[nn.Module, Case, Path], nn.Module]] = {
    "two devices": lambda model, case, folder: on_devices(model, CPU, LAZY, targets=case.config["target_modules"]),
    "one device": lambda model, case, folder: on_devices(model),
}
#: Where vectors are trained that are added to offloaded layers.
TRAINED = ("CPU", "CPU, for another device", "disk")
#: A case and where it is. On both devices, the base computes the same to 1e-13; Llama's norms are in float32, which
#: rounds.
EVERY = [
    *(("mlp, whole", way) for way in (*OFFLOADS, "two devices")),
    *((name, "CPU") for name in ("mlp, Gram-Schmidt", "convolutions")),
    *(("llama", way) for way in ("CPU", "device map", "one device")),
    *((name, "two devices") for name in ("mlp, copies", "attention", "convolutions")),
    # transformers 4 recomputes blocks in the other way of torch, which warns if no input needs gradients.
    pytest.param("llama, checkpointing", "one device", marks=pytest.mark.needs("transformers>=5.6")),
]


def placed(model: nn.Module, case: Case, way: str, folder: Path) -> nn.Module:
    (OFFLOADS | DEVICES)[way](model.eval(), case, folder)
    assert any(parameter.is_meta for parameter in model.parameters()) is (way in OFFLOADS)
    return model


WHEN: dict[str, Callable[[Case, str, Path], nn.Module]] = {
    "before": lambda case, way, folder: adapted(placed(case.base(), case, way, folder), case),
    "after": lambda case, way, folder: placed(case.model(), case, way, folder),
}
whenever = pytest.mark.parametrize("when", WHEN)


def saved(model: nn.Module, folder: Path, adapter: str) -> dict[str, Tensor]:
    hra_fx.save_adapter(model, folder, adapter)
    hra_fx.save_as_lora(model, folder / "lora", adapter)
    return load_file(folder / "adapter_model.safetensors") | load_file(folder / "lora" / "adapter_model.safetensors")


def same_files(
    model: nn.Module, plain: nn.Module, folder: Path, adapter: str = "default", within: float = 1e-9
) -> None:
    wanted, found = saved(plain, folder / "plain", adapter), saved(model, folder / "model", adapter)
    assert wanted.keys() == found.keys()
    assert all(close(wanted[key], found[key], within) for key in wanted)


@whenever
@pytest.mark.parametrize(("name", "way"), EVERY)
def test_a_model_does_what_it_does_in_memory(name: str, way: str, when: str, tmp_path: Path) -> None:
    """It computes, is trained where it can be, and is folded where its weights are in memory."""
    case = CASES[name]
    plain, model = case.model().eval(), WHEN[when](case, way, tmp_path)
    for _ in range(2):
        assert close(output(model, case), output(plain, case))
    with hra_fx.disable_adapters(model):
        assert close(output(model, case), output(case.base().eval(), case))
    if way in DEVICES or (when == "before" and way in TRAINED):
        wanted, losses = train(plain.train(), case), train(model.train(), case)
        assert losses == pytest.approx(wanted, abs=1e-9) and wanted[0] != wanted[-1]
        found, expected = trained(model), trained(plain)
        assert found.keys() == expected.keys()
        assert all(close(found[key], expected[key]) for key in expected)
    if way in OFFLOADS:
        hra_fx.delete_adapter(model, "default")
        assert close(output(model.eval(), case), output(case.base().eval(), case))
        return
    assert (LAZY in {parameter.device for parameter in model.parameters()}) is (way == "two devices")
    for each in (model, plain):
        hra_fx.fold(each.eval())
    assert not any("hra_" in key for key in model.state_dict())
    assert close(output(model, case), output(plain, case))
    remove_hook_from_submodules(model)
    found, expected = model.state_dict(), plain.state_dict()
    assert all(close(found[key], expected[key]) for key in expected)


@whenever
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
    base, plain, model = (moe_models.built("mixtral", F64, implementation) for _ in range(3))
    hra_fx.transform(plain, moe_models.experts_config())
    randomise(plain)
    hra_fx.save_adapter(plain, tmp_path / "adapter")
    steps = [
        lambda: placed(model, MLP, way, tmp_path / "offload"),
        lambda: hra_fx.load_adapter(model, tmp_path / "adapter"),
    ]
    for step in steps if when == "before" else reversed(steps):
        step()
    call = moe_models.call_of("mixtral")
    with torch.no_grad():
        assert close(model(**call).logits, plain(**call).logits)
        assert not close(plain(**call).logits, base(**call).logits, 1e-3)


@whenever
@pytest.mark.parametrize("way", [*OFFLOADS, "two devices"])
def test_functions_that_need_the_vectors(way: str, when: str, tmp_path: Path) -> None:
    """The same outputs after every change of adapters; then the same report and files."""
    plain, model = MLP.model().eval(), WHEN[when](MLP, way, tmp_path / "offload").eval()
    second = hra_fx.transform(MLP.base(), hra_fx.HRAConfig(r=2, init_weights=False, target_modules=["0", "2"]))
    hra_fx.save_adapter(second, tmp_path / "second")
    load: Callable[[Any], object] = lambda model: hra_fx.load_adapter(  # noqa: E731
        model, tmp_path / "second", "b", is_trainable=True
    )
    steps: list[Callable[[Any], object]] = [
        load,
        lambda model: hra_fx.set_adapter(model, ["b", "default"]),
        lambda model: hra_fx.set_scale(model, "b", 0.5),
        lambda model: hra_fx.set_scale(model, "b", 1),
        load,
        lambda model: hra_fx.add_adapter(model, "c", hra_fx.HRAConfig(r=3, target_modules=["2", "4"])),
        lambda model: hra_fx.delete_adapter(model, "c"),
        lambda model: hra_fx.reset_adapters(model, "b"),
        lambda model: hra_fx.set_adapter(model, ["default", "b"]),
    ]
    if way == "two devices":
        steps += [hra_fx.merge_adapter, hra_fx.unmerge_adapter, hra_fx.disable_adapters]
        steps += [steps[-4]]
    for index, step in enumerate(steps):
        for each in (plain, model):
            torch.manual_seed(3)  # new vectors are random
            step(each)
        assert close(output(model, MLP), output(plain, MLP)), index
        assert close(hra_fx.orthogonality_loss(model), hra_fx.orthogonality_loss(plain)), index
    ours, theirs = hra_fx.report(model).rows, hra_fx.report(plain).rows
    for name in ("angle", "orthogonality"):
        assert [getattr(row, name) for row in ours] == pytest.approx([getattr(row, name) for row in theirs]), name
    same_files(model, plain, tmp_path, "b")
    assert model[0]._parameters["weight"].is_meta is (way in OFFLOADS)
    if way == "two devices":
        hra_fx.fold(model)
        assert close(output(model, MLP), output(plain, MLP))


@pytest.mark.parametrize("device", [CPU, LAZY])
@pytest.mark.parametrize("when", WHEN)
def test_a_model_that_is_moved_as_a_whole(when: str, device: torch.device) -> None:
    """`cpu_offload_with_hook` moves modules, and leaves no tensor without data."""
    case = CASES["mlp, Gram-Schmidt"]
    wanted, model = output(case.model(), case), case.model() if when == "after" else case.base()
    _, hook = accelerate.cpu_offload_with_hook(model, execution_device=device)
    if when == "before":
        adapted(model, case)
    assert close(output(model, case), wanted)
    assert model[0].hra_u["default"].device == device
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


# ---- what is refused ----


def refuses(model: nn.Module, kind: type[Exception], message: str, *calls: Callable[[], object]) -> None:
    def seen() -> list[object]:  # a forward replaces the tensors that are offloaded
        return [*((name, type(part), part.training) for name, part in model.named_modules()), *model.state_dict()] + [
            (name, parameter.requires_grad) for name, parameter in model.named_parameters()
        ]

    before, values = seen(), output(model, MLP)
    for call in calls:
        with pytest.raises(kind, match=message):
            call()
        assert seen() == before
        assert torch.equal(output(model, MLP), values)


def test_what_would_write_to_an_offloaded_weight(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"r": 2, "target_modules": ["0"]}
    message = "^0: accelerate offloads its weight, so hra_fx cannot fold or merge.*fold_checkpoint"
    overwritten = "accelerate offloads it, and would overwrite a trained copy with the base model's tensors"
    for way in OFFLOADS:
        model = placed(MLP.model(), MLP, way, tmp_path / way)
        refuses(
            model, FoldError, message, *(functools.partial(act, model) for act in (hra_fx.merge_adapter, hra_fx.fold))
        )
        biases = hra_fx.HRAConfig(**settings, bias="all")
        refuses(model, UnsupportedLayerError, overwritten, functools.partial(hra_fx.add_adapter, model, "b", biases))
        remove_hook_from_submodules(model)
        hra_fx.merge_adapter(model.to(CPU))  # new vectors are where their layers were executed
        assert close(output(hra_fx.fold(model), MLP), output(MLP.model(), MLP))
    base = placed(MLP.base(), MLP, "CPU", tmp_path)
    copies = hra_fx.HRAConfig(**settings, modules_to_save=["2"])
    refuses(base, UnsupportedLayerError, overwritten, lambda: hra_fx.transform(base, copies))


@pytest.mark.parametrize("way", ["CPU", "device map"])
def test_trained_copies_that_are_offloaded(way: str, tmp_path: Path) -> None:
    hra_fx.save_adapter(COPIES.model(), tmp_path / "adapter")
    wanted = output(COPIES.model(), COPIES)
    model = placed(COPIES.model(), COPIES, way, tmp_path / "offload")
    assert close(output(model, COPIES), wanted)
    message = "accelerate offloads its trained copies"
    refuses(
        model,
        AdapterError,
        message,
        lambda: hra_fx.disable_adapters(model),
        lambda: hra_fx.delete_adapter(model, "default"),
        lambda: hra_fx.save_adapter(model, tmp_path / "other"),
        lambda: hra_fx.load_adapter(model, tmp_path / "adapter"),
        lambda: hra_fx.save_as_lora(model, tmp_path / "lora"),
    )
    refuses(model, FoldError, message, lambda: hra_fx.fold(model))
    hra_fx.set_adapter(model, "default")  # exchanges nothing
    remove_hook_from_submodules(model)
    assert close(output(hra_fx.fold(model.to(CPU)), COPIES), wanted)


def test_a_model_with_hooks_is_not_traced() -> None:
    model, message = on_devices(MLP.base()), "trace=True: the model has a hook of accelerate, which a graph"
    refuses(model, AdapterError, message, lambda: hra_fx.transform(model, config("0"), trace=True))
