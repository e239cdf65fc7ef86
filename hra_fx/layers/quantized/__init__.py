"""Linear layers with weights quantized by bitsandbytes or torchao. Neither library is imported here."""
