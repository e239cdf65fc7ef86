"""What holds however processes share a model: it computes, trains and writes what one process does.

Each check is an action for one model in one of the ways to share it.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from integrations.distributed.spawned import Check
from integrations.distributed.trained import (
    CASES,
    EXPERTS,
    F64,
    WAYS,
    Case,
    output,
    part_of,
    same,
    train,
    trained,
)
from safetensors.torch import load_file
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

import hra_fx

#: Arguments of `train`.
EVERY: tuple[dict[str, Any], ...] = (
    *({}, {"protect": 2}, {"term": lambda model: 0.1 * hra_fx.orthogonality_loss(model)}),
    *({"evaluate": True}, {"compiled": True}),
)


def close(model: nn.Module, case: Case, wanted: Tensor) -> bool:
    return bool((output(model, case) - wanted).abs().max() < 1e-13)


def shared(case: Case, way: str) -> nn.Module:
    return WAYS[way](case, case.model())


def turned_away(model: nn.Module) -> nn.Module:
    """With other values, which a load has to replace."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(-1.5).add_(0.1)
    return model


def trains(name: str, way: str, rank: int, folder: Path) -> None:
    """In all ways of training for one model and three ways to share it."""
    # TorchDynamo breaks the graph at the hooks of a group, and reads it of what it finds there.
    warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor that is not a leaf", UserWarning)
    case = CASES[name]
    for training in EVERY if name == "mlp, whole" and way in EVERY_WAY else ({},):
        options = {key: value for key, value in training.items() if key != "compiled"}
        alone, together = case.model(), shared(case, way)
        losses = train(alone, case, **options)
        run = torch.compile(together, backend="aot_eager") if "compiled" in training else together
        found = train(run, case, part_of(rank), **options)
        assert max(abs(a - b) for a, b in zip(found, losses, strict=True)) < 1e-13, training
        same(trained(alone), trained(together))


def files(name: str, way: str, rank: int, folder: Path) -> None:
    """An adapter is saved as by one process, loaded into a shared model, and trained on."""
    case, own = CASES[name], folder / f"alone {rank}"
    wanted = output(case.model(), case)
    hra_fx.save_adapter(shared(case, way), folder / "shared")
    distributed.barrier()
    hra_fx.save_adapter(case.model(), own)
    assert (folder / "shared" / "adapter_config.json").read_text() == (own / "adapter_config.json").read_text()
    same(*(load_file(place / "adapter_model.safetensors") for place in (folder / "shared", own)))
    assert close(hra_fx.load_adapter(case.base(), folder / "shared"), case, wanted)
    other = turned_away(shared(case, way))
    assert not close(other, case, wanted)
    assert close(hra_fx.load_adapter(other, folder / "shared", is_trainable=True), case, wanted)
    train(other, case, part_of(rank), steps=1)
    assert not close(other, case, wanted)


def checkpoints(name: str, way: str, rank: int, folder: Path) -> None:
    """All of the state, that of the adapter alone, and all of it in each process."""
    case = CASES[name]
    wanted = output(case.model(), case)
    for part in ("whole", "adapter"):
        options, model = StateDictOptions(ignore_frozen_params=part == "adapter"), shared(case, way)
        state = get_model_state_dict(model, options=options)
        own = {key.removeprefix("module.") for key, p in model.named_parameters() if p.requires_grad}
        assert part == "whole" or set(state) == own
        dcp.save(state, checkpoint_id=folder / part)
        other = turned_away(shared(case, way))
        into = get_model_state_dict(other, options=options)
        dcp.load(into, checkpoint_id=folder / part)
        set_model_state_dict(other, into, options=StateDictOptions(strict=part == "whole"))
        assert close(other, case, wanted), part
    full = StateDictOptions(full_state_dict=True)
    plain, other = turned_away(case.model()), turned_away(shared(case, way))
    plain.load_state_dict(get_model_state_dict(model, options=full))
    set_model_state_dict(other, plain.state_dict(), options=full)
    assert close(plain, case, wanted) and close(other, case, wanted)


