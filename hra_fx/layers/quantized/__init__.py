"""Linear layers with a quantized weight, of bitsandbytes and torchao; neither library is imported here."""
