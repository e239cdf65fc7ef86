"""`hra-fx convert --to lora` compared with reading the weights that it needs: a bf16 Llama of 1.1 billion parameters.

    python benchmarks/convert.py [--rounds 3] [--dtype bfloat16]

Needs 2.3 GB of disk. The checkpoint and the adapter (r=8) are those of benchmarks/disk.py. Each method runs in its own
process, interleaved. Times are without imports, and memory is the growth of the process after the imports; both read
from the page cache. Prints whether each limit is met.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from disk import HIDDEN, INNER, LARGEST, line, make, run

from hra_fx.lora.save import convert_files

MORE_THAN_READING, TIMES_LARGEST = 3.0, 4
#: The largest weight that is adapted, in float32.
LARGEST_ADAPTED = 4 * INNER * HIDDEN

CONVERT = """
from hra_fx.lora.save import convert_files
def act(base, adapter, out, dtype):
    convert_files([adapter], base, out, dtype=dtype, progress=False)
"""
#: With a thread for each file, as many as the conversion uses.
READ = """
import os, torch
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from safetensors import safe_open
def read(file):
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():
            if name.endswith("_proj.weight"):
                tensors.get_tensor(name).clone()
def act(base):
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        list(pool.map(read, Path(base).glob("*.safetensors")))
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        measure(Path(name), options.rounds, options.dtype)


def measure(folder: Path, rounds: int, dtype: str) -> None:
    base, adapter, out = (folder / name for name in ("base", "adapter", "out"))
    make(base, adapter)
    reads, conversions, sizes = [], [], []
    for i in range(rounds + 1):
        read, _ = run(READ, base)
        seconds, size = run(CONVERT, base, adapter, out, dtype)
        print(f"round {i}: reading {read:.2f} s, conversion {seconds:.2f} s{' (to warm up)' * (i == 0)}", flush=True)
        if i:
            reads.append(read)
            conversions.append(seconds)
            sizes.append(size)
    more, size = statistics.median(conversions) - statistics.median(reads), max(sizes)
    line("seconds more than reading the needed weights", more, MORE_THAN_READING, more <= MORE_THAN_READING)
    growth = size / LARGEST
    text = f"growth ({size / 1e6:.0f} MB) over the largest weight in float32"
    line(text, growth, TIMES_LARGEST, growth <= TIMES_LARGEST)
    print(f"growth over the largest weight that is adapted, in float32: {size / LARGEST_ADAPTED:.2f}")
    print(f"size on disk: adapter {size_of(adapter) / 1e6:.1f} MB, folded model {size_of(base) / 1e6:.0f} MB")
    for kind in ("float32", "bfloat16"):
        rows = convert_files([adapter], base, folder / kind, dtype=kind, progress=False).rows
        error = max(row.rounding for row in rows)
        print(f"as LoRA in {kind}: {size_of(folder / kind) / 1e6:.1f} MB, rounding error up to {error:.1e}")


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


if __name__ == "__main__":
    main()
