"""Adapter files in PEFT's format: save, load and check them."""
