"""Adapters and the weights of their base model in files, without a model in memory."""
