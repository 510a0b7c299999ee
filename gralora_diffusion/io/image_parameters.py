"""How an image was generated, written into its PNG file as other programs read it.

The text chunk ``parameters`` has the form of AUTOMATIC1111's web UI, which Forge, ComfyUI and most
viewers read: the prompt, a line ``Negative prompt: ...`` and a line of ``Name: value`` pairs. The
chunk ``gralora_diffusion`` holds the same as JSON, with the texts unchanged.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .safe_text import for_terminal
from .version import __version__

PARAMETERS, OWN = "parameters", "gralora_diffusion"
#: Characters of a text that are written; CLIP reads some 400, T5 some 2,500.
_MOST = 10_000
#: Scheduler of diffusers -> the sampler's name in the web UI.
_SAMPLERS = {
    "DDIMScheduler": "DDIM",
    "EulerDiscreteScheduler": "Euler",
    "EulerAncestralDiscreteScheduler": "Euler a",
    "FlowMatchEulerDiscreteScheduler": "Euler",
    "UniPCMultistepScheduler": "UniPC",
}


@dataclass(frozen=True, kw_only=True)
class ImageParameters:
    """What an image was generated with.

    Attributes:
        scheduler: name of the scheduler's class.
        base, adapter: a Hub id, or the name of a local file or folder without its path.
        guidance_scale, adapter, scale: None if there is none.
        guidance_is_distilled: the denoiser takes the guidance scale as an input, as FLUX.1 dev's.
        clip_skip: the layer of CLIP that is read, where the last is 1, as the web UI counts.
    """

    prompt: str
    seed: int
    steps: int
    negative_prompt: str = ""
    guidance_scale: float | None = None
    guidance_is_distilled: bool = False
    clip_skip: int | None = None
    scheduler: str = ""
    base: str = ""
    adapter: str | None = None
    scale: float | None = None

    def as_text(self, size: tuple[int, int]) -> str:
        """Return the text of the chunk ``parameters`` for an image of this width and height."""
        width, height = size
        fields = {
            "Steps": self.steps,
            "Sampler": _SAMPLERS.get(self.scheduler, self.scheduler),
            "CFG scale": 1.0 if self.guidance_is_distilled else self.guidance_scale,
            "Distilled CFG Scale": self.guidance_scale if self.guidance_is_distilled else None,
            "Seed": self.seed,
            "Size": f"{width}x{height}",
            "Model": self.base,
            "Clip skip": self.clip_skip,
            "GraLoRA": self.adapter,
            "GraLoRA scale": self.scale,
            "Version": f"gralora-diffusion {__version__}",
        }
        given = [(name, value) for name, value in fields.items() if value not in (None, "")]
        # ComfyUI needs the line of the negative prompt even if it is empty
        return "\n".join(
            [
                _line(self.prompt),
                f"Negative prompt: {_line(self.negative_prompt)}",
                ", ".join(f"{name}: {_value(value)}" for name, value in given),
            ]
        )

    def as_chunks(self, size: tuple[int, int]) -> PngInfo:
        """Return the text chunks of a PNG of this width and height."""
        chunks = PngInfo()
        chunks.add_text(PARAMETERS, self.as_text(size))
        exact = {
            name: value[:_MOST] if isinstance(value, str) else value
            for name, value in asdict(self).items()
        }
        chunks.add_text(OWN, json.dumps({**exact, "version": __version__}))
        return chunks


def save_png(image: Image.Image, path: str | Path | IO[bytes], parameters: ImageParameters) -> None:
    """Save an image with its parameters."""
    image.save(path, format="PNG", pnginfo=parameters.as_chunks(image.size))


def _line(text: str) -> str:
    """Return a prompt on a line of its own, which no reader takes for another part.

    White space makes no difference to a tokenizer.
    """
    line = for_terminal(" ".join(text[:_MOST].split()))
    return re.sub(r"^(Negative prompt|Steps):", r"\1 :", line)


def _value(value: object) -> str:
    """Return a value as the web UI quotes it: as JSON if it would end the field."""
    if isinstance(value, float):
        return f"{value:g}"
    text = " ".join(str(value)[:_MOST].split())
    return json.dumps(text, ensure_ascii=False) if re.search(r'[,:"{}]', text) else text
