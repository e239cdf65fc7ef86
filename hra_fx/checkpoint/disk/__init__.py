"""Folding a checkpoint on disk: safetensors files streamed tensor by tensor, with no model in memory."""
