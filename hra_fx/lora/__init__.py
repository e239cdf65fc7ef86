"""Adapters as LoRA: `W Q = W + B A`, exactly, written for PEFT, llama.cpp and diffusers."""
