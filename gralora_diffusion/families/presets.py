"""Target presets that families share: endings of the paths of layers to adapt."""

from __future__ import annotations

_CLIP_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
_T5_ATTENTION = ("SelfAttention.q", "SelfAttention.k", "SelfAttention.v", "SelfAttention.o")
#: Presets of transformers' CLIP and T5 text encoders. T5's feed-forward layers are gated.
CLIP_PRESETS = {"attention": _CLIP_ATTENTION, "attention+ff": (*_CLIP_ATTENTION, "fc1", "fc2")}
T5_PRESETS = {
    "attention": _T5_ATTENTION,
    "attention+ff": (
        *_T5_ATTENTION,
        *("DenseReluDense.wi_0", "DenseReluDense.wi_1", "DenseReluDense.wo"),
    ),
}
_LANGUAGE_ATTENTION = tuple(f"self_attn.{name}_proj" for name in "qkvo")
#: Presets of transformers' language models such as Mistral and Qwen, without their vision part.
LANGUAGE_MODEL_PRESETS = {
    "attention": _LANGUAGE_ATTENTION,
    "attention+ff": (*_LANGUAGE_ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
}
#: Attention in transformers with two streams, image and text.
JOINT_ATTENTION = (
    *("to_q", "to_k", "to_v", "to_out.0"),
    *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
)
#: Feed-forward layers in the two-stream blocks of such transformers.
JOINT_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")
