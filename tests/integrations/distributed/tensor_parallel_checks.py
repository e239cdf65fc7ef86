"""Tensor parallelism with two processes: the losses, gradients and files are those of one process."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from integrations.distributed.adapter_checks import close, turned_away
from integrations.distributed.spawned import Check
from integrations.distributed.split import SPLITS, Split
from integrations.distributed.trained import Case, loss_of, output, same, train, trained
from layers.quantized.bases import adapted
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, distribute_module, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.utils import clip_grad_norm_
from transformers import LlamaForCausalLM
from transformers.distributed import DistributedConfig

import hra_fx
from hra_fx.errors import AdapterError, FoldError, UnsupportedLayerError

MLP, LLAMA = SPLITS["mlp"], SPLITS["llama"]
ORDERS = (Split.after, Split.before)
#: Biases that are split already cannot be copied.
COPIES = ("biases", "copies")


def gradients(model: nn.Module, case: Case) -> dict[str, torch.Tensor]:
    x, labels = case.data()
    loss_of(model(x), labels).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in found.items()}


def losses_and_gradients(name: str, rank: int, folder: Path) -> None:
    split = SPLITS[name]
    alone, case = split.case.model(), split.case
    start, wanted, losses = trained(alone), gradients(split.case.model(), case), train(alone, case)
    assert max((start[key] - value).abs().max() for key, value in trained(alone).items()) > 1e-3
    for order in ORDERS[: 1 if name in COPIES else 2]:
        assert (output(order(split), case) - output(split.case.model(), case)).abs().max() < 1e-12
        same(wanted, gradients(order(split), case), within=1e-12)
        together = order(split)
        assert any(isinstance(p, DTensor) for p in together.parameters())
        assert train(together, case) == pytest.approx(losses, abs=1e-12), order
        same(trained(alone), trained(together), within=1e-12)


def pairs(rank: int, folder: Path) -> None:
    """Steps in sums and differences."""
    for split in (MLP, LLAMA):
        alone = split.case.model()
        losses = train(alone, split.case, pairs=True)
        for order in ORDERS:
            together = order(split)
            assert train(together, split.case, pairs=True) == pytest.approx(losses, abs=1e-12), order
            same(trained(alone), trained(together), within=1e-12)


def collectives(rank: int, folder: Path) -> None:
    """In numbers, of each process: those of the layer itself, and what the adapters add."""
    tokens, k, d, out = 8, 4, 16, 16
    for style, width, own_forward, own_backward, forward, backward in (
        (ColwiseParallel, d, [], [tokens * d], [], []),
        (RowwiseParallel, d // 2, [tokens * out], [], [tokens * k], [tokens * k, 2 * k * d // 2]),
    ):
        for has_adapter in (False, True):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(d, out, bias=False).double())
            if has_adapter:
                hra_fx.transform(model, hra_fx.HRAConfig(r=k, init_weights=False, target_modules=["0"]))
            parallelize_module(model, init_device_mesh("cpu", (2,)), {"0": style()})
            x = torch.randn(tokens, width, dtype=torch.float64, requires_grad=True)
            with Sent() as sent:
                y = model(x)
            assert sorted(sent.numbers) == sorted(own_forward + (forward if has_adapter else []))
            with Sent() as sent:
                y.sum().backward()
            assert sorted(sent.numbers) == sorted(own_backward + (backward if has_adapter else []))


class Sent(CommDebugMode):
    """The number of elements that this process gives to each collective."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.get_total_counts()
        found = super().__torch_dispatch__(func, types, args, kwargs)
        if self.get_total_counts() > before:
            self.numbers.append(args[0].numel())
        return found


def save_and_load(rank: int, folder: Path) -> None:
    for number, (name, split) in enumerate(SPLITS.items()):
        case = split.case
        wanted = output(case.model(), case)
        place = folder / str(number)
        hra_fx.save_adapter(split.after(), place)
        torch.distributed.barrier()
        alone = folder / f"{number} alone {rank}"
        hra_fx.save_adapter(case.model(), alone)
        assert (place / "adapter_config.json").read_text() == (alone / "adapter_config.json").read_text()
        same(load_file(place / "adapter_model.safetensors"), load_file(alone / "adapter_model.safetensors"))
        other = turned_away(split.after())
        assert not close(other, case, wanted), name
        assert close(hra_fx.load_adapter(other, place, is_trainable=True), case, wanted), name
        train(other, case, steps=1)
        assert not close(other, case, wanted), name
        if name not in COPIES:
            assert close(hra_fx.load_adapter(split.apply(case.base()), place), case, wanted), name


