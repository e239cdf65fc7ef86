"""fx graphs of a model: tracing, TorchDynamo capture, and the compile backend."""
