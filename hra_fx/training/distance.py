"""The distance between a model and its base, the same model with its adapters off, as a term of the loss."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping, Sized
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hra_fx.compat import pytree
from hra_fx.config_fields import check_positive_int
from hra_fx.errors import AdapterError, ConfigError
from hra_fx.example_inputs import device_of, normalize_inputs
from hra_fx.model.state import check_is_module, unwrap
from hra_fx.training.without_adapters import check_adapters_act, without_adapters


def distance_to_base(model: nn.Module, batch: Any) -> Tensor:
    """The distance between a model and its base, the same model with its adapters off, for one batch.

    For a language model, it is the mean of `KL(base || model)` of the next token over all tokens that are not padding.
    Add it to the loss, for samples of what the model must not forget:

        loss = model(**batch).loss + hra_fx.distance_to_base(model, next(samples))

    The base runs in eval mode and without gradients, and the model in its current mode: in training, a BatchNorm also
    counts this batch.

    - Models with `logits`: the mean KL divergence. Logits with one column, such as a reward, are the means of normal
      distributions with variance 1: the divergence is half of the squared difference.
    - Models with a `last_hidden_state`, or whose output is a tensor: the mean of `|h - h0|^2 / |h0|^2` over the last
      dimension.
    - Padding is left out by the `attention_mask` of the batch (for a decoder, `decoder_attention_mask`). `labels` are
      not used, unless the inputs of a decoder are made from them; then labels of -100 are padding.

    Wrapped in `DistributedDataParallel`, add the distance to a loss of the wrapped model before `backward`, because the
    wrapper synchronizes the gradients of a backward pass through its own output.

    Args:
        model: a transformed model or a model of PEFT, with any method; wrapped or not.
        batch: what the model takes: a mapping of keyword arguments, a tuple or list of positional arguments, or a
            tensor. It is moved to the device of the model.

    Returns:
        A scalar, at least in float32, 0 for adapters that change nothing. It is differentiable.

    Raises:
        AdapterError: the model has no adapters, or they are disabled or merged; the output has another form; or the
            mask does not fit it.

    Example:
        >>> from hra_fx import HRAConfig, transform
        >>> model = transform(nn.Sequential(nn.Linear(6, 4)), HRAConfig(r=2, target_modules=["0"]))
        >>> bool(distance_to_base(model, torch.ones(1, 6)) < 1e-6)  # an adapter starts as the identity
        True
    """
    check_is_module(model)
    inner = unwrap(model)
    check_adapters_act(inner)
    device = device_of(inner)
    args, kwargs = pytree.tree_map(
        lambda x: x.to(device) if isinstance(x, Tensor) else x, normalize_inputs(batch, "`batch`")
    )
    if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves((args, kwargs))):
        fix = "Tokenize texts first, and pass tensors: tokenizer(texts, return_tensors='pt', padding=True)."
        raise AdapterError(f"`batch` must contain tensors, got a {type(batch).__name__} without any. {fix}")
    if "decoder_input_ids" in kwargs or not getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        kwargs.pop("labels", None)  # otherwise, the inputs of the decoder are made from them
    with without_adapters(inner):
        base, _ = _read(inner(*args, **kwargs))
    own, is_logits = _read(inner(*args, **kwargs))
    if own.shape != base.shape:
        own = own[:, -base.shape[1] :]  # without the virtual tokens of a prompt
    dtype = torch.promote_types(own.dtype, torch.float32)
    distances = _distances(own.to(dtype), base.to(own.device, dtype), is_logits)
    return _mean(distances, _mask(inner, args, kwargs))


def _read(output: Any) -> tuple[Tensor, bool]:
    """The tensor of an output that is compared, and whether it contains logits."""
    if isinstance(output, Tensor):
        return output, False
    for name in ("logits", "last_hidden_state"):
        found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(found, Tensor):
            return found, name == "logits"
    raise AdapterError(
        "distance_to_base needs a model whose output is a tensor or has `logits` or a `last_hidden_state`, got "
        f"{type(output).__name__}."
    )


def _distances(own: Tensor, base: Tensor, is_logits: bool) -> Tensor:
    """The distance for each token, or for each row."""
    square = (own - base).square().sum(-1)
    if not is_logits:
        return square / base.square().sum(-1).clamp_min(torch.finfo(base.dtype).eps)
    if own.shape[-1] == 1:
        return square / 2
    return F.kl_div(own.log_softmax(-1), base.log_softmax(-1), reduction="none", log_target=True).sum(-1)


def _mask(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The mask of the tokens of the output, among the arguments of a call."""
    given = {**inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments, **kwargs}
    if isinstance(labels := kwargs.get("labels"), Tensor):
        return labels != -100
    mask = given.get("decoder_attention_mask" if "decoder_input_ids" in given else "attention_mask")
    return mask if isinstance(mask, Tensor) else None


