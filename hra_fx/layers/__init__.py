"""One adapted layer: the container of its adapters, the adapted classes, trained copies and quantized base layers."""
