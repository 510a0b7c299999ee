"""Does GraLoRA draw better than LoRA? Both trained, drawn with and judged side by side."""
