"""Training in two processes by hand: the losses and the vectors are those of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from integrations.distributed.spawned import Check
from integrations.distributed.trained import CASES, EXPERTS, F64, close, output, part_of, same, shard, train, trained
from torch import distributed
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import hra_fx
from hra_fx.errors import AdapterError

MLP = CASES["mlp, whole"]


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
        assert close(output(wrapped, case), before)


CHECKS: dict[str, Check] = {check.__name__: check for check in (several_adapters, mixed_precision, different_samples)}
