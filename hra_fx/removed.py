"""Public names that earlier versions had: they raise an error that points to docs/upgrading.md."""

from __future__ import annotations

NAMES = frozenset({
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "FoldPlan",
    "VerificationError",
    "accelerate_peft",
    "combine",
    "delete_adapters",
    "freeze",
    "get_layer_status",
    "get_model_status",
    "lift",
    "mixed_batch",
    "plan_fold",
    "set_adapters",
    "train_pairs",
})  # fmt: skip


def message(name: str) -> str:
    """What the error of a removed name or method says."""
    return f"hra_fx.{name} was removed in 0.5. 'From 0.4 to 0.5' in docs/upgrading.md says what to use."
