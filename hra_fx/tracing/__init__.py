"""fx graphs of a model: tracing with torch.fx, and capture of a call with torch.export."""
