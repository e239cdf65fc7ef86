"""`distance_to_base` against logits of dense weights in float64, its gradients, and its term in a Trainer's loss."""

from __future__ import annotations

import copy
from itertools import cycle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from oracles import relative_error
from tiny import VOCABULARY, bert, llama, t5
from tiny_models import rotated, tokens_of, trainer_of
from torch import Tensor, nn
from transformers import BatchEncoding, Trainer

import hra_fx
from hra_fx.errors import AdapterError, ConfigError

# Names that transformers means to rename; PEFT uses them.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`((is_)?gradient_checkpointing\\w*|past_key_values)` is deprecated:FutureWarning"
)

F64 = torch.float64
FIELDS: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_weights": False}
IDS = tokens_of(3, 8)
#: Padding before a text, after a text, and none.
MASK = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0, 0], [1] * 8])


def adapted(base: nn.Module, **fields: Any) -> Any:
    return hra_fx.transform(base, hra_fx.HRAConfig(**FIELDS | fields))


def divergences(own: Tensor, base: Tensor) -> Tensor:
    """`KL(base || own)` for each token."""
    chances = base.softmax(-1)
    return (chances * (chances.log() - own.softmax(-1).log())).sum(-1)


def unpadded_mean(own: Any, base: Any) -> Tensor:
    """The mean over all tokens of the texts, each text by itself and without its padding."""
    found = [
        divergences(own(input_ids=row[mask.bool()][None]).logits, base(input_ids=row[mask.bool()][None]).logits)[0]
        for row, mask in zip(IDS, MASK, strict=True)
    ]
    return torch.cat(found).mean()


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: one for name, one in model.named_parameters() if one.requires_grad}


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: one.grad.clone() for name, one in trained(model).items() if one.grad is not None}


def test_the_mean_divergence_of_dense_weights() -> None:
    """With two active adapters. A batch with padding has the mean of its texts, weighted by their tokens."""
    base = llama().to(F64).eval()
    model = adapted(copy.deepcopy(base))
    hra_fx.add_adapter(model, "b", hra_fx.HRAConfig(**FIELDS | {"r": 3}))
    hra_fx.set_adapter(model, ["b", "default"])
    wanted = unpadded_mean(rotated(base, model, "b", "default"), base)
    assert wanted > 0.1
    positions = (MASK.cumsum(1) - 1).clamp(min=0)
    batch = {"input_ids": IDS, "attention_mask": MASK, "position_ids": positions}
    for given in (batch, BatchEncoding(batch | {"labels": "not a tensor"}), (IDS, MASK, positions)):
        found = hra_fx.distance_to_base(model, given)
        torch.testing.assert_close(found.detach(), wanted.detach(), rtol=1e-6, atol=0)
    assert hra_fx.distance_to_base(model, {"input_ids": IDS, "attention_mask": torch.zeros_like(IDS)}).item() == 0
    plain = divergences(rotated(base, model, "b", "default")(IDS).logits, base(IDS).logits).mean()
    torch.testing.assert_close(hra_fx.distance_to_base(model, IDS).detach(), plain.detach(), rtol=1e-6, atol=0)


def test_the_divergence_of_16_bit_logits_is_computed_in_float32() -> None:
    model = adapted(llama().to(torch.bfloat16).eval())
    own = model(IDS).logits.double()
    with torch.no_grad(), hra_fx.disable_adapters(model):
        base = model(IDS).logits.double()
    found = hra_fx.distance_to_base(model, IDS)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(float(divergences(own, base).mean().detach()), rel=1e-5)


def test_the_base_is_in_eval_mode_and_has_its_own_modules() -> None:
    """The model has dropout and a trained classifier, which the base does not have; flags and modes are restored."""
    model = hra_fx.transform(bert(), hra_fx.HRAConfig(r=4, target_modules=["query"], modules_to_save=["classifier"]))
    with torch.no_grad():
        model.get_parameter("classifier.weight").mul_(-2)
        with hra_fx.disable_adapters(model):
            base = model.eval()(IDS, MASK).logits
    model.train()
    model.get_submodule("bert.encoder").eval()
    flags = [(part.training, *[one.requires_grad for one in part.parameters()]) for part in model.modules()]
    torch.manual_seed(3)
    found = hra_fx.distance_to_base(model, {"input_ids": IDS, "attention_mask": MASK})
    after = torch.rand(2)
    torch.manual_seed(3)
    own = model(IDS, MASK).logits
    assert relative_error(found, divergences(own, base).mean()) < 1e-5
    assert torch.equal(after, torch.rand(2))
    assert flags == [(part.training, *[one.requires_grad for one in part.parameters()]) for part in model.modules()]


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["none", "reentrant", "not reentrant"])
def test_the_gradient_of_a_sum_is_the_sum_of_gradients(checkpointing: bool | None) -> None:
    """The backward pass of a forward before the call, with adapters that have been disabled since."""
    model = adapted(llama().to(F64), modules_to_save=["lm_head"]).train()
    with torch.no_grad():
        model.get_parameter("lm_head.weight").mul_(1.1)
        base_logits = hra_fx.disable_adapters(model), model(IDS).logits
        hra_fx.set_adapter(model, "default")
    own = divergences(model(IDS).logits, base_logits[1]).mean()
    of_task, of_term = gradients(model, model(IDS, labels=IDS).loss), gradients(model, own)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    loss = model(IDS, labels=IDS).loss
    loss = 3 * hra_fx.distance_to_base(model, {"input_ids": IDS, "labels": IDS}) + loss
    found = gradients(model, loss + 0 * model(IDS).logits.sum())
    wanted = {name: one + 3 * of_term[name] for name, one in of_task.items()}
    assert len(wanted) == 5
    assert all(one.norm() > 1e-3 for one in of_term.values())
    assert all(relative_error(found[name], wanted[name]) < 1e-6 for name in wanted)


