"""Import this first: it turns off messages of other libraries that are about their own parts, not about the demo."""

from __future__ import annotations

import logging
import os

# tqdm's bars for each file that transformers reads or converts.
os.environ.setdefault("TQDM_DISABLE", "1")
# onnxruntime would send data about its use, and warns where it cannot write an identifier into the home folder.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
# The log of all libraries. PEFT and transformers import what is installed, such as bitsandbytes and torchao, which log
# what the CPU or the GPU lacks. A demo that fails raises an exception, and its traceback is printed.
logging.disable()
