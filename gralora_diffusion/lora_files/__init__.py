"""What LoRA files say, whoever wrote them: names of layers, PEFT's config, scaling."""