def _mean(distances: Tensor, mask: Tensor | None) -> Tensor:
    """The mean over tokens that are not padding, or over rows if there is one distance for each."""
    if mask is None or distances.dim() < 2:
        return distances.mean()
    if mask.shape != distances.shape:
        raise AdapterError(
            f"the attention mask has shape {tuple(mask.shape)}, but the output is for tokens {tuple(distances.shape)}, "
            "so padding cannot be left out. Pass a batch without padding and without a mask."
        )
    is_token = mask.to(distances.device) != 0
    return distances.where(is_token, 0).sum() / is_token.sum().clamp_min(1)


def add_distance_to_base(trainer: Any, samples: Iterable[Any], weight: float = 1.0, every: int = 1) -> None:
    """Add `weight * distance_to_base(model, batch)` to the training loss of a Trainer of transformers or TRL.

    One batch of `samples` is added to each optimizer step, at its last micro-batch, whatever
    `gradient_accumulation_steps` is. The batches take turns in their order, also after a run is resumed, and the
    processes of a run take different ones. Logs of the training loss contain the term. Evaluation does not change.

    Args:
        trainer: a `transformers.Trainer` or a trainer of TRL (SFT, DPO, KTO, GRPO, rewards).
        samples: batches for `distance_to_base`, such as those of `hra_fx.own_texts`: a list, or a DataLoader, which is
            read once.
        weight: the factor of the distance.
        every: only every so many optimizer steps get the term, with the same weight.

    Raises:
        ConfigError: `weight` is not a finite number > 0, or `every` is not a positive int.
        AdapterError: `samples` is empty, a single batch or without a length, or `trainer` is not a Trainer. In
            training, see `distance_to_base`.

    Example:
        >>> add_distance_to_base(None, [{"input_ids": torch.tensor([[5, 2]])}], weight=-1.0)
        Traceback (most recent call last):
        hra_fx.errors.ConfigError: `weight` must be a finite number > 0, got -1.0.
    """
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
        raise ConfigError(f"`weight` must be a finite number > 0, got {weight!r}.")
    check_positive_int("every", every)
    if not all(hasattr(trainer, name) for name in ("compute_loss", "accelerator", "state")):
        raise AdapterError(f"`trainer` must be a transformers Trainer, got {type(trainer).__name__}.")
    if isinstance(samples, (Mapping, Tensor)) or not isinstance(samples, Sized) or not (batches := list(samples)):
        raise AdapterError("`samples` must be a list of batches or a DataLoader, and not empty or a single batch.")
    task_loss = trainer.compute_loss

    def compute_loss(
        model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        computed = task_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        accelerator, step = trainer.accelerator, trainer.state.global_step
        is_training = model.training and torch.is_grad_enabled()
        if not is_training or not accelerator.sync_gradients or step % every:
            return computed
        turn = step // every * accelerator.num_processes + accelerator.process_index
        term = weight * distance_to_base(model, batches[turn % len(batches)])
        if _is_divided(trainer, num_items_in_batch):
            term = term * trainer.current_gradient_accumulation_steps
        loss, *outputs = computed if return_outputs else (computed,)
        loss = loss + term.to(loss.device, loss.dtype)
        return (loss, *outputs) if return_outputs else loss

    trainer.compute_loss = compute_loss


def _is_divided(trainer: Any, num_items_in_batch: Any) -> bool:
    """Whether the Trainer will divide the loss by the number of accumulated batches."""
    is_scaled = getattr(trainer, "loss_is_scaled_for_ga", None)  # since transformers 5.19
    if is_scaled is None:
        by_model = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
        is_scaled = by_model or trainer.compute_loss_func is not None
    return not is_scaled
