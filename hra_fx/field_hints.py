"""Hints for keywords that `HRAConfig` does not have: the field to use instead, or why HRA does not have one."""

from __future__ import annotations

import difflib
from collections.abc import Collection

_NO_ALPHA = "HRA has no alpha, because Q is orthogonal. Remove it. To weaken an adapter, call hra_fx.set_scale."
#: A field of PEFT's `LoraConfig`, and of `HRAConfig` before 0.5.
TOKENS = "trainable_token_indices"
#: Fields of PEFT's `LoraConfig` without a counterpart.
_ONLY_IN_LORA = {
    "lora_alpha": _NO_ALPHA,
    "alpha_pattern": _NO_ALPHA,
    "use_rslora": _NO_ALPHA,
    "lora_dropout": "HRA has no dropout. Remove it, and set the dropout of the model itself.",
    "lora_bias": "Reflections have no bias. Use bias='hra_only' to train the biases of the adapted layers.",
    "use_dora": "HRA preserves the norm of each row of the weight, so DoRA does not apply. Remove it.",
    TOKENS: (
        'It was removed in 0.5. To train the embeddings in full, use modules_to_save=["embed_tokens", "lm_head"].'
    ),
    "fan_in_fan_out": "The layout of the weight is inferred from the layer type. Remove it.",
}


def field_hint(name: str, fields: Collection[str]) -> str:
    """Return a sentence that says what to use instead of the unknown field `name`.

    >>> field_hint("apply_gs", ["r", "apply_GS"])
    'Did you mean `apply_GS`?'
    """
    if name in _ONLY_IN_LORA:
        return _ONLY_IN_LORA[name]
    lower = {known.lower(): known for known in fields}
    near = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.75)
    if near:
        return f"Did you mean `{lower[near[0]]}`?"
    return f"The fields are {', '.join(fields)}."
