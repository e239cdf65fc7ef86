"""What hra_fx and PEFT's HRA, LoRA, OFT and PSOFT can do, found by trying it on tiny models.

    make features

Needs peft, torchvision and bitsandbytes. Writes the table of docs/comparison.md. A cell is "yes" if the method did it
and the result was right; where it did not, the reason is printed.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

import hra_fx

PAGE = Path(__file__).parents[1] / "docs" / "comparison.md"
BEGIN, END = "<!-- features: written by make features -->", "<!-- end of features -->"
WIDTH = 64
MOE = {
    **{"vocab_size": 32, "hidden_size": WIDTH, "intermediate_size": 96, "moe_intermediate_size": 96},
    **{"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4},
    **{"num_experts": 4, "num_experts_per_tok": 2},
}


def of_peft(make: Callable[..., peft.PeftConfig], **fixed: Any) -> Callable[..., Any]:
    """Adapts a model with PEFT; the fields of a probe come before the fixed ones."""
    return lambda model, **fields: peft.get_peft_model(model, make(**{**fixed, **fields}))


def of_hra_fx(model: nn.Module, **fields: Any) -> Any:
    """Adapts a model with hra_fx."""
    return hra_fx.get_peft_model(model, hra_fx.HRAConfig(**{"r": 8, **fields}))


METHODS: dict[str, Callable[..., Any]] = {
    "hra_fx": of_hra_fx,
    "PEFT HRA": of_peft(peft.HRAConfig, r=8),
    "PEFT LoRA": of_peft(peft.LoraConfig, r=8),
    "PEFT OFT": of_peft(
        lambda r, **fields: peft.OFTConfig(r=0, oft_block_size=16, use_cayley_neumann=False, **fields), r=8
    ),
    "PEFT PSOFT": of_peft(peft.PsoftConfig, r=8),
}
Adapt = Callable[..., Any]


def check(condition: bool, reason: str) -> None:
    """Fail a probe for a reason."""
    if not condition:
        raise ValueError(reason)


def near(one: Tensor, other: Tensor) -> bool:
    """Whether tensors are equal but for rounding in float32."""
    return bool((one - other).abs().max() <= 1e-4 * other.abs().max())


def moved(model: nn.Module) -> None:
    """Change everything that is trained, as far as training does."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn_like(parameter)


def trains(model: Any, call: Callable[[Any], Tensor], before: Tensor) -> Tensor:
    """The output after a change of the adapter, which must differ and have gradients."""
    moved(model)
    output = call(model)
    check(not near(output, before), "the adapter has no effect")
    output.square().sum().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    check(bool(trained) and all(p.grad is not None and p.grad.any() for p in trained), "a parameter has no gradient")
    return output.detach()


class NotMergedError(Exception):
    """A method adapts a layer, but cannot merge the adapter into its weight."""


def check_merged(model: Any, call: Callable[[Any], Tensor], wanted: Tensor) -> None:
    """The merged model must give the outputs of the adapted one."""
    try:
        merged = model.merge_and_unload()
    except Exception as error:
        raise NotMergedError(str(error)) from error
    check(near(call(merged), wanted), "the merged model gives other outputs")


class Attention(nn.Module):
    """Self-attention of torch, between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Attention over the input."""
        out: Tensor = self.attention(x, x, x)[0]
        return out


def on_layer(layer: Callable[[], nn.Module], shape: tuple[int, ...], *, merges: bool = True) -> Callable[[Adapt], None]:
    """A probe that adapts one layer, trains it and merges the adapter."""

    def probe(adapt: Adapt) -> None:
        torch.manual_seed(0)
        base = nn.Sequential()
        base.add_module("layer", layer())
        # Without gradients, bitsandbytes multiplies in bfloat16 on CPUs that can.
        x = torch.randn(shape, requires_grad=True)
        before = base(x).detach()
        model = adapt(base, target_modules=["attention"] if isinstance(base.layer, Attention) else ["layer"])
        check(near(model.eval()(x), before), "a new adapter changes the outputs")
        after = trains(model, lambda each: each(x), before)
        if merges:
            check_merged(model, lambda each: each(x), after)

    return probe


