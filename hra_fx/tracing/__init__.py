"""fx graphs of a model: tracing by torch.fx, capture of a call by torch.export, and the compile backend."""