def checkpoints(rank: int, folder: Path) -> None:
    for number, split in enumerate(SPLITS.values()):
        for part in ("whole", "adapter"):
            options = StateDictOptions(ignore_frozen_params=part == "adapter")
            case, model = split.case, split.after()
            place = folder / f"{number} {part}"
            dcp.save(get_model_state_dict(model, options=options), checkpoint_id=place)
            other = turned_away(split.after())
            into = get_model_state_dict(other, options=options)
            dcp.load(into, checkpoint_id=place)
            set_model_state_dict(other, into, options=StateDictOptions(strict=part == "whole"))
            assert close(other, case, output(case.model(), case)), number
        full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        plain = turned_away(case.model())
        plain.load_state_dict(full)
        assert close(plain, case, output(case.model(), case))


def several_adapters(rank: int, folder: Path) -> None:
    """Adapters are added, trained, combined, scaled, disabled and deleted in a model that is split already."""
    case, results = MLP.case, []
    for model in (case.model(), MLP.after(), MLP.before()):
        torch.manual_seed(5)
        hra_fx.add_adapter(model, "b", hra_fx.HRAConfig(r=2, init_weights=False, target_modules=["0", "2"]))
        hra_fx.set_adapter(model, ["b", "default"])
        found = [output(model, case), torch.tensor(train(model, case))]
        hra_fx.combine(model, ["b", "default"], "both")
        hra_fx.set_adapter(model, "both")
        hra_fx.set_scale(model, "b", 0.5)
        found.append(output(model, case))
        hra_fx.set_adapter(model, "b")
        found.append(output(model, case))
        hra_fx.set_adapter(model, "default")
        hra_fx.delete_adapter(model, "b")
        found.append(output(model, case))
        with hra_fx.disable_adapters(model):
            found.append(output(model, case))
        results.append(found)
    for other in results[1:]:
        assert all((one - two).abs().max() < 1e-12 for one, two in zip(results[0], other, strict=True))


def regularizer(rank: int, folder: Path) -> None:
    def term(model: nn.Module) -> Any:
        return 0.1 * hra_fx.orthogonality_loss(model)

    alone = MLP.case.model()
    losses = train(alone, MLP.case, term=term)
    for order in ORDERS:
        model = order(MLP)
        assert train(model, MLP.case, term=term) == pytest.approx(losses, abs=1e-12)
        same(trained(alone), trained(model), within=1e-12)
        clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)


def reported(rank: int, folder: Path) -> None:
    """By one process alone: vectors are whole, and the share of a weight that is split is not known."""
    model, alone = MLP.after(), MLP.case.model()
    if rank == 1:
        for row, wanted in zip(hra_fx.report(model).rows, hra_fx.report(alone).rows, strict=True):
            assert (row.rotation, row.angle, row.r) == (wanted.rotation, wanted.angle, wanted.r)
            assert row.share != row.share
        hra_fx.visualize(model, folder / "model.dot")
        assert repr(model[0].weight) and model[0].weight.shape == (16, 8)  # type: ignore[index]


def vectors_of_the_first(rank: int, folder: Path) -> None:
    """Processes that drew other vectors get those of the first, as they get its weights."""
    config = hra_fx.HRAConfig(r=3, target_modules=["0", "2"])
    for order in ("after", "before"):
        model = MLP.case.base()
        torch.manual_seed(rank)
        if order == "before":
            MLP.apply(model)
        hra_fx.transform(model, config)
        if order == "after":
            MLP.apply(model)
        state = {name: tensor for name, tensor in model.state_dict().items() if ".hra_u." in name}
        assert len(state) == 4
        every: list[Any] = [None, None]
        torch.distributed.all_gather_object(every, state)
        same(every[0], every[1], within=1e-300)


def merged_then_split(rank: int, folder: Path) -> None:
    case, model = MLP.case, MLP.case.model()
    hra_fx.merge_adapter(model)
    MLP.apply(model)
    assert close(model, case, output(case.model(), case))
    hra_fx.unmerge_adapter(model)
    assert close(model, case, output(case.model(), case))
    with hra_fx.disable_adapters(model):
        assert close(model, case, output(case.base(), case))


