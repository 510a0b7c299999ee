"""Every pipeline class of the families, made of the parts of tiny pipelines, and how to draw."""

import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from PIL import Image
from torch import Tensor, nn

from gralora_diffusion.families import find_family, get_family, list_families
from gralora_diffusion.pipelines.editing import editing_pipeline
from tests.tiny import PIPELINES
from tests.tiny.parts import flow_vae, quiet, spread_out

#: Pipeline classes that no image is drawn with here, and why.
NOT_DRAWN = {
    "StableDiffusionAdapterPipeline": "a T2I-Adapter's maps do not fit the tiny UNet",
    "StableDiffusionXLAdapterPipeline": "a T2I-Adapter's maps do not fit the tiny UNet",
    "StableDiffusionGLIGENTextImagePipeline": "needs an image encoder",
    "StableDiffusionAttendAndExcitePipeline": "looks for maps of 16 x 16, which a tiny UNet lacks",
    "StableUnCLIPPipeline": "needs a prior",
    "StableUnCLIPImg2ImgPipeline": "needs an image encoder",
    "StableDiffusionXLControlNetXSPipeline": "its UNet has layers of other names",
    "LEditsPPPipelineStableDiffusionXL": "needs an inverted picture",
    "TextToVideoZeroSDXLPipeline": "draws frames over tens of steps",
}
CLASSES = [
    name
    for family in list_families()
    for name in get_family(family).pipeline_classes
    if name not in NOT_DRAWN
]

#: How the base of a pipeline class differs from the family's: mostly in channels of input, for what
#: goes in beside the latents.
_CONTROL = {"in_channels": 2 * 16, "out_channels": 16}
_OTHER_BASES: dict[str, dict[str, Any]] = {
    "FluxControlPipeline": _CONTROL,
    "FluxControlImg2ImgPipeline": _CONTROL,
    "FluxControlInpaintPipeline": _CONTROL,
    "FluxFillPipeline": {"in_channels": 3 * 16, "out_channels": 16},
    "LatentConsistencyModelImg2ImgPipeline": {"time_cond_proj_dim": 32},
    "LatentConsistencyModelPipeline": {"time_cond_proj_dim": 32},
    "PIAPipeline": {"in_channels": 2 * 4 + 1},
    "StableDiffusion3InpaintPipeline": {"in_channels": 16, "out_channels": 16},  # takes no other
    "StableDiffusionDepth2ImgPipeline": {"in_channels": 4 + 1},
    "StableDiffusionGLIGENPipeline": {"attention_type": "gated"},
    "StableDiffusionInstructPix2PixPipeline": {"in_channels": 4 + 4},
    "StableDiffusionUpscalePipeline": {"in_channels": 4 + 3, "num_class_embeds": 100},
    "StableDiffusionXLInstructPix2PixPipeline": {"in_channels": 4 + 4},
}
_SCHEDULERS = {
    "AnimateDiffSDXLPipeline": diffusers.DDIMScheduler,
    "CycleDiffusionPipeline": diffusers.DDIMScheduler,
    "LatentConsistencyModelImg2ImgPipeline": diffusers.LCMScheduler,
    "LatentConsistencyModelPipeline": diffusers.LCMScheduler,
    "StableDiffusionParadigmsPipeline": diffusers.DDIMParallelScheduler,
}
#: Arguments of constructors where it is not a part of the tiny pipeline.
_OPTIONS = {
    "add_watermarker": False,
    "depth_estimator": None,  # the depth is given
    "requires_safety_checker": False,
    "watermarker": None,
}


def _controlnet(pipe: Any, name: str) -> nn.Module:
    of_unet = {"conditioning_embedding_out_channels": (16, 32)}
    union = {"num_trans_channel": 16, "num_trans_head": 2, "num_proj_channel": 16}
    small = {"num_layers": 1, "num_single_layers": 1}
    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "Flux": (diffusers.FluxControlNetModel, small),
        "StableDiffusion3": (
            diffusers.SD3ControlNetModel,
            {"num_layers": 1, "extra_conditioning_channels": int("Inpaint" in name)},
        ),
        "StableDiffusionXLControlNetUnion": (diffusers.ControlNetUnionModel, of_unet | union),
        "StableDiffusion": (diffusers.ControlNetModel, of_unet),
    }
    kind, changes = next(made for start, made in kinds.items() if name.startswith(start))
    denoiser = getattr(pipe, get_family(pipe).denoiser)
    return kind.from_config({**denoiser.config, **changes})


def _motion_adapter(pipe: Any, name: str) -> nn.Module:
    return diffusers.MotionAdapter(
        block_out_channels=pipe.unet.config.block_out_channels,
        motion_layers_per_block=1,
        motion_norm_num_groups=2,
        motion_num_attention_heads=4,
        use_motion_mid_block=False,
    )


