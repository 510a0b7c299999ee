"""The adapter of a run: put on the base, read out, put back, averaged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from peft import GraloraConfig
from torch import nn

from ..compatibility import adapter_tensors, set_adapter_tensors
from ..families import ModelFamily
from ..injection import TargetError, inject
from ..layers import GraloraLayer
from ..state import Adapter, ComponentAdapter, config_to_dict, read_adapter
from .checkpoint import CheckpointError
from .config import TrainingConfig
from .config_checks import ConfigError
from .optimizers import evaluating
from .streams import seed_from

ADAPTER_NAME = "default"


def trained_components(config: TrainingConfig, family: ModelFamily) -> tuple[str, ...]:
    """Attributes of the pipeline that get an adapter, the denoiser first."""
    if not config.train_text_encoder:
        return (family.denoiser,)
    chosen = config.text_encoders or family.usual_text_encoders or family.text_encoders
    return (family.denoiser, *(name for name in family.text_encoders if name in chosen))


def add_adapters(pipe: Any, family: ModelFamily, config: TrainingConfig) -> tuple[str, ...]:
    """Inject new adapters in fp32, the same for the same seed. Returns the components' names.

    Raises:
        ConfigError: rank, k or targets do not fit the base; names every layer at fault.
    """
    components = trained_components(config, family)
    for component in components:
        model = getattr(pipe, component)
        if model is None:
            raise ConfigError([f"--text_encoders names {component}, which this base lacks"])
        try:
            adapter_config = _adapter_config(model, component, family, config)
            torch.manual_seed(seed_from(config.seed, "adapter", component))
            inject(model, adapter_config, ADAPTER_NAME)
        except (TargetError, ValueError) as error:
            flags = "--rank, --gralora_k, --lora_layers or --target_preset"
            raise ConfigError([f"{flags} do not fit the base: {error}"]) from error
        for layer in model.modules():
            if isinstance(layer, GraloraLayer):
                # half precision would lose the small steps of an optimizer
                layer.cast_adapter(ADAPTER_NAME, torch.float32)
                layer.set_adapter(ADAPTER_NAME)
    return components


def _adapter_config(
    model: nn.Module, component: str, family: ModelFamily, config: TrainingConfig
) -> GraloraConfig:
    is_denoiser = component == family.denoiser
    targets = config.target_modules if is_denoiser else None
    if targets is None:
        preset = config.target_preset if is_denoiser else config.text_encoder_target_preset
        targets = family.resolve_preset(component, preset, model)
    return GraloraConfig(
        r=config.rank,
        gralora_k=config.gralora_k,
        hybrid_r=config.hybrid_rank,
        alpha=config.alpha,
        gralora_dropout=config.lora_dropout,
        target_modules=targets,
    )


def adapter_parameters(pipe: Any, component: str) -> list[nn.Parameter]:
    """The trained parameters of one component, in the model's order."""
    return [p for p in getattr(pipe, component).parameters() if p.requires_grad]


def read_out(pipe: Any, family: ModelFamily, components: Sequence[str]) -> Adapter:
    """Copy the adapter's present weights out of the models."""
    return Adapter(
        {
            component: ComponentAdapter(
                model.peft_config[ADAPTER_NAME],
                {
                    key: tensor.detach().clone()
                    for key, tensor in adapter_tensors(model, ADAPTER_NAME).items()
                },
            )
            for component in components
            for model in [getattr(pipe, component)]
        },
        family.name,
    )


def put_back(pipe: Any, components: Sequence[str], path: Path) -> None:
    """Load weights that :func:`read_out` and ``save_adapter`` wrote into the models.

    Raises:
        CheckpointError: the checkpoint's adapter has another shape than this run's.
    """
    adapter = read_adapter(path)
    for component in components:
        model = getattr(pipe, component)
        ours = config_to_dict(model.peft_config[ADAPTER_NAME])
        part = adapter.components.get(component)
        theirs = config_to_dict(part.config) if part else {}
        differing = sorted(key for key in ours if ours[key] != theirs.get(key))
        if part is None or differing or set(adapter.components) != set(components):
            what = ", ".join(f"{k}: {theirs.get(k)} there, {ours[k]} here" for k in differing)
            what = what or f"it adapts {', '.join(adapter.components)}"
            raise CheckpointError(
                f"{path} is of another run ({what}). Resume with that run's options."
            )
        set_adapter_tensors(model, ADAPTER_NAME, part.tensors)


@contextmanager
def weights_for_use(
    parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, ema: EMAModel | None
) -> Iterator[None]:
    """Inside, the parameters hold what is to be used: the average of EMA or of schedule-free.

    Afterwards they are what they were, bit for bit.
    """
    with evaluating(optimizer):
        if ema is None:
            yield
            return
        ema.store(parameters)
        ema.copy_to(parameters)
        try:
            yield
        finally:
            ema.restore(parameters)
