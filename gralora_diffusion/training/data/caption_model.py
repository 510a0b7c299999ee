"""A model that describes images, from the Hub or a folder, loaded through transformers."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from gralora_diffusion.io.safe_text import error_line

#: What a model with a chat template is asked.
_QUESTION = "Describe this image in one sentence."
#: Type of model -> its words for a caption, where they are no sentence.
_TASKS = {"florence2": "<CAPTION>", "paligemma": "caption en"}
#: Types of models whose captions begin with the prompt.
_CONTINUES = ("blip",)
#: Types of models that take no prompt.
_WITHOUT_PROMPT = ("git", "vision-encoder-decoder")


class CaptionModel:
    """Describes images, always in the same way: the likeliest token is taken each time.

    Args:
        model: of ``AutoModelForImageTextToText``.
        processor: with the image processor and the tokenizer.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model.eval().requires_grad_(False), processor
        self.kind = str(model.config.model_type)

    def caption(self, image: Image.Image, prompt: str | None = None, most_tokens: int = 100) -> str:
        """Return the text for an RGB image.

        Args:
            prompt: what to answer, or for BLIP how the caption begins; by default what the kind of
                model was trained with.
        """
        inputs = self._inputs(image, prompt).to(self.model.device, self.model.dtype)
        with torch.inference_mode():
            tokens = self.model.generate(**inputs, max_new_tokens=most_tokens, do_sample=False)
        answers = not (self.model.config.is_encoder_decoder or self.kind in _CONTINUES)
        if answers and "input_ids" in inputs:  # which these models repeat
            tokens = tokens[:, inputs["input_ids"].shape[1] :]
        (text,) = self.processor.batch_decode(tokens, skip_special_tokens=True)
        return str(text)

    def _inputs(self, image: Image.Image, prompt: str | None) -> Any:
        if getattr(self.processor, "chat_template", None):
            content = [
                {"type": "image", "image": image},
                {"type": "text", "text": prompt or _QUESTION},
            ]
            return self.processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
        text = prompt or _TASKS.get(self.kind)
        words = {} if text is None else {"text": text}
        return self.processor(images=image, return_tensors="pt", **words)


def load_caption_model(
    source: str,
    *,
    prompt: str | None = None,
    revision: str | None = None,
    cache_dir: str | None = None,
) -> CaptionModel:
    """Load a model onto the accelerator if there is one, in 16 bits there and in fp32 on the CPU.

    No code of the repository is run, and only safetensors files are read.

    Args:
        source: Hub id or folder.
        prompt: that the model will be asked.

    Raises:
        ValueError: it cannot be loaded, or does not describe images, or takes no prompt.
        OSError: the Hub has no such model, or cannot be asked.
    """
    place: dict[str, Any] = {
        "revision": revision or "main",
        "cache_dir": cache_dir,
        "trust_remote_code": False,
    }
    accelerator = torch.accelerator.current_accelerator() or torch.device("cpu")
    on_cpu = accelerator.type == "cpu"
    kind = str(AutoConfig.from_pretrained(source, **place).model_type)
    if kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise ValueError(
            f"it is a model of the type {kind}, which transformers does not load as one from image "
            "to text. Give one such as Salesforce/blip-image-captioning-base, "
            "florence-community/Florence-2-base or Qwen/Qwen3-VL-2B-Instruct"
        )
    if prompt and kind in _WITHOUT_PROMPT:
        raise ValueError(f"a model of the type {kind} takes no prompt. Leave out --prompt")
    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            source,
            dtype=torch.float32 if on_cpu else torch.bfloat16,
            use_safetensors=True,
            output_loading_info=True,
            **place,
        )
        model, found = loaded
        processor = AutoProcessor.from_pretrained(source, **place)
    except (ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ValueError(error_line(error)) from error
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"its files lack {len(missing)} weights, such as {missing[0]}")
    if not hasattr(processor, "tokenizer"):
        raise ValueError("it has no processor for both images and text")
    return CaptionModel(model.to(accelerator), processor)