class Reader(nn.Module):
    """Reads the weight of its layer as torch functions do, in place of calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x: Any) -> Any:
        return nn.functional.linear(x, self.layer.weight, self.layer.bias)


def other_readers(rank: int, folder: Path) -> None:
    """`layer.weight` is `W Q`, with gradients, where it is split by rows or by columns."""
    mesh = init_device_mesh("cpu", (2,))
    x = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for style in (ColwiseParallel, RowwiseParallel):
        models = []
        for split in (False, True):
            torch.manual_seed(0)
            model = hra_fx.transform(
                Reader().double(), hra_fx.HRAConfig(r=3, init_weights=False, target_modules=["layer"])
            )
            models.append(parallelize_module(model, mesh, {"layer": style()}) if split else model)
        alone, together = models
        y = together(DTensor.from_local(x, mesh, [Replicate()])).full_tensor()
        assert (y - alone(x)).abs().max() < 1e-12
        assert close_without_gradients(together, mesh, x, y)
        alone(x).square().sum().backward()
        y.square().sum().backward()
        assert (together.layer.hra_u["default"].grad - alone.layer.hra_u["default"].grad).abs().max() < 1e-12


def close_without_gradients(model: nn.Module, mesh: Any, x: torch.Tensor, wanted: torch.Tensor) -> bool:
    with torch.no_grad():
        return bool((model(DTensor.from_local(x, mesh, [Replicate()])).full_tensor() - wanted).abs().max() < 1e-12)


def as_lora(rank: int, folder: Path) -> None:
    alone = hra_fx.convert_to_lora(MLP.case.model())[1]
    for place, order in enumerate(ORDERS):
        model = order(MLP)
        hra_fx.save_as_lora(model, folder / str(place))
        found = load_file(folder / str(place) / "adapter_model.safetensors")
        assert found.keys() == alone.keys() and all(torch.equal(found[key], alone[key]) for key in alone)
        assert close(model.eval(), MLP.case, output(MLP.case.model(), MLP.case))


def refused(rank: int, folder: Path) -> None:
    """What needs whole weights; the model is as it was."""
    case = MLP.case
    wanted = output(case.model(), case)
    for order in ORDERS:
        model = order(MLP).eval()
        names = [name for name, _ in model.named_parameters()]
        message = r"^0: tensor parallelism shards its parameters.*Save the adapter"
        for call in (hra_fx.fold, hra_fx.plan_fold, hra_fx.merge_adapter):
            with pytest.raises(FoldError, match=message):
                call(model)
        with pytest.raises(AdapterError, match=r"^0: tensor parallelism has sharded .* needs an unsharded model"):
            hra_fx.mixed_batch(model, ["default"] * 8).__enter__()
        assert [name for name, _ in model.named_parameters()] == names
        assert close(model, case, wanted)


class OwnForward(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T


def refused_layers(rank: int, folder: Path) -> None:
    """A layer that cannot be split, or adapted once it is, named in the message; the model is as it was."""
    mesh = init_device_mesh("cpu", (2,))
    own = nn.Sequential(OwnForward(8, 4, bias=False)).double()
    config = hra_fx.HRAConfig(r=2, init_weights=False, target_modules=["0"])
    x = torch.randn(5, 8, dtype=torch.float64)
    model = hra_fx.transform(own, config)
    wanted = model(x)
    message = r"^Linear 8->4: tensor parallelism supports only adapted nn\.Linear layers, got OwnForward\. Leave it out"
    with pytest.raises(UnsupportedLayerError, match=message):
        parallelize_module(model, mesh, {"0": ColwiseParallel()})
    assert (model(x) - wanted).abs().max() == 0
    convolution = hra_fx.transform(nn.Sequential(nn.Conv2d(2, 4, 3)), config)
    with pytest.raises(UnsupportedLayerError, match=r"^Conv2d 2->4 3x3: .* got Conv2d\. Leave it out of the plan"):
        distribute_module(convolution[0], mesh)
    split = parallelize_module(nn.Sequential(OwnForward(8, 4, bias=False)), mesh, {"0": ColwiseParallel()})
    with pytest.raises(UnsupportedLayerError, match=r"^0 \(OwnForward\): tensor parallelism .* Exclude the layer"):
        hra_fx.transform(split, config)
    assert not hasattr(split[0], "hra_u")
    packed = adapted("ao int8")
    names = [name for name, _ in packed.named_parameters()]
    with pytest.raises(UnsupportedLayerError, match=r"^Linear 64->.*: its weight is quantized .* Leave it out"):
        parallelize_module(packed, mesh, {"0": ColwiseParallel()})
    assert [name for name, _ in packed.named_parameters()] == names
    by_hand = nn.Sequential(nn.Linear(8, 4, bias=False))
    by_hand[0].weight = nn.Parameter(distribute_tensor(by_hand[0].weight.detach(), mesh, [Replicate()]))
    with pytest.raises(UnsupportedLayerError, match=r"^0 \(Linear\): its weight is a DTensor that was not split"):
        hra_fx.transform(by_hand, config)
    with pytest.raises(UnsupportedLayerError, match=r"^0 \(Linear\): its bias is a DTensor, which cannot be copied"):
        SPLITS["biases"].before()


def interrupted(rank: int, folder: Path) -> None:
    """A layer that `parallelize_module` left half done does not run without its adapters; reading its mark is safe."""
    model: Any = MLP.case.model()
    assert model[0]._distribute_module_applied is False
    assert close(model, MLP.case, output(MLP.case.model(), MLP.case))

    def fail(name: str, module: nn.Module, mesh: Any) -> None:
        raise ValueError("out of memory")

    with pytest.raises(ValueError, match="out of memory"):
        distribute_module(model[0], init_device_mesh("cpu", (2,)), fail)
    with pytest.raises(
        UnsupportedLayerError, match=r"^Linear 8->16: parallelize_module failed.* Build the model again"
    ):
        model(MLP.case.data()[0])


def compiled(rank: int, folder: Path) -> None:
    alone = MLP.case.model()
    losses = train(alone, MLP.case)
    for order in ORDERS:
        model = order(MLP)
        assert train(torch.compile(model, backend="aot_eager"), MLP.case) == pytest.approx(losses, abs=1e-12)


def loaded(folder: Path, rank: int, plan: str | dict[str, str] = "auto") -> Any:
    """A Llama that transformers splits while it loads it."""
    if rank == 0:
        LLAMA.case.base().save_pretrained(folder / "base")  # type: ignore[operator]
    torch.distributed.barrier()
    config = DistributedConfig(tp_size=2, tp_plan=plan)
    return LlamaForCausalLM.from_pretrained(folder / "base", distributed_config=config, dtype=torch.float64)


def transformers_plan(rank: int, folder: Path) -> None:
    """`tp_plan`: with gradients transformers passes DTensors to a layer, without gradients local tensors."""
    case, alone = LLAMA.case, LLAMA.case.model()
    x, _ = case.data()
    wanted, losses = output(alone, case), train(alone, case)
    tokens = alone.generate(x, max_new_tokens=5, do_sample=False)  # type: ignore[operator]
    plan = {
        "model.layers.*.mlp.down_proj": "rowwise_split_input",
        "model.layers.*.mlp.up_proj": "colwise_gather_output",
    }
    for given in ("auto", {**plan, "model.layers.*.mlp.gate_proj": "colwise_gather_output"}):
        model = dataclasses.replace(case, make=functools.partial(loaded, folder, rank, given)).model()
        assert isinstance(model.get_submodule("model.layers.0.mlp.down_proj").hra_base, DTensor)
        assert close(model, case, wanted)
        with hra_fx.disable_adapters(model):
            assert close(model, case, output(case.base(), case))
        assert train(model, case) == pytest.approx(losses, abs=1e-12)
        same(trained(alone), trained(model), within=1e-12)
        assert torch.equal(model.generate(x, max_new_tokens=5, do_sample=False), tokens)  # type: ignore[operator]
        hra_fx.save_adapter(model, folder / "adapter")
        torch.distributed.barrier()
        assert close(hra_fx.load_adapter(case.base(), folder / "adapter"), case, output(alone, case))
        again = hra_fx.load_adapter(loaded(folder, rank, given), folder / "adapter")
        assert close(again, case, output(alone, case))
        hra_fx.delete_adapter(model, "default")
        assert close(model, case, output(case.base(), case))


def transformers_refused(rank: int, folder: Path) -> None:
    """Styles that split in another way; the model is as it was."""
    model = loaded(folder, rank, {"model.layers.*.mlp.up_proj": "packed_colwise"})
    before = model.model.layers[0].mlp.up_proj.forward
    with pytest.raises(
        UnsupportedLayerError, match=r"^model\.layers\.0\.mlp\.up_proj \(Linear\): its `forward` is set"
    ):
        hra_fx.transform(model, hra_fx.HRAConfig(r=2, target_modules=["q_proj", "up_proj"]))
    assert model.model.layers[0].mlp.up_proj.forward is before
    assert not any(".hra_u" in name for name, _ in model.named_modules())


CHECKS: dict[str, Check] = {
    **{f"losses and gradients: {name}": functools.partial(losses_and_gradients, name) for name in SPLITS},
    **{"pairs": pairs, "collectives": collectives, "save and load": save_and_load, "checkpoints": checkpoints},
    **{"several adapters": several_adapters, "regularizer": regularizer, "reported": reported},
    **{"vectors of the first": vectors_of_the_first, "merged, then split": merged_then_split},
    **{"other readers": other_readers, "as LoRA": as_lora, "refused": refused, "refused layers": refused_layers},
    **{"interrupted": interrupted, "compiled": compiled},
    **{"transformers' plan": transformers_plan, "transformers, refused": transformers_refused},
}
