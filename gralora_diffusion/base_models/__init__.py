"""The frozen base: told apart, loaded from wherever it lies, quantized, or without its weights."""
