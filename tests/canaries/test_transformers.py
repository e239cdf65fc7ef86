"""What hra_fx reads of transformers' models, their configurations and their files."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from canaries.canary import canary
from canaries.one_process import mesh_of_one
from integrations.transformers_use import test_output_layers
from lora import test_from_disk
from torch import nn

import hra_fx
from hra_fx.checkpoint.disk.ties import _config_tree
from hra_fx.export.select import OUTPUTS, model_type_of
from hra_fx.layers.experts_weight import _IS_TRANSPOSED, is_transposed
from hra_fx.layers.target import find_kind
from hra_fx.reporting.scale import costs
from hra_fx.selection.select import select

of_transformers = functools.partial(canary, "transformers")
SIZES = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "vocab_size": 16}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2}
TOKENS = torch.arange(6)[None]


def release() -> tuple[int, ...]:
    return tuple(map(int, transformers.__version__.split(".")[:2]))


def llama(**fields: Any) -> Any:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **fields)).double().eval()


@of_transformers(
    "the closure of the `forward` that tensor parallelism sets (`original_forward`, `mesh`, `self`), or its styles",
    reader="hra_fx/layers/tensor_parallel.py",
    breaks="adapters in models that transformers has split (tp_plan)",
)
def test_tensor_parallelism() -> None:
    if release() < (5, 16):
        return  # earlier ones split weights in another way, and such layers are not adapted
    parallel = importlib.import_module("transformers.distributed.tensor_parallel")
    config = hra_fx.HRAConfig(r=2, init_weights=False, target_modules=["0", "2"])
    model, split = (nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double() for _ in range(2))
    split.load_state_dict(model.state_dict())
    x = torch.randn(5, 3, dtype=torch.float64)
    with mesh_of_one() as mesh:
        for layer, style in ((split[0], parallel.ColwiseParallel()), (split[2], parallel.RowwiseParallel())):
            for name in ("weight", "bias"):
                style.shard_param(layer, name, mesh)
            style.install_forward(layer, mesh)
        for made in (model, split):
            torch.manual_seed(0)
            hra_fx.transform(made, config)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                assert torch.allclose(split(x), model(x), rtol=1e-12)
        with hra_fx.disable_adapters(model):
            assert not torch.allclose(split(x), model(x), rtol=1e-3), "the adapters have an effect"


@of_transformers(
    "the keys `colwise` and `rowwise` of `tp_plan`",
    reader="hra_fx/reporting/scale.py",
    breaks="the computed costs under tensor parallelism",
)
def test_the_plan_of_tensor_parallelism() -> None:
    model = hra_fx.transform(llama(), hra_fx.HRAConfig(r=2, target_modules=["up_proj", "down_proj"]))
    hra, lora, _ = costs(model, 4, "tp")
    # One layer is column-wise and the other one row-wise: two reductions and a gathering; LoRA has one reduction each.
    assert (hra.collectives, lora.collectives) == (3, 2)


@of_transformers("`pytorch_utils.Conv1D`", reader="hra_fx/layers/target.py", breaks="adapters in GPT-2's layers")
def test_conv1d() -> None:
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16))
    kind: Any = importlib.import_module("transformers.pytorch_utils").Conv1D
    assert isinstance(model.transformer.h[0].attn.c_attn, kind)
    assert find_kind(kind(4, 3)) == "linear"
    x = torch.randn(2, 3)
    layer = kind(4, 3)
    assert torch.allclose(layer(x), x @ layer.weight + layer.bias, atol=1e-6), "its weight is (in, out)"


@of_transformers(
    "`modeling_utils.PreTrainedModel`", reader="hra_fx/selection/select.py", breaks='target_modules="all-linear"'
)
def test_all_linear_leaves_out_the_output_layer() -> None:
    chosen = select(llama(), hra_fx.HRAConfig(target_modules="all-linear"))
    assert len(chosen) == 7 and "lm_head" not in chosen


INSIDE: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 12}
#: Class -> its module, how to make experts of 8 features that have 12 inside, and a parameter that multiplies the 8.
EXPERTS: dict[str, tuple[str, Callable[[Any], nn.Module], str]] = {
    "Llama4TextExperts": ("llama4", lambda kind: kind(_experts_config()), "gate_up_proj"),
    "JetMoeParallelExperts": ("jetmoe", lambda kind: kind(3, 8, 24), "weight"),
    "LongcatFlashExperts": ("longcat_flash", lambda kind: kind(_experts_config()), "gate_up_proj"),
    "Step3p7Experts": ("step3p7", lambda kind: kind(_experts_config()), "gate_up_proj"),
    "InklingSharedExperts": ("inkling", lambda kind: kind(_experts_config()), "gate_proj"),
    # These say it themselves, by the attribute that `use_experts_implementation` sets.
    "GptOssExperts": ("gpt_oss", lambda kind: kind(transformers.GptOssConfig(**INSIDE)), "gate_up_proj"),
    "MixtralExperts": ("mixtral", lambda kind: kind(transformers.MixtralConfig(**INSIDE)), "gate_up_proj"),
}


def _experts_config() -> Any:
    counts = ("num_local_experts", "n_routed_experts", "n_shared_experts")
    inside = ("intermediate_size", "moe_intermediate_size", "expert_ffn_hidden_size")
    fields = {**dict.fromkeys(counts, 3), **dict.fromkeys(inside, 12), "hidden_size": 8, "hidden_act": "silu"}
    return transformers.PretrainedConfig(**fields, zero_expert_num=0)


@pytest.mark.parametrize("name", EXPERTS)
@of_transformers(
    "the layout of experts, `is_transposed` or the name of their class",
    reader="hra_fx/layers/experts_weight.py",
    breaks="adapters of experts (target_parameters)",
)
def test_the_layout_of_experts(name: str) -> None:
    assert _IS_TRANSPOSED.keys() <= EXPERTS.keys()
    folder, make, parameter = EXPERTS[name]
    if importlib.util.find_spec(f"transformers.models.{folder}") is None:
        return  # this release does not have the model yet
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    with torch.device("meta"):
        experts = make(getattr(module, name))
    assert getattr(experts, parameter).shape[1 if is_transposed(experts) else 2] == 8
    assert hasattr(experts, "is_transposed") is (name not in _IS_TRANSPOSED), "what says it itself needs no entry"


@of_transformers(
    "`get_expanded_tied_weights_keys` or `get_text_config`",
    reader="hra_fx/model/tied.py",
    breaks="fold of an output layer that is tied to the embeddings",
)
def test_tied_weights(tmp_path: Path) -> None:
    test_output_layers.test_a_fold_unties_the_head_and_a_saved_model_loads_equal("llama", tmp_path)


@of_transformers(
    "`sub_configs`", reader="hra_fx/checkpoint/disk/ties.py", breaks="fold_checkpoint of models with several parts"
)
def test_configurations_inside() -> None:
    config = transformers.LlavaConfig()
    assert dict(_config_tree(config)) == {
        (): config,
        ("text_config",): config.text_config,
        ("vision_config",): config.vision_config,
    }


@of_transformers(
    "the conversions of checkpoints (`WeightConverter`, its operations, `rename_source_key`)",
    reader="hra_fx/checkpoint/disk/file_names.py",
    breaks="fold_checkpoint of experts",
)
def test_conversions_of_checkpoints(tmp_path: Path) -> None:
    loading = importlib.import_module("transformers.core_model_loading")
    transpose = loading.Transpose(1, 2, check_dims=True) if release() >= (5, 4) else loading.Transpose(1, 2)
    assert vars(transpose) == {"dim0": 1, "dim1": 2} | ({"check_dims": True} if release() >= (5, 4) else {})
    test_from_disk.test_experts_are_those_of_the_model_in_memory("mixtral", {}, tmp_path)


@of_transformers(
    "`config_class` of a model, or its `model_type`",
    reader="hra_fx/export/select.py",
    breaks="default targets of exported programs",
)
def test_the_type_of_a_model() -> None:
    kind = transformers.LlamaForCausalLM
    assert model_type_of(f"{kind.__module__}.{kind.__qualname__}") == "llama"


#: Models whose output layers have all the names that there are.
HEADS = {
    "Llama": {},
    "Bert": {"is_decoder": True},
    "Roberta": {"is_decoder": True},
    "GPTNeoX": {},
    "BioGpt": {},
}


@of_transformers(
    "the paths of output layers",
    reader="hra_fx/export/select.py",
    breaks='target_modules="all-linear" of exported programs, which would adapt the output layer',
)
def test_paths_of_output_layers() -> None:
    for name, fields in HEADS.items():
        config = getattr(transformers, f"{name}Config")(**SIZES, **fields)
        kind = f"{name}LMHeadModel" if name == "Bert" else f"{name}ForCausalLM"
        with torch.device("meta"):
            model: Any = getattr(transformers, kind)(config)
        path = next(path for path, module in model.named_modules() if module is model.get_output_embeddings())
        assert path in OUTPUTS, name
