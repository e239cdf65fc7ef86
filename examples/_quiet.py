"""Import this first: it turns off messages of other libraries that are about their own parts, not about the demo."""

from __future__ import annotations

import logging
import os
import warnings

# tqdm's bars for each file that transformers reads or converts, and its warning in notebooks without widgets.
os.environ.setdefault("TQDM_DISABLE", "1")
warnings.filterwarnings("ignore", message="IProgress not found")

import transformers  # noqa: E402

# Parts of the weights that the demos do not load, such as the pooler.
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
# PEFT and transformers import torchao where it is installed. It lists its CUDA libraries, which other machines cannot
# load, and registers classes in a way that torch has deprecated.
logging.getLogger("torchao").setLevel(logging.ERROR)
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
# "building the font cache", on first use.
logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
