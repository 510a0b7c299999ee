"""Interpret LoRA files of any program: names of layers, PEFT's config, scaling."""
