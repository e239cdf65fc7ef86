"""One adapted layer: the container of its adapters, the adapted classes, trained copies and quantized bases."""