def resumes(name: str, way: str, rank: int, folder: Path) -> None:
    """Six steps are three, and three in another model, bit by bit; with protected directions."""
    case, part = CASES[name], part_of(rank)
    if way == "FSDP1":
        warnings.simplefilter("ignore")  # torch calls what it deprecates

    def made(samples: slice) -> tuple[nn.Module, torch.optim.Optimizer]:
        own = case.model()
        hra_fx.protect(own, [case.data()[0][samples]], 1)
        cpu = torch.device("cpu")
        flat = way == "FSDP1"
        model = FullyShardedDataParallel(own, device_id=cpu, use_orig_params=True) if flat else WAYS[way](case, own)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return model, torch.optim.AdamW(trainable, lr=0.01, foreach=False)

    whole, optimizer = made(slice(2))
    train(whole, case, part, 6, optimizer=optimizer)
    model, optimizer = made(slice(2))
    train(model, case, part, 3, optimizer=optimizer)
    again, other = made(slice(2, 4))
    turned_away(again)
    for one, own in ((model, optimizer), (again, other)):
        states = dict(zip(("model", "optimizer"), get_state_dict(one, own), strict=True))
        (dcp.save if one is model else dcp.load)(states, checkpoint_id=folder)
    set_state_dict(again, other, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    train(again, case, part, 3, optimizer=other)
    wanted, found = trained(whole), trained(again)
    assert found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert torch.equal(output(again, case), output(whole, case))


def as_lora(name: str, way: str, rank: int, folder: Path) -> None:
    """Gathered layer by layer; the first process writes."""
    case = EXPERTS if name == "experts" else CASES[name]
    alone = hra_fx.save_as_lora(case.model(), folder / f"alone {rank}")
    wanted = load_file(alone.path / "adapter_model.safetensors")
    model = shared(case, way)
    parameters = dict(model.named_parameters())
    result = hra_fx.save_as_lora(model, folder / "shared")
    assert result.errors == alone.errors
    found = load_file(result.path / "adapter_model.safetensors")
    assert all(p is parameters[key] for key, p in model.named_parameters())
    assert close(model, case, output(case.model(), case))
    for tensors in (found, hra_fx.convert_to_lora(model)[1]):  # then from what a forward has gathered
        assert tensors.keys() == wanted.keys()
        assert all(torch.equal(tensors[key], wanted[key]) for key in wanted)


def on_meta(case: Case, way: str) -> nn.Module:
    """Built and adapted on the meta device, then shared."""
    with torch.device("meta"):
        model = case.make().to(F64)
    return WAYS[way](case, hra_fx.transform(model, hra_fx.HRAConfig(**{"r": 4, **case.config})))


def with_weights(model: nn.Module, case: Case, rank: int, *, broadcast: bool) -> nn.Module:
    """Memory and the weights of the base model, which one process or all have."""
    model.to_empty(device="cpu")
    base = case.base()
    options = StateDictOptions(full_state_dict=True, strict=False, broadcast_from_rank0=broadcast)
    set_model_state_dict(model, base.state_dict() if rank == 0 or not broadcast else {}, options=options)
    return model


def from_meta(name: str, way: str, rank: int, folder: Path) -> None:
    """A model without data gets memory, weights and the start, or the file, of one process."""
    case = CASES[name]
    base = case.base()
    torch.manual_seed(7)
    alone = hra_fx.transform(base, hra_fx.HRAConfig(**{"r": 4, **case.config}))
    wanted = {key: tensor.clone() for key, tensor in alone.state_dict().items()}
    for broadcast in (False, True):
        model = with_weights(on_meta(case, way), case, rank, broadcast=broadcast)
        torch.manual_seed(7 + rank)  # the random numbers are those of the first process
        hra_fx.reset_adapters(model)
        found = {key: t.full_tensor() if isinstance(t, DTensor) else t for key, t in model.state_dict().items()}
        assert found.keys() == wanted.keys()
        assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == []
    losses = train(alone, case)
    assert max(abs(a - b) for a, b in zip(train(model, case, part_of(rank)), losses, strict=True)) < 1e-13
    same(trained(alone), trained(model))
    hra_fx.save_adapter(case.model(), folder / str(rank))
    model = with_weights(on_meta(case, way), case, rank, broadcast=False)
    hra_fx.load_adapter(model, folder / str(rank))
    assert close(model, case, output(case.model(), case))


#: The ways in which one model is trained with all arguments of `train`.
EVERY_WAY = ("DDP", "FSDP2, whole", "FSDP2, vectors apart")
LAYER, PARTS, WHOLE = "FSDP2, every layer", "FSDP2, parts", "FSDP2, whole"
#: Action -> the models, each in one of the ways; every kind of model and every way at least once.
MATRIX: dict[Callable[[str, str, int, Path], None], list[tuple[str, str]]] = {
    files: [
        *(("mlp, whole", "DDP"), ("mlp, copies", WHOLE), ("mlp, Gram-Schmidt", PARTS), ("attention", LAYER)),
        *(("mlp, copies", "FSDP2, kept whole"), ("mlp, whole", "FSDP2, vectors apart")),
    ],
    checkpoints: [
        *(("attention", "DDP"), ("mlp, Gram-Schmidt", WHOLE), ("mlp, copies", PARTS), ("mlp, whole", LAYER)),
        *(("attention", "FSDP2, kept whole"), ("mlp, Gram-Schmidt", "FSDP2, vectors apart")),
    ],
    resumes: [
        *(("mlp, whole", "DDP"), ("mlp, copies", PARTS), ("mlp, odd rank", LAYER), ("mlp, Gram-Schmidt", WHOLE)),
        *(("mlp, whole", "FSDP2, vectors apart"), ("mlp, odd rank", "FSDP1")),
    ],
    # The module that represents a parameter of the experts has no parameters to shard, so it is not wrapped separately.
    as_lora: [("llama", LAYER), ("mlp, copies", WHOLE), ("mlp, Gram-Schmidt", LAYER), ("experts", PARTS)],
    from_meta: [("mlp, odd rank", WHOLE), ("convolutions", LAYER), ("attention", PARTS)],
}
#: All ways for the MLPs, and some for models that take longer.
TRAINED = {
    trains: [
        (name, way)
        for number, name in enumerate(CASES)
        for way in (list(WAYS) if name.startswith("mlp") else list(WAYS)[number % 3 :: 3])
    ]
}


def checks(table: dict[Any, list[tuple[str, str]]]) -> dict[str, Check]:
    return {
        f"{action.__name__}: {name}, {way}": functools.partial(action, name, way)
        for action, pairs in table.items()
        for name, way in pairs
    }


CHECKS = checks(MATRIX)
TRAINING_CHECKS = checks(TRAINED)
