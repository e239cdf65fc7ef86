"""Whole graphs: what TorchDynamo makes of one call of a model, with each reflection as one node."""
