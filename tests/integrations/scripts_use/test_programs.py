"""axolotl and LLaMA-Factory train the same adapter with PEFT's HRA and with that accelerated.

One line switches it on. The programs make the calls of both around PEFT, in their order, for a tiny Llama.
`peft.HRAConfig` stands where they make a configuration of LoRA, and they know nothing of hra_fx.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from oracles import relative_error
from peft.tuners.hra.layer import HRALinear
from safetensors.torch import load_file
from tiny_models import batch, llama, samples, vectors_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)

import hra_fx

#: What the programs have in common: `(folder, dtype, use_reentrant, adapter)` -> a model that is ready to train. With
#: the folder of an adapter, it goes on from that one.
Loader = Callable[[Path, torch.dtype, bool, "Path | None"], Any]


def save_base(folder: Path, dtype: torch.dtype) -> None:
    llama().to(dtype).save_pretrained(folder / "base")


def with_adapter(model: Any, adapter: Path | None, **options: Any) -> Any:
    """A new adapter, or one from a folder that is trained further."""
    if adapter is not None:
        return peft.PeftModel.from_pretrained(model, str(adapter), is_trainable=True, **options)
    torch.manual_seed(1)
    targets = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    config = peft.HRAConfig(task_type="CAUSAL_LM", r=4, target_modules=sorted(targets - {"lm_head"}))
    return peft.get_peft_model(model, config)


def axolotl(folder: Path, dtype: torch.dtype, use_reentrant: bool, adapter: Path | None = None) -> Any:
    """Norms and embeddings to float32 and back, checkpointing, inputs that require gradients, then the adapter."""
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype)
    model.config.use_cache = False
    model.tie_weights()
    _cast(model, torch.float32)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    _cast(model, dtype)
    model.enable_input_require_grads()
    model = with_adapter(model, adapter)
    model.print_trainable_parameters()
    return model


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    for name, module in model.named_modules():
        if any(part in name for part in ("norm", "embed_tokens", "lm_head")):
            module.to(dtype)


def llama_factory(folder: Path, dtype: torch.dtype, use_reentrant: bool, adapter: Path | None = None) -> Any:
    """Norms to float32, its own checkpointing, float32 logits, the adapter, and what is trained to float32."""
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype="auto")
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and "norm" in name:
            parameter.data = parameter.data.to(torch.float32)
    through = partial(_checkpoint, partial(checkpoint, use_reentrant=use_reentrant))
    model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=through)
    model.config.use_cache = False
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: output.float())
    places = {"subfolder": "", "offload_folder": "offload", "revision": "main"}
    model = with_adapter(model, adapter, **(places if adapter else {}))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
    return model.train()


def _checkpoint(through: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
    """Checkpoint a layer, and make its hidden states require gradients, in place of `enable_input_require_grads`."""
    next(arg for arg in args if isinstance(arg, Tensor) and arg.is_floating_point()).requires_grad_(True)
    return through(function, *args, **kwargs)


LOADERS: dict[str, Loader] = {"axolotl": axolotl, "LLaMA-Factory": llama_factory}


def trainer(program: str, model: Any, folder: Path, *, callbacks: Any = None, **options: Any) -> Trainer:
    """Four steps of AdamW, with a checkpoint after the second."""
    ours = program == "LLaMA-Factory"
    make: Any = Seq2SeqTrainer if ours else Trainer
    arguments: Any = Seq2SeqTrainingArguments if ours else TrainingArguments
    args = arguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=4,
        save_steps=2,
        logging_steps=1,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )
    made: Trainer = make(model=model, args=args, train_dataset=samples("llama", 32), callbacks=callbacks)
    return made


def losses(one: Trainer) -> list[float]:
    return [entry["loss"] for entry in one.state.log_history if "loss" in entry]


def merged(folder: Path, dtype: torch.dtype, adapter: Path) -> Any:
    """The model that both programs export."""
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype)
    model = peft.PeftModel.from_pretrained(model, str(adapter)).merge_and_unload(progressbar=False)
    model.requires_grad_(False)
    model.eval().to(dtype).save_pretrained(folder / "merged", max_shard_size="5GB")
    return AutoModelForCausalLM.from_pretrained(folder / "merged")


# Names that transformers has had since 5.0, and means to rename; PEFT uses them.
pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing\\w*` is deprecated:FutureWarning")

#: Base models in bfloat16 are trained under autocast, where PEFT computes Q in bfloat16 and hra_fx in float32.
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
LAYERS = 14


@dataclass
class Run:
    """What a program leaves behind: losses of three trainings, and the files."""

    whole: list[float]
    resumed: list[float]
    continued: list[float]
    files: dict[str, Tensor]
    config: dict[str, Any]
    start: dict[str, Tensor]
    logits: Tensor


def run(program: str, folder: Path, dtype: torch.dtype, use_reentrant: bool, way: AbstractContextManager[Any]) -> Run:
    """Train with checkpoints, resume from one, go on from the saved adapter, and export the merged model."""
    save_base(folder, dtype)
    options = {"bf16": dtype is torch.bfloat16}
    with way as handle:
        model = LOADERS[program](folder, dtype, use_reentrant, None)
        assert handle is None or len(handle.layers) == LAYERS
        assert all((type(m) is HRALinear) == (handle is None) for m in model.modules() if isinstance(m, HRALinear))
        start = {name: vectors.detach().clone() for name, vectors in vectors_of(model).items()}
        assert {vectors.dtype for vectors in start.values()} == {torch.float32}
        whole = trainer(program, model, folder / "out", **options)
        whole.train()
        whole.save_model()
        again = trainer(program, LOADERS[program](folder, dtype, use_reentrant, None), folder / "out", **options)
        again.train(resume_from_checkpoint=str(folder / "out" / "checkpoint-2"))
        loaded = LOADERS[program](folder, dtype, use_reentrant, folder / "out")
        continued = trainer(program, loaded, folder / "continued", **options)
        continued.train()
        exported = merged(folder, dtype, folder / "out")
    assert type(exported) is LlamaForCausalLM
    with torch.no_grad():
        logits = exported.eval()(batch("llama")["input_ids"]).logits
    return Run(
        losses(whole),
        losses(again),
        losses(continued),
        load_file(folder / "out" / "adapter_model.safetensors"),
        json.loads((folder / "out" / "adapter_config.json").read_text()),
        start,
        logits,
    )


@pytest.mark.parametrize(
    ("program", "dtype", "use_reentrant"),
    [
        ("LLaMA-Factory", torch.float32, True),
        pytest.param("axolotl", torch.bfloat16, False, marks=pytest.mark.slow),
    ],
    ids=["LLaMA-Factory, float32, reentrant", "axolotl, bfloat16"],
)
def test_accelerated_it_trains_as_with_peft(
    program: str, dtype: torch.dtype, use_reentrant: bool, tmp_path: Path
) -> None:
    theirs = run(program, tmp_path / "theirs", dtype, use_reentrant, nullcontext())
    fast = run(program, tmp_path / "fast", dtype, use_reentrant, hra_fx.accelerate_peft())
    bound = BOUNDS[dtype]
    for name in ("whole", "resumed", "continued"):
        assert getattr(fast, name) == pytest.approx(getattr(theirs, name), rel=bound), name
    assert len(fast.whole) == 4
    # What was trained is what is resumed and continued.
    assert fast.resumed == pytest.approx(fast.whole, rel=bound)
    assert abs(fast.continued[0] - fast.whole[0]) > 1e-2
    assert entries(fast.files) == entries(theirs.files)
    assert len(fast.files) == LAYERS and all(key.endswith(".hra_u") for key in fast.files)
    assert_same_config(fast.config, theirs.config)
    if dtype is torch.float32:
        for name, before in fast.start.items():
            key = name.removesuffix(".default")
            assert relative_error(fast.files[key] - before, theirs.files[key] - before) < 1e-2, key
    assert relative_error(fast.logits, theirs.logits) < 3 * bound


def entries(files: dict[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {key: (tensor.shape, tensor.dtype) for key, tensor in files.items()}


def assert_same_config(got: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Apart from the folder of the base model, and the order of sets."""
    for config in (got, wanted):
        config["target_modules"] = sorted(config["target_modules"])
        assert Path(config.pop("base_model_name_or_path")).name == "base"
    assert got == wanted
    assert peft.HRAConfig.from_peft_type(**got).r == 4
