"""The frozen base: recognized, loaded from any source, quantized, or built without its weights."""