def four_bit() -> nn.Module:
    """A layer of bitsandbytes in NF4."""
    import bitsandbytes

    layer = bitsandbytes.nn.Linear4bit(WIDTH, WIDTH, compute_dtype=torch.float32, quant_type="nf4")
    layer.weight = bitsandbytes.nn.Params4bit(torch.randn(WIDTH, WIDTH) / 8, requires_grad=False, quant_type="nf4")
    made: nn.Module = layer.to("cpu")
    return made


def experts(adapt: Adapt) -> None:
    """3-D weights of all experts of a mixture, one adapter for each expert."""
    torch.manual_seed(0)
    base = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**MOE)).eval()
    ids = torch.arange(24).reshape(2, 12)
    before = base(ids).logits.detach()
    model = adapt(base, target_modules=[], target_parameters=["experts.gate_up_proj"])
    moved(model)
    after = model(input_ids=ids).logits.detach()
    check(not near(after, before), "the adapter has no effect")
    check_merged(model, lambda each: each(ids).logits, after)


def pair(adapt: Adapt, **fields: Any) -> Any:
    """Two adapted linear layers."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
    return adapt(made, target_modules=["0", "2"], **fields).eval()


X = torch.linspace(-1, 1, 3 * WIDTH).reshape(3, WIDTH)


def odd_rank(adapt: Adapt) -> None:
    """A new adapter with an odd rank leaves the model as it is."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    before = base(X)
    check(near(adapt(base, target_modules=["0"], r=3).eval()(X), before), "a new adapter changes the outputs")


def singular_values(adapt: Adapt) -> None:
    """The merged weights have the singular values of the pretrained ones."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    before = torch.linalg.svdvals(base[0].weight.detach())
    model = adapt(base, target_modules=["0"])
    moved(model)
    after = torch.linalg.svdvals(model.merge_and_unload()[0].weight.detach())
    check(near(after, before), "the singular values change")


def second(adapt: Adapt) -> Any:
    """A model with two adapters."""
    model = pair(adapt)
    moved(model)
    config = model.peft_config["default"]
    model.add_adapter("other", copy.deepcopy(config))
    model.set_adapter("other")
    moved(model)
    return model


def several_at_once(adapt: Adapt) -> None:
    """Two adapters act at the same time."""
    model = second(adapt)
    alone = model(X)
    getattr(model, "base_model", model).set_adapter(["default", "other"])
    check(not near(model(X), alone), "the first adapter has no effect")


def one_for_each_row(adapt: Adapt) -> None:
    """Each row of a batch has an adapter of its own."""
    model = second(adapt)
    wanted = []
    for row, name in enumerate(("default", "other", "default")):
        model.set_adapter(name)
        wanted.append(model(X[row : row + 1]))
    check(near(model(X, adapter_names=["default", "other", "default"]), torch.cat(wanted)), "rows are wrong")


def exact_unmerge(adapt: Adapt) -> None:
    """Merging and unmerging in bfloat16 restores every bit of the weights."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(WIDTH, WIDTH)).bfloat16()
    before = base[0].weight.detach().clone()
    model = adapt(base, target_modules=["0"])
    moved(model)
    model.merge_adapter()
    model.unmerge_adapter()
    after = model.unload()[0].weight
    check(torch.equal(after, before), "the weights change")


def exports(adapt: Adapt) -> None:
    """`torch.export` of the adapted model."""
    model = pair(adapt)
    moved(model)
    program = torch.export.export(model, (X,))
    check(near(program.module()(X), model(X)), "the program gives other outputs")


