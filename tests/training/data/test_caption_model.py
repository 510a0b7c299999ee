"""Captions of tiny models with random weights, compared with the likeliest tokens one by one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from gralora_diffusion.training.data.caption_model import load_caption_model

WORDS = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "<image>", "user", "a", "photo", "of", "dog", "what"]
WORDS += ["is", "this", "assistant", *(f"word{number}" for number in range(20))]
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
SMALL |= {"num_attention_heads": 2}
IMAGE = Image.effect_mandelbrot((40, 30), (-2, -1, 1, 1), 20).convert("RGB")


def tokenizer(folder: Path) -> BertTokenizer:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
    return BertTokenizer(
        str(folder / "vocab.txt"), additional_special_tokens=["<image>"], model_max_length=64
    )


def save_blip(folder: Path) -> Path:
    """Save a BLIP as save_pretrained does."""
    ids = {"bos_token_id": 1, "sep_token_id": 2, "eos_token_id": 2, "pad_token_id": 0}
    config = BlipConfig(
        text_config={"vocab_size": len(WORDS), "encoder_hidden_size": 16, **SMALL, **ids},
        vision_config={"image_size": 16, "patch_size": 8, **SMALL},
    )
    torch.manual_seed(0)
    model = BlipForConditionalGeneration(config)
    for parameter in model.parameters():  # their usual size gives one word for all images
        torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    images = BlipImageProcessorPil(size={"height": 16, "width": 16})
    BlipProcessor(images, tokenizer(folder)).save_pretrained(folder)
    return folder


def save_llava(folder: Path) -> Path:
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=16, patch_size=8, **SMALL),
        text_config=LlamaConfig(vocab_size=len(WORDS), eos_token_id=2, pad_token_id=0, **SMALL),
        image_token_index=WORDS.index("<image>"),
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    size = {"height": 16, "width": 16}
    images = CLIPImageProcessorPil(size=size, crop_size=size)
    template = (
        "{% for m in messages %}user {% for c in m.content %}"
        "{% if c.type == 'image' %}<image> {% else %}{{ c.text }} {% endif %}"
        "{% endfor %}{% endfor %}assistant"
    )
    LlavaProcessor(
        images,
        tokenizer(folder),
        patch_size=8,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
        chat_template=template,
        image_token="<image>",
    ).save_pretrained(folder)
    return folder


def words(tokens: list[int]) -> str:
    special = ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "<image>")
    return " ".join(WORDS[token] for token in tokens if WORDS[token] not in special)


@pytest.mark.parametrize("prompt", [None, "a photo of"])
def test_blip_continues_its_prompt(tmp_path: Path, prompt: str | None) -> None:
    captioner = load_caption_model(str(save_blip(tmp_path / "blip")), prompt=prompt)
    model = BlipForConditionalGeneration.from_pretrained(tmp_path / "blip").eval()
    processor = BlipImageProcessorPil.from_pretrained(tmp_path / "blip")
    pixels = processor(IMAGE, return_tensors="pt")["pixel_values"]
    tokens = [WORDS.index(word) for word in ["[CLS]", *(prompt or "").split()]]
    for _ in range(5):
        with torch.no_grad():
            logits = model(pixel_values=pixels, input_ids=torch.tensor([tokens])).logits
        tokens.append(int(logits[0, -1].argmax()))
        if tokens[-1] == 2:
            break
    text = captioner.caption(IMAGE, prompt, 5)
    assert text == words(tokens)
    assert text.startswith(prompt or "")


def test_a_model_with_a_chat_template_answers(tmp_path: Path) -> None:
    captioner = load_caption_model(str(save_llava(tmp_path / "llava")), prompt="what is this")
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava").eval()
    processor = CLIPImageProcessorPil.from_pretrained(tmp_path / "llava")
    pixels = processor(IMAGE, return_tensors="pt")["pixel_values"]
    line = ["[CLS]", "user", *["<image>"] * 4, "what", "is", "this", "assistant", "[SEP]"]
    asked = [WORDS.index(word) for word in line]
    tokens = list(asked)
    for _ in range(4):
        with torch.no_grad():
            logits = model(pixel_values=pixels, input_ids=torch.tensor([tokens])).logits
        tokens.append(int(logits[0, -1].argmax()))
        if tokens[-1] == 2:
            break
    assert captioner.caption(IMAGE, "what is this", 4) == words(tokens[len(asked) :])


def test_models_that_are_refused(tmp_path: Path) -> None:
    BertModel(BertConfig(vocab_size=9, **SMALL)).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="of the type bert, which transformers does not load as"):
        load_caption_model(str(tmp_path / "bert"))
    folder = save_blip(tmp_path / "blip")
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    with pytest.raises(OSError, match="safetensors"):  # no pickle is read
        load_caption_model(str(folder))
