"""What the public functions do with a model that two processes share."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import HFValidationError
from integrations.distributed.matrix_checks import close, on_meta, with_weights
from integrations.distributed.spawned import Check
from integrations.distributed.trained import CASES, EXPERTS, F64, WAYS, output, part_of, same, shard, train, trained
from one_hub import one_hub
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import hra_fx
from hra_fx.errors import AdapterError, CheckpointError, FoldError, UnsupportedLayerError

MLP, COPIES = CASES["mlp, whole"], CASES["mlp, copies"]


def who_writes(rank: int, folder: Path) -> None:
    """Sharded: each process names a folder of its own, and only that of the first is made; all get its error.

    Under DDP a process saves alone; no other is waited for.
    """
    hra_fx.save_adapter(WAYS["FSDP2, parts"](MLP, MLP.model()), folder / str(rank))
    assert (folder / str(rank)).exists() is (rank == 0)
    (folder / "file").write_text("")
    with pytest.raises(CheckpointError, match="file: cannot write "):
        hra_fx.save_adapter(WAYS["FSDP2, parts"](MLP, MLP.model()), folder / "file")
    with pytest.raises(CheckpointError, match="file: cannot write "):
        hra_fx.save_as_lora(shard(MLP.model()), folder / "file")
    model = DistributedDataParallel(MLP.model())
    if rank == 1:
        hra_fx.save_adapter(model, folder / "one")
        assert close(hra_fx.load_adapter(MLP.base(), folder / "one"), MLP, output(MLP.model(), MLP))


def save_pretrained(rank: int, folder: Path) -> None:
    """As the Trainer calls it: the folder of a checkpoint, and only one main process."""
    llama = CASES["llama"]
    model: Any = shard(llama.model(), llama.units)
    model.save_pretrained(folder / "checkpoint-1", is_main_process=rank == 0)
    assert (folder / "checkpoint-1" / "model.safetensors").exists()
    entries = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    model.save_pretrained(folder / "given", is_main_process=rank == 0, state_dict=entries)
    torch.distributed.barrier()
    for saved in ("checkpoint-1", "given"):
        assert close(hra_fx.load_adapter(llama.base(), folder / saved), llama, output(llama.model(), llama))
    # Each process has a Hub of its own: the first one uploads, and all get the URL and the error.
    with one_hub() as files:
        url = hra_fx.push_to_hub(model, "user/name", token="hf_x")
        assert bool(files) is (rank == 0) and url.endswith("/user/name/commit/1")
    with one_hub(), pytest.raises(HFValidationError):
        hra_fx.push_to_hub(model, "not/a/name", token="hf_x")


def strength_and_disabling(rank: int, folder: Path) -> None:
    half, whole, base = MLP.model(), output(MLP.model(), MLP), output(MLP.base(), MLP)
    hra_fx.set_scale(half, "default", 0.5)
    for wrap in WAYS.values():
        model = wrap(MLP, MLP.model())
        with hra_fx.disable_adapters(model):
            assert close(model, MLP, base)
        assert close(model, MLP, whole)
        hra_fx.set_scale(model, "default", 0.5)
        assert close(model, MLP, output(half, MLP))
        hra_fx.save_adapter(model, folder / str(rank))
        if rank == 0:
            assert close(hra_fx.load_adapter(MLP.base(), folder / "0"), MLP, output(half, MLP))
        hra_fx.set_scale(model, "default", 1.0)
        assert close(model, MLP, whole)


def pictures(rank: int, folder: Path) -> None:
    """By one process alone: nothing is gathered for it. Numbers need what all processes have gathered."""
    bare, model = MLP.model(), shard(MLP.model())
    if rank == 1:
        hra_fx.visualize(model, folder / "shared.svg")
        assert hra_fx.to_networkx(model).number_of_edges() == 6
        assert hra_fx.report(model).rows[0].angle != hra_fx.report(bare).rows[0].angle
    output(model, MLP)
    model.unshard()
    assert hra_fx.report(model).rows[0].angle == hra_fx.report(bare).rows[0].angle


def fold_under_ddp(rank: int, folder: Path) -> None:
    wanted = output(COPIES.model(), COPIES)
    model = DistributedDataParallel(COPIES.model())
    hra_fx.merge_adapter(model)
    assert close(model, COPIES, wanted)
    hra_fx.unmerge_adapter(model)
    assert close(model, COPIES, wanted)
    assert close(hra_fx.fold(model), COPIES, wanted)
    assert list(model.module.state_dict()) == list(COPIES.base().state_dict())


def wrap_one(model: nn.Module) -> nn.Module:
    """Where another part alone is sharded, new vectors would not be averaged either."""
    fully_shard(model.get_submodule("4"))
    return model


def refused_when_sharded(rank: int, folder: Path) -> None:
    config = hra_fx.HRAConfig(r=2, target_modules=["0", "2"])
    hra_fx.save_adapter(MLP.model(), folder / str(rank))
    for wrap in (WAYS["FSDP2, whole"], WAYS["FSDP2, every layer"], lambda case, model: wrap_one(model)):
        plain = MLP.model()
        hra_fx.add_adapter(plain, "b", config)
        model, wanted = wrap(MLP, plain), output(MLP.model(), MLP)
        names = {name for name, _ in model.named_parameters()}
        first = "the model" if isinstance(model, FSDPModule) else "4"
        message = rf"^{first}: fully_shard has sharded its parameters, so hra_fx cannot remove its adapters\. Add, remo"
        for when in ("sharded", "gathered"):
            for refused in (hra_fx.fold, hra_fx.merge_adapter) if isinstance(model, FSDPModule) else ():
                with pytest.raises(FoldError, match=r"fully_shard has sharded its parameters.*save the adapter"):
                    refused(model)
            with pytest.raises(AdapterError, match=rf"^{first}: fully_shard has .* cannot add adapter 'c'"):
                hra_fx.add_adapter(model, "c", config)
            with pytest.raises(UnsupportedLayerError, match=r"Adapt the model first"):
                hra_fx.load_adapter(model, folder / str(rank), "c")
            with pytest.raises(AdapterError, match=message):
                hra_fx.delete_adapter(model, "default")
            assert {name for name, _ in model.named_parameters()} == names
            assert close(model, MLP, wanted), when
    for sharded in (shard(MLP.base()), wrap_one(MLP.base())):
        with pytest.raises(UnsupportedLayerError, match=r"fully_shard"):
            hra_fx.transform(sharded, config)


def under_ddp(rank: int, folder: Path) -> None:
    """A model is adapted before it is wrapped."""
    config = hra_fx.HRAConfig(r=2, target_modules=["0", "2"])
    with pytest.raises(
        UnsupportedLayerError, match=r"DistributedDataParallel does not synchronize.*Adapt the model first"
    ):
        hra_fx.transform(DistributedDataParallel(MLP.base()), config)


def refused_when_split(rank: int, folder: Path) -> None:
    """Tensor parallelism, before and after the model is adapted."""
    mesh, plan, message = (
        init_device_mesh("cpu", (2,)),
        {"0": ColwiseParallel()},
        r"^0.*: tensor parallelism splits its",
    )
    split = parallelize_module(MLP.base(), mesh, plan)
    with pytest.raises(UnsupportedLayerError, match=rf"{message}.*FSDP2 or DDP.* For inference, call hra_fx\.fold"):
        hra_fx.transform(split, hra_fx.HRAConfig(r=2, target_modules=["0", "2"]))
    assert not any("hra_u" in name for name, _ in split.named_parameters())
    model = MLP.model()
    with pytest.raises(UnsupportedLayerError, match=message):
        parallelize_module(model, mesh, plan)
    assert close(model, MLP, output(MLP.model(), MLP))


def refused_copies(rank: int, folder: Path) -> None:
    """FSDP2 puts back the parameters that it found, so trained copies cannot change places."""
    model = shard(COPIES.model(), COPIES.units)
    output(model, COPIES)
    message = "fully_shard has sharded its parameters, so hra_fx cannot switch its trained copies"
    with pytest.raises(AdapterError, match=message), hra_fx.disable_adapters(model):
        pass
    with pytest.raises(AdapterError, match=message):
        hra_fx.set_adapter(model, [])
    hra_fx.set_adapter(model, "default")
    assert close(model, COPIES, output(COPIES.model(), COPIES))


def flat_shards(rank: int, folder: Path) -> None:
    """FSDP1 trains too, and leaves base weights alone; between its calls it holds flat pieces of vectors.

    Without `use_orig_params`, it shards only what is trained.
    """
    alone = MLP.model()
    hra_fx.protect(alone, [MLP.data()[0]], 2)
    start = copy.deepcopy(alone)
    losses, device = train(alone, MLP), torch.device("cpu")
    whole, full = ShardingStrategy.NO_SHARD, ShardingStrategy.FULL_SHARD
    for strategy, original in ((full, False), (whole, True), (full, True)):
        own = copy.deepcopy(start)
        frozen = None if original else [p for p in own.parameters() if not p.requires_grad]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # NO_SHARD, which one process alone gets, is deprecated
            model = FullyShardedDataParallel(
                own, device_id=device, use_orig_params=original, sharding_strategy=strategy, ignored_states=frozen
            )
        assert train(model, MLP, part_of(rank)) == pytest.approx(losses, abs=1e-13)
        with FullyShardedDataParallel.summon_full_params(model):
            base = {name: tensor for name, tensor in model.module.state_dict().items() if ".hra_u." not in name}
            assert all(torch.equal(tensor, MLP.base().state_dict()[name]) for name, tensor in base.items())
    hra_fx.save_adapter(MLP.model(), folder / str(rank))
    calls: list[tuple[type[Exception], Callable[[], object]]] = [
        (AdapterError, lambda: hra_fx.save_adapter(model, folder / "other")),
        (AdapterError, lambda: hra_fx.load_adapter(model, folder / str(rank))),
        (AdapterError, lambda: hra_fx.set_scale(model, "default", 0.5)),
        (AdapterError, lambda: hra_fx.orthogonality_loss(model)),
        (FoldError, lambda: hra_fx.fold(model)),
    ]
    for kind, call in calls:
        with pytest.raises(kind, match=r"flat part of its vectors .*summon_full_params|has sharded its par"):
            call()


def without_memory(rank: int, folder: Path) -> None:
    case = CASES["mlp, odd rank"]
    hra_fx.save_adapter(case.model(), folder / str(rank))
    model = on_meta(case, "FSDP2, whole")
    calls: list[Callable[[], object]] = [
        lambda: hra_fx.reset_adapters(model),
        lambda: hra_fx.load_adapter(model, folder / str(rank)),
    ]
    for call in calls:
        with pytest.raises(
            AdapterError, match=r"^0: its vectors are sharded and on the meta device, .* Call model\.to_e"
        ):
            call()
    assert all(parameter.is_meta for parameter in model.parameters())
    model = with_weights(on_meta(COPIES, "FSDP2, parts"), COPIES, rank, broadcast=False)
    with pytest.raises(AdapterError, match=r"has trained copies .* which start from the base"):
        hra_fx.reset_adapters(model)


def report_of_this_rank(rank: int, folder: Path) -> None:
    """Shards have no angles."""
    model = nn.Sequential(nn.Linear(9, 4, dtype=F64), nn.Linear(4, 2, dtype=F64)).to("meta")
    fully_shard(hra_fx.transform(model, hra_fx.HRAConfig(r=2, target_modules=["0"])))
    for _ in range(2):
        (row,) = hra_fx.report(model)
        assert (row.parameters, row.angle, row.weight_change) == (18, None, None)
        model.to_empty(device="cpu")


def distance_to_own_texts(rank: int, folder: Path) -> None:
    """All processes write the same texts; a part of them in each gives the steps of one process."""
    llama = CASES["llama"]
    alone = llama.model()
    (samples,) = hra_fx.own_texts(alone, 4, 6)
    ids = samples["input_ids"]

    def trained_on(model: nn.Module, part: slice) -> list[float]:
        return train(model, llama, part, 2, term=lambda model: 1e4 * hra_fx.distance_to_base(model, ids[part]))

    losses = trained_on(alone, slice(None))
    assert max(abs(a - b) for a, b in zip(losses, train(llama.model(), llama, steps=2), strict=True)) > 1e-6
    for way, share in WAYS.items():
        model = share(llama, llama.model())
        assert torch.equal(hra_fx.own_texts(model, 4, 6)[0]["input_ids"], ids), way
        assert trained_on(model, part_of(rank)) == pytest.approx(losses, abs=1e-10), way
        same(trained(alone), trained(model), within=1e-9)


# ---- training: the losses and the vectors are those of one process ----


def several_adapters(rank: int, folder: Path) -> None:
    """FSDP2 trains an adapter that is set later; a model under DDP is wrapped again."""
    found = []
    for wrap in (lambda model: model, DistributedDataParallel, lambda model: shard(model, MLP.units)):
        model = MLP.model()
        torch.manual_seed(5)
        hra_fx.add_adapter(model, "b", hra_fx.HRAConfig(r=2, init_weights=False, target_modules=["0", "2"]))
        wrapped = wrap(model)
        part = part_of(rank) if found else slice(None)
        losses = train(wrapped, MLP, part, steps=2)
        output(wrapped, MLP)  # which leaves FSDP2 with whole parameters
        hra_fx.set_adapter(wrapped, ["b", "default"])
        wrapped = DistributedDataParallel(model) if wrap is DistributedDataParallel else wrapped
        found.append((losses + train(wrapped, MLP, part, steps=2), trained(wrapped)))
    (losses, vectors), *others = found
    assert {"0.hra_u.b", "4.hra_u.default"} <= vectors.keys()
    for other, together in others:
        assert other == pytest.approx(losses, abs=1e-13)
        same(vectors, together)


def mixed_precision(rank: int, folder: Path) -> None:
    """FSDP2 gathers the vectors in the narrow dtype, unless they are a group of their own."""
    wanted = output(MLP.model(), MLP)
    model = MLP.model().float()
    for layer in (model.get_submodule(path) for path in MLP.units):
        policy = MixedPrecisionPolicy(param_dtype=torch.float32, cast_forward_inputs=False)
        fully_shard(layer.get_submodule("hra_u"), mp_policy=policy)
    fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    with torch.no_grad():
        found = model(MLP.data()[0].float())
    assert found.dtype == torch.bfloat16
    assert (found.to(F64) - wanted).abs().max() < 2e-2


def different_samples(rank: int, folder: Path) -> None:
    """Padded batches of different numbers and lengths give what all texts give one process, in all processes."""
    ids = torch.randint(1, 19, (5, 6), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([2, 2, 3, 1, 4])
    mask = (torch.arange(6) < lengths[:, None]).long()
    texts = [{"input_ids": row[None, :length]} for row, length in zip(ids, lengths.tolist(), strict=True)]
    batches = [{"input_ids": ids[rows], "attention_mask": mask[rows]} for rows in ([0, 1, 2], [3], [4])]
    for case, units in ((CASES["llama"], None), (CASES["llama"], CASES["llama"].units), (EXPERTS, EXPERTS.units)):
        alone = case.model()
        wanted = hra_fx.protect(alone, texts, 8 if case is EXPERTS else 4)
        model = case.model()
        wrapped = DistributedDataParallel(model) if units is None else shard(model, units)
        with pytest.raises(AdapterError, match=r"^`samples` is empty in this process or another one\."):
            hra_fx.protect(wrapped, batches if rank == 0 else [], 4)
        found = hra_fx.protect(wrapped, batches[:2] if rank == 0 else batches[2:], 8 if case is EXPERTS else 4)
        for path, basis in found.directions.items():
            own = basis.clone()
            distributed.broadcast(own, src=0)
            assert torch.equal(own, basis)
            torch.testing.assert_close(basis @ basis.mT, wanted.directions[path] @ wanted.directions[path].mT)
            assert found.shares[path] == pytest.approx(wanted.shares[path])
        same(trained(alone), trained(wrapped))
        before = output(wrapped, case)
        hra_fx.unprotect(wrapped)
        assert close(wrapped, case, before)


CHECKS: dict[str, Check] = {
    check.__name__: check
    for check in (
        *(who_writes, save_pretrained, strength_and_disabling, pictures, fold_under_ddp, under_ddp),
        *(refused_when_sharded, refused_copies, refused_when_split, flat_shards, without_memory, report_of_this_rank),
        distance_to_own_texts,
    )
}
TRAINING_CHECKS: dict[str, Check] = {
    check.__name__: check for check in (several_adapters, mixed_precision, different_samples)
}
