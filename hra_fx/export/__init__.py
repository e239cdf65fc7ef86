"""Exported programs: `lift`, `freeze`, training steps, and adapters that are inputs of ONNX graphs."""
