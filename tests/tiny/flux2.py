from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from tests.remembered import remembered
from tests.tiny.parts import quiet, spread_out

FAMILY = "flux2"
TEMPLATE = (
    "<s>{% for message in messages %}[{{ message['role'] }}]"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{% endfor %}"
)


def byte_pair_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that knows the words of FLUX.2's system message.

    It stands for the PixtralProcessor of the real pipeline, which needs torchvision; for texts
    both are called in the same way.
    """
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator([SYSTEM_MESSAGE], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=TEMPLATE,
    )


def mistral() -> Mistral3ForConditionalGeneration:
    config = Mistral3Config(
        text_config={
            "model_type": "mistral",
            "vocab_size": 600,
            "hidden_size": 16,
            "intermediate_size": 16,
            "max_position_embeddings": 512,
            "num_attention_heads": 2,
            "num_hidden_layers": 30,  # the pipeline reads the 30th
            "num_key_value_heads": 1,
            "head_dim": 8,
            "sliding_window": None,
        },
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "image_size": 32,
            "patch_size": 16,
            "num_channels": 3,
        },
    )
    return Mistral3ForConditionalGeneration(config).eval()


def vae() -> AutoencoderKLFlux2:
    model = AutoencoderKLFlux2(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
    ).eval()
    model.bn.running_mean.normal_()
    model.bn.running_var.uniform_(0.5, 2.0)
    return model


def transformer(**changes: Any) -> Flux2Transformer2DModel:
    arguments: dict[str, Any] = {
        "patch_size": 1,
        "in_channels": 4 * 4,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 3 * 16,
        "timestep_guidance_channels": 256,
        "axes_dims_rope": (4, 4, 4, 4),
    }
    model = Flux2Transformer2DModel(**{**arguments, **changes}).eval()
    spread_out(model)
    return model


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)


@remembered
def build(seed: int = 0, **changes: Any) -> Flux2Pipeline:
    torch.manual_seed(seed)
    return quiet(
        Flux2Pipeline(
            transformer=transformer(**changes),
            scheduler=scheduler(),
            vae=vae(),
            text_encoder=mistral(),
            tokenizer=byte_pair_tokenizer(),
        )
    )