#: Argument of a constructor -> how it is made for the tiny pipeline and the class.
_FURTHER_PARTS: dict[str, Callable[[Any, str], Any]] = {
    "controlnet": _controlnet,
    "motion_adapter": _motion_adapter,
    "low_res_scheduler": lambda pipe, name: diffusers.DDPMScheduler(),
    "inverse_scheduler": lambda pipe, name: diffusers.DDIMInverseScheduler(steps_offset=1),
}


def build(name: str) -> Any:
    """A pipeline of this class; all of a family have the same weights where widths agree."""
    cls = getattr(diffusers, name)
    family = find_family(cls)
    assert family is not None
    pipe = PIPELINES[family.name](**_OTHER_BASES.get(name, {}))
    parts: dict[str, Any] = {**pipe.components, **_OPTIONS}
    if name == "StableDiffusion3InpaintPipeline":
        parts["vae"] = flow_vae(latent_channels=16)
    if name in _SCHEDULERS:
        scheduler = pipe.scheduler.config
        parts["scheduler"] = _SCHEDULERS[name].from_config(scheduler, set_alpha_to_one=False)
    wanted = inspect.signature(cls.__init__).parameters
    for part, make in _FURTHER_PARTS.items():
        if part in wanted:
            torch.manual_seed(5)
            parts[part] = make(pipe, name)
            if isinstance(parts[part], nn.Module):
                spread_out(parts[part].eval())
    return quiet(cls(**{key: part for key, part in parts.items() if key in wanted}))


#: Family -> changes that make its tiny base one that fills.
FILLING: dict[str, dict[str, Any]] = {
    "stable-diffusion": {"in_channels": 9},
    "stable-diffusion-xl": {"in_channels": 9},
    "flux": {"in_channels": 4 * (4 + 4 + 4), "out_channels": 4 * 4},
}


def build_filling(family: str) -> Any:
    """A base that fills as it is published: its pipeline is the one that fills."""
    return editing_pipeline(PIPELINES[family](**FILLING[family]), get_family(family))


_ARGUMENTS: dict[str, dict[str, Any]] = {
    "AnimateDiffSDXLPipeline": {"num_frames": 2},
    "CycleDiffusionPipeline": {"source_prompt": "a dog", "eta": 0.1},
    "LatentConsistencyModelPipeline": {"original_inference_steps": 4},
    "LatentConsistencyModelImg2ImgPipeline": {"original_inference_steps": 4},
    "PIAPipeline": {"num_frames": 2, "num_inference_steps": 2},
    "StableDiffusionDiffEditPipeline": {"mask_image": torch.ones(1, 1, 16, 16)},
    "StableDiffusionGLIGENPipeline": {"gligen_phrases": ["a"], "gligen_boxes": [[0, 0, 1, 1]]},
    "StableDiffusionLDM3DPipeline": {"output_type": "np"},
    "StableDiffusionPipelineSafe": {"output_type": "np"},
}


def draw(pipe: Any, **options: Any) -> Tensor:
    """Latents that the pipeline makes of noise, prompt and, where it takes them, image, mask
    and control image. One step, and from noise alone, is enough for every weight to matter."""
    name = type(pipe).__name__
    rng = torch.Generator().manual_seed(1)
    side = 64 if name.startswith("Flux2") else 16  # FLUX.2 takes no smaller images
    pixels = torch.rand(1, 3, side, side, generator=rng)[0].permute(1, 2, 0)
    image = Image.fromarray((255 * pixels).byte().numpy())
    arguments = {
        "prompt": "a cat",
        "image": image,
        "control_image": image,
        "mask_image": Image.new("L", (side, side), 255),
        "control_mask": Image.new("L", (side, side), 255),
        "depth_map": torch.rand(1, side, side, generator=rng),
        "image_latents": torch.randn(1, 1, 4, 16, 16, generator=rng),
        "control_mode": 0,
        "height": 16,
        "width": 16,
        "max_area": 16 * 16,
        "_auto_resize": False,
        "strength": 1.0,
        "inpaint_strength": 1.0,
        "num_inference_steps": 1,
        "max_sequence_length": 16,
        "guidance_scale": 2.0,
        "generator": torch.Generator().manual_seed(2),
        "output_type": "latent",
    }
    torch.manual_seed(3)  # for the pipelines that do not use the generator everywhere
    taken = inspect.signature(type(pipe).__call__).parameters
    arguments = {key: value for key, value in arguments.items() if key in taken}
    images = pipe(**{**arguments, **_ARGUMENTS.get(name, {}), **options})[0]
    return torch.as_tensor(images).float()
