"""Adapter files in PEFT's format: the folder, the weights, and how they get to the disk and back."""
