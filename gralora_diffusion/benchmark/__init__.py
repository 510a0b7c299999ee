"""The image-generation benchmark: GraLoRA beside other methods, on the same data and noise."""
