"""Save, load and check adapter files in PEFT's format."""
