from typing import Any

import torch
from diffusers import Flux2KleinPipeline
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

from tests.remembered import remembered
from tests.tiny.flux2 import TEMPLATE, scheduler, transformer, vae
from tests.tiny.parts import CHARACTERS, quiet

FAMILY = "flux2-klein"


def qwen_tokenizer() -> Qwen2Tokenizer:
    """A Qwen tokenizer that knows single printable characters."""
    tokens = ["<|endoftext|>", "Ġ", "Ċ", *CHARACTERS]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return Qwen2Tokenizer(vocab=vocabulary, merges=[], chat_template=TEMPLATE)


def qwen() -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=len(qwen_tokenizer()),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=27,  # the pipeline reads the 27th
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=512,
    )
    return Qwen3ForCausalLM(config).eval()


@remembered
def build(seed: int = 0, **changes: Any) -> Flux2KleinPipeline:
    torch.manual_seed(seed)
    return quiet(
        Flux2KleinPipeline(
            transformer=transformer(guidance_embeds=False, **changes),
            scheduler=scheduler(),
            vae=vae(),
            text_encoder=qwen(),
            tokenizer=qwen_tokenizer(),
        )
    )
