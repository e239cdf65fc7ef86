"""Public entry points: `transform`, `load_adapter`, `fold_checkpoint`, and PEFT's names and methods."""
