"""Fold a checkpoint on disk: safetensors files are processed one after the other, without loading the model."""
