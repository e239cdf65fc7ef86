"""Import this first: it turns off messages of other libraries that are about their own parts, not about the demo."""

from __future__ import annotations

import logging
import warnings

# tqdm, in a notebook without widgets: its bars are plain text there. It warns when transformers imports it.
warnings.filterwarnings("ignore", message="IProgress not found")

import transformers  # noqa: E402

# PEFT and transformers import torchao where it is installed. It lists its CUDA libraries, which other machines cannot
# load, and registers classes in a way that torch has deprecated.
logging.getLogger("torchao").setLevel(logging.ERROR)
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
# "building the font cache", on first use.
logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
# Parts of the weights that the demos do not load, such as the pooler, and a progress bar for each file.
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