PEFT: dict[str, Any] = {
    "LoRA": peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False),
    "HRA": peft.HRAConfig(**FIELDS),
    "prompt": peft.PromptTuningConfig(num_virtual_tokens=3),
}


@pytest.mark.parametrize("method", PEFT)
def test_models_of_peft(method: str) -> None:
    """An adapter that is not trained stays so, although PEFT trains all active ones that it enables."""
    base = llama().eval()
    config = copy.copy(PEFT[method])
    config.task_type = "CAUSAL_LM"
    model: Any = peft.get_peft_model(copy.deepcopy(base), config).eval()
    own = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits[:, -8:]
    wanted = divergences(own, base(IDS).logits).mean()
    assert wanted > 0.01
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}
    found = gradients(model, hra_fx.distance_to_base(nn.DataParallel(model), batch))
    torch.testing.assert_close(found, gradients(model, wanted), rtol=1e-4, atol=1e-6)
    model.requires_grad_(False)
    assert hra_fx.distance_to_base(model, batch).item() == pytest.approx(wanted.item(), rel=1e-4)
    assert not trained(model)


def relative(own: Tensor, base: Tensor) -> Tensor:
    return (own - base).norm(dim=-1).square() / base.norm(dim=-1).square()


def test_hidden_states_tensors_and_rewards() -> None:
    base = llama("LlamaModel").to(F64).eval()
    model = adapted(copy.deepcopy(base))
    own = rotated(base, model)(IDS, MASK).last_hidden_state
    wanted = relative(own, base(IDS, MASK).last_hidden_state)[MASK.bool()].mean()
    batch = {"input_ids": IDS, "attention_mask": MASK}
    assert hra_fx.distance_to_base(model, batch).item() == pytest.approx(wanted.item(), rel=1e-6)

    base = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).to(F64)
    model = hra_fx.transform(copy.deepcopy(base), hra_fx.HRAConfig(r=2, target_modules=["0"]))
    x = torch.randn(5, 8, dtype=F64)
    found = gradients(model, hra_fx.distance_to_base(model, x))
    assert found["0.hra_u.default"].abs().max() < 1e-12  # the least possible distance
    with torch.no_grad():
        model.get_parameter("0.hra_u.default").normal_()
    wanted = relative(rotated(base, model)(x), base(x)).mean()
    assert hra_fx.distance_to_base(model, (x,)).item() == pytest.approx(wanted.item(), rel=1e-6)

    base = llama("LlamaForSequenceClassification", num_labels=1).to(F64).eval()
    model = adapted(copy.deepcopy(base))
    own, before = (one(IDS, MASK).logits for one in (rotated(base, model), base))
    assert hra_fx.distance_to_base(model, batch).item() == pytest.approx(
        float((own - before).square().mean().detach() / 2), rel=1e-6
    )


def test_the_decoder_has_its_own_mask() -> None:
    base = t5(vocab_size=VOCABULARY).to(F64).eval()
    model = hra_fx.transform(copy.deepcopy(base), hra_fx.HRAConfig(r=4, target_modules=["q"], init_weights=False))
    given = {"input_ids": IDS, "attention_mask": MASK, "decoder_input_ids": IDS[:, :5]}
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    own, before = (one(**given, decoder_attention_mask=mask).logits for one in (rotated(base, model), base))
    wanted = divergences(own, before)[mask.bool()].mean()
    found = hra_fx.distance_to_base(model, given | {"decoder_attention_mask": mask})
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
    # The inputs of the decoder are made from labels.
    given = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS[:, :5].where(mask.bool(), -100)}
    own, before = (one(**given).logits for one in (rotated(base, model), base))
    wanted = divergences(own, before)[mask.bool()].mean()
    assert hra_fx.distance_to_base(model, given).item() == pytest.approx(wanted.item(), rel=1e-6)


