"""How well HRA learns, compared with LoRA, other adapters and full fine-tuning.

`tasks/` has the data and models, `methods.py` and `keeping.py` what is compared, `training.py` one run, `records.py`
the file of results, `rates.py` the learning rate of each method, `table.py` and `kept.py` the tables, and `page.py`
writes those of docs/results.md and README.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # runs are forks
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two runs side by side are faster than one run with two threads

#: The weights and data are those of the demos, which know where they are.
sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))
