"""Does GraLoRA draw better than LoRA? Trained, drawn and judged side by side: `gralora benchmark`."""