class TwoOutputs(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


def test_errors() -> None:
    model = adapted(llama())

    def refused(text: str, model: Any, batch: Any = IDS) -> None:
        with pytest.raises(AdapterError, match=text):
            hra_fx.distance_to_base(model, batch)

    refused("`batch` must be a tensor, .* got str", model, "a text")
    for batch in (["a text"], [[1, 2, 3]], {"input_ids": [1, 2, 3]}, {"text": "a text"}):
        refused(f"^`batch` must contain tensors, got a {type(batch).__name__} without any. Tokenize", model, batch)
    refused(
        r"mask has shape \(3, 7\), but the output is for tokens \(3, 8\)",
        model,
        {"input_ids": IDS, "attention_mask": MASK[:, 1:]},
    )
    with hra_fx.disable_adapters(model):
        refused("the adapters are disabled.*set_adapter", model)
    hra_fx.merge_adapter(model)
    refused("merged into the weights. Call unmerge_adapter", model)
    refused("LlamaForCausalLM has no adapters. Call hra_fx.transform", llama())
    of_peft: Any = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"]))
    with of_peft.disable_adapter():
        refused("the adapters are disabled", of_peft)
    of_peft.merge_adapter()
    refused("merged into the weights", of_peft)
    two = hra_fx.transform(nn.Sequential(TwoOutputs(4, 4)), hra_fx.HRAConfig(r=2, target_modules=["0"]))
    refused("needs a model whose output is a tensor or has `logits`.* got tuple", two, torch.ones(1, 4))


# ---- in a Trainer ----

SAMPLES = [{"input_ids": tokens_of(2, 6, seed)} for seed in (5, 6, 7)]


@pytest.mark.parametrize("every", [1, 2])
def test_a_trainer_adds_the_term_whatever_it_accumulates(every: int, tmp_path: Path) -> None:
    """Against a loop by hand, over the same batches."""
    arguments: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "max_steps": 4}
    arguments |= {"lr_scheduler_type": "constant"}
    moved, seen = [], []
    for size, accumulated in ((4, 1), (1, 4)):
        arguments |= {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated}
        trainer: Any = trainer_of(Trainer, "llama", adapted(llama()), tmp_path, **arguments)
        collate, start = trainer.data_collator, copy.deepcopy(trained(trainer.model))
        before = trainer.evaluate()["eval_loss"]
        hra_fx.add_distance_to_base(trainer, SAMPLES, weight=2.0, every=every)
        assert trainer.evaluate()["eval_loss"] == before

        def recorded(rows: Any, collate: Any = collate) -> Any:
            """Without the first labels, which have no effect on the loss, but count for it in transformers 4."""
            batch = collate(rows)
            seen.append(batch["input_ids"])
            batch["labels"][:, 0] = -100
            return batch

        trainer.data_collator = recorded
        trainer.train()
        moved.append({name: one.detach() - start[name] for name, one in trained(trainer.model).items()})
    assert all(relative_error(moved[0][name], one) < 1e-4 for name, one in moved[1].items())

    model = adapted(llama())
    optimizer = torch.optim.SGD(trained(model).values(), lr=0.1)
    for step in range(4):
        ids = seen[step]
        loss = model(input_ids=ids, labels=ids).loss
        if step % every == 0:
            loss = loss + 2.0 * hra_fx.distance_to_base(model, SAMPLES[step // every % 3])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, one in trained(model).items():
        assert relative_error(moved[0][name], one.detach() - start[name]) < 1e-3, name


def test_a_resumed_run_continues_with_the_next_batch(tmp_path: Path) -> None:
    found = []
    for checkpoint in (None, str(tmp_path / "checkpoint-2")):
        trainer: Any = trainer_of(
            Trainer, "llama", adapted(llama()), tmp_path, max_steps=4, save_steps=2, save_strategy="steps"
        )
        hra_fx.add_distance_to_base(trainer, SAMPLES, weight=2.0)
        trainer.train(resume_from_checkpoint=checkpoint)
        found.append(trained(trainer.model))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_bad_arguments_for_a_trainer(tmp_path: Path) -> None:
    trainer = trainer_of(Trainer, "llama", adapted(llama()), tmp_path)
    for arguments, error, text in (
        ({"weight": 0.0}, ConfigError, r"`weight` must be a finite number > 0, got 0\.0"),
        ({"every": 0}, ConfigError, "`every` must be a positive int, got 0"),
        *[({"samples": bad}, AdapterError, "must be a list of batches") for bad in ([], SAMPLES[0], cycle(SAMPLES))],
        ({"trainer": nn.Linear(2, 2)}, AdapterError, "`trainer` must be a transformers Trainer, got Linear"),
    ):
        with pytest.raises(error, match=text):
            hra_fx.add_distance_to_base(**{"trainer": trainer, "samples": SAMPLES} | arguments)
