"""Exported programs: training steps, and adapters that are inputs of ONNX graphs."""
