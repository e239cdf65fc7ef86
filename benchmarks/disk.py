"""`fold_checkpoint` compared with copies and with PEFT: a bf16 Llama of 1.1 billion parameters, r=8.

    python benchmarks/disk.py [--rounds 3] [--without-peft]

Needs peft and 10 GB of disk. The checkpoint has the sizes of TinyLlama, three files and random weights; the adapter
is on q, k, v, o, gate, up and down. Each method runs in its own process, interleaved. Times are without imports, and
memory is the growth of the process after the imports. Prints whether each limit is met.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

RANK = 8
HIDDEN, INNER, LAYERS, WORDS, KEYS = 2048, 5632, 22, 32000, 256
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": WORDS,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
LARGEST = 4 * WORDS * HIDDEN
FASTER_THAN_PEFT, TIMES_SAVE, TIMES_FILE, EQUAL = 2, 2, 2.5, 0.999


def tensors() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (WORDS, HIDDEN)}
    for i in range(LAYERS):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in SHAPES.items()}
        norms = ("input_layernorm", "post_attention_layernorm")
        shapes |= {f"model.layers.{i}.{name}.weight": (HIDDEN,) for name in norms}
    return shapes | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (WORDS, HIDDEN)}


def make(base: Path, adapter: Path) -> None:
    """Write both. Weights are slices of one random tensor, because drawing a billion values takes long."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    base.mkdir()
    noise = (torch.randn(1 << 27) * 0.02).bfloat16()
    shapes = tensors()
    names, weight_map = list(shapes), {}
    for part in range(3):
        file = f"model-{part + 1:05d}-of-00003.safetensors"
        state = {}
        for name in names[part::3]:
            count, at = int(torch.tensor(shapes[name]).prod()), int(torch.randint(1 << 26, ()))
            state[name] = noise[at : at + count].view(shapes[name]).clone()
            weight_map[name] = file
        save_file(state, base / file, {"format": "pt"})
    total = sum(2 * int(torch.tensor(shape).prod()) for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (base / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))
    (base / "config.json").write_text(json.dumps(CONFIG, indent=2))
    adapter.mkdir()
    vectors = {
        f"base_model.model.model.layers.{i}.{name}.hra_u": torch.randn(shape[1], RANK)
        for i in range(LAYERS)
        for name, shape in SHAPES.items()
    }
    save_file(vectors, adapter / "adapter_model.safetensors", {"format": "pt"})
    targets = [name.partition(".")[2] for name in SHAPES]
    settings = {"peft_type": "HRA", "task_type": "CAUSAL_LM", "r": RANK, "target_modules": targets}
    (adapter / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": str(base)}))


OURS = """
import hra_fx
from transformers import LlamaForCausalLM
fold = hra_fx.fold_checkpoint
def act(base, adapter, out):
    fold(base, adapter, out, progress=False)
"""
SAFETENSORS = """
from pathlib import Path
from safetensors.torch import load_file, save_file
def act(base, out):
    Path(out).mkdir()
    for file in Path(base).glob("*.safetensors"):
        save_file({name: tensor.clone() for name, tensor in load_file(file).items()}, Path(out, file.name))
"""
PEFT = """
import torch, peft
from transformers import LlamaForCausalLM
def act(base, adapter, out):
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""
MEASURE = """
import json, resource, sys, time
{imports}
def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
before, begin = peak(), time.perf_counter()
act(*sys.argv[1:])
print(json.dumps([time.perf_counter() - begin, peak() - before]))
"""


def run(imports: str, *arguments: object) -> tuple[float, int]:
    """Seconds and bytes of one call in its own process."""
    code = MEASURE.format(imports=imports)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    seconds, size = json.loads(done.stdout.splitlines()[-1])
    return seconds, size


def copy(base: Path, out: Path) -> float:
    begin = time.perf_counter()
    subprocess.run(["cp", "-r", str(base), str(out)], check=True)
    return time.perf_counter() - begin


def steps_apart(ours: Path, theirs: Path) -> Iterator[tuple[int, int]]:
    """For each tensor: the number of values that differ by at most one bf16 step, and of all values."""
    import torch
    from safetensors import safe_open

    def where(folder: Path) -> dict[str, Path]:
        return {key: file for file in folder.glob("*.safetensors") for key in safe_open(file, "pt").keys()}  # noqa: SIM118

    mine, other = where(ours), where(theirs)
    assert mine.keys() == other.keys()
    for key in mine:
        pair = [safe_open(places[key], "pt").get_tensor(key) for places in (mine, other)]
        steps = [ordered(tensor.view(torch.int16).int()) for tensor in pair]
        yield int((steps[0] - steps[1]).abs().le(1).sum()), pair[0].numel()


def ordered(bits):  # type: ignore[no-untyped-def]
    """The bits of bf16 values as integers in the same order."""
    import torch

    return torch.where(bits < 0, -32768 - bits, bits)


def line(what: str, value: float, limit: float, met: bool) -> None:
    print(f"{what:<58} {value:>9.3f}   limit {limit:<6g} {'met' if met else 'NOT MET'}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--without-peft", action="store_true")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        measure(folder, options.rounds, with_peft=not options.without_peft)


def measure(folder: Path, rounds: int, *, with_peft: bool) -> None:
    base, adapter, ours, theirs = (folder / name for name in ("base", "adapter", "ours", "theirs"))
    make(base, adapter)
    copies, saves, folds, sizes, merge = [], [], [], [], 0.0
    for i in range(rounds + 1):
        for made in (folder / "copy", ours):
            shutil.rmtree(made, ignore_errors=True)
        copied = copy(base, folder / "copy")
        shutil.rmtree(folder / "copy")
        saved, _ = run(SAFETENSORS, base, folder / "copy")
        shutil.rmtree(folder / "copy")
        seconds, size = run(OURS, base, adapter, ours)
        times = f"cp {copied:.2f} s, safetensors {saved:.2f} s, fold_checkpoint {seconds:.2f} s"
        print(f"round {i}: {times}{' (to warm up)' * (i == 0)}", flush=True)
        if i:
            copies.append(copied)
            saves.append(saved)
            folds.append(seconds)
            sizes.append(size)
    fold, copied, saved, size = *map(statistics.median, (folds, copies, saves)), max(sizes)
    if with_peft:
        merge, growth = run(PEFT, base, adapter, theirs)
        print(f"PEFT: {merge:.1f} s, {growth / 1e9:.2f} GB")
        line(
            "times faster than PEFT's load, merge and save",
            merge / fold,
            FASTER_THAN_PEFT,
            merge >= FASTER_THAN_PEFT * fold,
        )
    print(f"{fold / copied:.1f} times the time of cp -r")
    line("times the time of loading and saving by safetensors", fold / saved, TIMES_SAVE, fold <= TIMES_SAVE * saved)
    largest = max(file.stat().st_size for file in base.glob("*.safetensors"))
    growth = size / largest
    line(f"growth ({size / 1e6:.0f} MB) over the largest file", growth, TIMES_FILE, growth <= TIMES_FILE)
    if with_peft:
        near, count = (sum(column) for column in zip(*steps_apart(ours, theirs), strict=True))
        line("fraction of values within one step of PEFT's", near / count, EQUAL, near / count >= EQUAL)


if __name__ == "__main__":
    main()
