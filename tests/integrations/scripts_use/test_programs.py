"""axolotl and LLaMA-Factory train the same adapter with PEFT's HRA and with that accelerated.

One line switches it on. The programs make the calls of both around PEFT, in their order, for a tiny Llama.
`peft.HRAConfig` stands where they make a configuration of LoRA, and they know nothing of hra_fx.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapting import vectors_of
from oracles import relative_error
from peft.tuners.hra.layer import HRALinear
from safetensors.torch import load_file
from tiny_models import llama, logits_of, trainer_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer

import hra_fx

#: What the programs have in common: `(folder, dtype, use_reentrant, adapter)` -> a model that is ready to train. With
#: the folder of an adapter, it goes on from that one.
Loader = Callable[[Path, torch.dtype, bool, "Path | None"], Any]


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


def trained(
    model: Any, folder: Path, dtype: torch.dtype, checkpoint: Path | None = None
) -> tuple[Trainer, list[float]]:
    """A Trainer after four steps, with a checkpoint after the second, and its losses."""
    steps = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    made = trainer_of(Trainer, "llama", model, folder, bf16=dtype is torch.bfloat16, **steps)
    made.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    return made, [entry["loss"] for entry in made.state.log_history if "loss" in entry]


def run(
    program: str, folder: Path, dtype: torch.dtype, use_reentrant: bool, way: AbstractContextManager[Any]
) -> tuple[dict[str, list[float]], dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Train with checkpoints, resume from one, go on from the saved adapter, and export the merged model.

    Returns the losses of the trainings, the vectors before, those in the file, and the logits of the exported model.
    """
    llama().to(dtype).save_pretrained(folder / "base")
    load = partial(LOADERS[program], folder, dtype, use_reentrant)
    with way as handle:
        model = load(None)
        assert handle is None or len(handle.layers) == LAYERS
        assert all((type(m) is HRALinear) == (handle is None) for m in model.modules() if isinstance(m, HRALinear))
        start = {name: vectors.detach().clone() for name, vectors in vectors_of(model).items()}
        assert {vectors.dtype for vectors in start.values()} == {torch.float32}
        whole, losses = trained(model, folder / "out", dtype)
        whole.save_model()
        found = {"whole": losses}
        found["resumed"] = trained(load(None), folder / "out", dtype, folder / "out" / "checkpoint-2")[1]
        found["continued"] = trained(load(folder / "out"), folder / "continued", dtype)[1]
        exported = merged(folder, dtype, folder / "out")
    assert type(exported) is LlamaForCausalLM
    return found, start, load_file(folder / "out" / "adapter_model.safetensors"), logits_of(exported, "llama")


@pytest.mark.slow  # tests/integrations/trl_use has shorter runs with the same layers
@pytest.mark.parametrize(
    ("program", "dtype", "use_reentrant"),
    [("LLaMA-Factory", torch.float32, True), ("axolotl", torch.bfloat16, False)],
    ids=["LLaMA-Factory, float32, reentrant", "axolotl, bfloat16"],
)
def test_accelerated_it_trains_as_with_peft(
    program: str, dtype: torch.dtype, use_reentrant: bool, tmp_path: Path
) -> None:
    wanted, _, theirs, logits = run(program, tmp_path / "theirs", dtype, use_reentrant, nullcontext())
    found, start, fast, as_fast = run(program, tmp_path / "fast", dtype, use_reentrant, hra_fx.accelerate_peft())
    bound = BOUNDS[dtype]
    for name, losses in wanted.items():
        assert found[name] == pytest.approx(losses, rel=bound), name
    assert len(found["whole"]) == 4
    # What was trained is what is resumed and continued.
    assert found["resumed"] == pytest.approx(found["whole"], rel=bound)
    assert abs(found["continued"][0] - found["whole"][0]) > 1e-2
    assert len(fast) == LAYERS
    assert {key: (t.shape, t.dtype) for key, t in fast.items()} == {
        key: (t.shape, t.dtype) for key, t in theirs.items()
    }
    if dtype is torch.float32:
        for name, before in start.items():
            key = name.removesuffix(".default")
            assert relative_error(fast[key] - before, theirs[key] - before) < 1e-2, key
    assert relative_error(as_fast, logits) < 3 * bound
