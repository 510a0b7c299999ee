"""Adapters on the tiny pipelines of ``tests/tiny``, and how to draw with them."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gralora_diffusion import GraloraConfig, get_family, inject
from gralora_diffusion.adapters.adapter_file import ComponentAdapter, read_adapter
from gralora_diffusion.adapters.placement.layer_config import layer_settings
from tests.reference import dense_update
from tests.tiny import PIPELINES
from tests.tiny.parts import text_encoder, tokenizer, unet, vae
from tests.tiny.stable_diffusion import build as stable_diffusion

__all__ = [
    "PIPELINES",
    "adapt",
    "adapt_everywhere",
    "config",
    "dense_updates",
    "draw",
    "merged",
    "stable_diffusion",
    "structure",
    "text_encoder",
    "tokenizer",
    "unet",
    "vae",
]

UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1"]
TEXT_TARGETS = ["q_proj", "v_proj"]


def draw(pipe: Any, **options: Any) -> Tensor:
    """The latents of two images, which depend on every weight but the VAE's."""
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    latents = latents.to(pipe.unet.dtype)
    arguments: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent", **options}
    return pipe(["a cat", "a dog"], latents=latents, **arguments).images.float()


def config(targets: list[str] | str = UNET_TARGETS, **changes: Any) -> GraloraConfig:
    """A config whose update is not zero from the start."""
    values = {"r": 8, "gralora_k": 4, "alpha": 16, "init_weights": False, **changes}
    return GraloraConfig(target_modules=targets, **values)


def adapt(pipe: Any, name: str = "a", seed: int = 1, **changes: Any) -> Any:
    """Inject an adapter, hybrid and on convolutions too, into UNet and text encoder."""
    torch.manual_seed(seed)
    inject(pipe.unet, config(hybrid_r=2, **changes), name)
    inject(pipe.text_encoder, config(TEXT_TARGETS, **changes), name)
    return pipe


def adapt_everywhere(
    pipe: Any, components: Iterable[str] = (), name: str = "a", seed: int = 1, **changes: Any
) -> Any:
    """Inject an adapter into denoiser and text encoders of any family, by its largest presets.

    On a UNet convolutions are among its layers, on transformers modulation. ``components``: all if
    empty.
    """
    family = get_family(pipe)
    torch.manual_seed(seed)
    for component in components or family.components:
        model = getattr(pipe, component)
        preset = list(family.target_presets[component])[-1]
        targets = family.resolve_preset(component, preset, model)
        hybrid_rank = 2 if component == family.denoiser else 0
        values = {"r": 4, "gralora_k": 2, "hybrid_r": hybrid_rank, **changes}
        inject(model, config(targets, **values), name)
    return pipe


def dense_updates(part: ComponentAdapter) -> dict[str, Tensor]:
    """Path -> update with its scaling, by the definition, in float64."""
    found = {}
    for key, A in part.tensors.items():
        if not key.endswith("gralora_A"):
            continue
        path = key.removesuffix(".gralora_A")
        update = dense_update(A, part.tensors[f"{path}.gralora_B"])
        if part.config.hybrid_r:
            down = part.tensors[f"{path}.gralora_A_general.weight"].double()
            up = part.tensors[f"{path}.gralora_B_general.weight"].double().flatten(1)
            update += torch.einsum("or,ri...->oi...", up, down)
        r, k, alpha = layer_settings(part.config, path)
        assert A.shape[:3:2] == (k, r)
        found[path] = update * alpha / (r + part.config.hybrid_r)
    return found


def merged(adapters: Iterable[tuple[Path, float | Mapping[str, float]]], pipe: Any = None) -> Any:
    """A bare pipeline with updates by the definition added to its weights, in float64.

    ``adapters`` are folders with their weight, which may be one for each component.
    """
    pipe = pipe or stable_diffusion()
    for folder, weight in adapters:
        for component, part in read_adapter(folder).components.items():
            scale = weight.get(component, 1.0) if isinstance(weight, Mapping) else weight
            for path, update in dense_updates(part).items():
                base = getattr(pipe, component).get_submodule(path).weight
                base.data = (base.double() + update * scale).to(base.dtype)
    return pipe


def structure(*models: nn.Module) -> list[Any]:
    """What a failed call must leave alone: modules, weights, what is trained, hooks, adapters."""
    described: list[Any] = []
    for model in models:
        for name, module in model.named_modules():
            hooks = [len(module._forward_hooks), len(module._forward_pre_hooks)]
            hooks.append("forward" in vars(module))
            active = getattr(module, "_active_adapter", None)
            described.append((name, id(module), type(module), module.training, hooks, active))
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            sums = tensor.detach().double().sum().item(), tensor._version
            described.append((name, id(tensor), tensor.dtype, tensor.requires_grad, sums))
        described.append(sorted(getattr(model, "peft_config", {})))
        described.append(bool(getattr(model, "_hf_peft_config_loaded", False)))
    return described