def traces(adapt: Adapt) -> None:
    """`torch.fx.symbolic_trace` of the adapted model."""
    model = pair(adapt)
    moved(model)
    inner = model.get_base_model()  # without PEFT's wrapper
    graph = torch.fx.symbolic_trace(inner)
    check(near(graph(X), model(X)), "the graph gives other outputs")


def as_lora(adapt: Adapt) -> None:
    """The adapter as a LoRA of PEFT with the same outputs."""
    model = pair(adapt)
    moved(model)
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(model, peft.PeftModel) and model.peft_config["default"].peft_type != "LORA":
            peft.save_as_lora(folder, model, rank=WIDTH // 2)
        elif isinstance(model, peft.PeftModel):
            model.save_pretrained(folder)
        else:
            hra_fx.save_as_lora(model, folder)
        torch.manual_seed(0)
        plain = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
        lora = peft.PeftModel.from_pretrained(plain, folder).eval()
        check(near(lora(X), model(X)), "the LoRA gives other outputs")


#: What is tried, in the order of the table.
PROBES: dict[str, Callable[[Adapt], None]] = {
    "`nn.Linear`": on_layer(lambda: nn.Linear(WIDTH, WIDTH), (3, WIDTH)),
    "`Conv1D` of transformers (GPT-2)": on_layer(lambda: transformers.pytorch_utils.Conv1D(WIDTH, WIDTH), (3, WIDTH)),
    "`nn.Conv2d`, 3 x 3": on_layer(lambda: nn.Conv2d(16, 16, 3, padding=1), (2, 16, 8, 8)),
    "`nn.Conv2d`, with groups": on_layer(lambda: nn.Conv2d(16, 16, 3, padding=1, groups=2), (2, 16, 8, 8)),
    "`nn.Conv1d`": on_layer(lambda: nn.Conv1d(16, 16, 3, padding=1), (2, 16, 8)),
    "`nn.Conv3d`": on_layer(lambda: nn.Conv3d(16, 16, 3, padding=1), (1, 16, 4, 4, 4)),
    "`nn.MultiheadAttention`": on_layer(Attention, (2, 5, WIDTH)),
    "3-D weights of experts": experts,
    "4-bit layers of bitsandbytes": on_layer(four_bit, (3, WIDTH), merges=False),
    "a new adapter does not change the outputs, even at an odd rank": odd_rank,
    "singular values are kept": singular_values,
    "several active adapters": several_at_once,
    "an adapter for each row of a batch": one_for_each_row,
    "unmerging in bfloat16 restores every bit": exact_unmerge,
    "`torch.export`": exports,
    "`torch.fx.symbolic_trace`": traces,
    "an exact LoRA, for servers": as_lora,
}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """A block without warnings and prints."""
    with warnings.catch_warnings(), Path(os.devnull).open("w") as nothing, contextlib.redirect_stdout(nothing):
        warnings.simplefilter("ignore")
        yield


def tried(probe: Callable[[Adapt], None], adapt: Adapt) -> tuple[str, str]:
    """The cell of a table, and why it is not "yes"."""
    try:
        with quiet():
            probe(adapt)
    except Exception as error:
        cell = "not merged" if isinstance(error, NotMergedError) else "no"
        return cell, f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    return "yes", ""


def main() -> None:
    """Try everything, print why something failed, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="leave the page as it is")
    options = parser.parse_args()
    lines = [f"| | {' | '.join(METHODS)} |", f"|---|{':-:|' * len(METHODS)}"]
    for label, probe in PROBES.items():
        found = {name: tried(probe, adapt) for name, adapt in METHODS.items()}
        lines.append(f"| {label} | {' | '.join(cell for cell, _ in found.values())} |")
        for name, (_, reason) in found.items():
            print(f"{label}, {name}: {reason or 'yes'}")
    if not options.dry:
        text = PAGE.read_text(encoding="utf-8")
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        PAGE.write_text(f"{before}{BEGIN}\n\n" + "\n".join(lines) + f"\n\n{END}{after}", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
