"""Compares GraLoRA with other methods: all are trained and evaluated side by side."""
