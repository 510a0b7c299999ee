"""The training stages of the tiny base: autoencoder, its latents, UNet with text encoder."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
import tiny_base_models as models
import tiny_world
import torch
from accelerate.utils import gather
from diffusers import AutoencoderKL
from diffusers.training_utils import EMAModel
from PIL import Image
from tiny_base_run import Clock, Run, learning_rate
from torch import nn
from torch.nn import functional


def to_pixels(images: list[Image.Image]) -> torch.Tensor:
    """Convert RGB images to a (b, 3, 64, 64) float tensor in -1..1."""
    array = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float() / 127.5 - 1


def psnr(prediction: torch.Tensor, target: torch.Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB of pixels in -1..1, over the whole batch."""
    return 10 * math.log10(4 / functional.mse_loss(prediction.clamp(-1, 1), target).item())


def vae_batch(rng: random.Random, size: int) -> torch.Tensor:
    """Draw a batch (size, 3, 64, 64): four of ten images from the world, the others any shapes."""
    images = [
        tiny_world.sample(rng).image if rng.random() < 0.4 else tiny_world.sample_shapes(rng)
        for _ in range(size)
    ]
    return to_pixels(images)


class Reconstruction(nn.Module):
    """An autoencoder that returns its latents, too."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the reconstruction (b, 3, 64, 64) of pixels, and the latents it was made from."""
        latents = self.vae.encode(pixels).latent_dist.sample()
        return self.vae.decode(latents).sample, latents


def train_vae(
    run: Run,
    vae: AutoencoderKL,
    steps: int,
    batch_size: int,
    peak: float,
    regularize: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> None:
    """Train the autoencoder on images drawn on the fly, and write `vae.pt`.

    There is no KL term: at the usual weights it only sets the latents' scale, which is normalized
    afterwards, or by `regularize`, a loss of the latents.
    """
    if run.load("vae.pt"):
        return
    optimizer = torch.optim.AdamW(vae.parameters(), lr=peak, betas=(0.9, 0.99), weight_decay=1e-4)
    step, spent = 0, 0.0
    if state := run.load("vae_checkpoint.pt"):
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["spent"]
    model = run.accelerator.prepare_model(Reconstruction(vae))
    held_out = vae_batch(random.Random("held out"), 64)
    clock = Clock(spent)
    while step < steps:
        rate = optimizer.param_groups[0]["lr"] = learning_rate(step, steps, peak)
        pixels = vae_batch(run.rng("vae", step), batch_size)
        reconstruction, latents = model(pixels)
        error = functional.mse_loss(reconstruction, pixels)
        loss = error + 0.1 * functional.l1_loss(reconstruction, pixels)
        if regularize is not None:
            loss = loss + regularize(latents)
        run.accelerator.backward(loss)
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 100 == 0 or step == steps:
            with torch.no_grad():
                quality = psnr(vae(held_out).sample, held_out)
            samples = step * batch_size * run.accelerator.num_processes
            record = {"step": step, "samples": samples, "loss": loss.item(), "psnr": quality}
            run.log(stage="vae", **record, lr=rate, sec=clock.spent)
        if clock.is_time_to_save() or step == steps:
            state = {"vae": vae.state_dict(), "optimizer": optimizer.state_dict()}
            run.save("vae_checkpoint.pt", {**state, "step": step, "spent": clock.spent})
    run.save("vae.pt", vae.state_dict())
    run.accelerator.wait_for_everyone()


def load_vae(run: Run, name: str) -> AutoencoderKL:
    """Load the autoencoder that a stage wrote to the work directory."""
    vae = models.build_vae().eval()
    vae.load_state_dict(run.require(name))
    return vae


def world_rng(run: Run, index: int) -> random.Random:
    """Return the random source of one of the images that the UNet is trained on."""
    return random.Random(f"{run.seed}/world/{index}")


@torch.no_grad()
def world_latents(run: Run, vae: AutoencoderKL, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return means and standard deviations of `count` images' latents, both (count, c, h, w)."""
    rank, world = run.accelerator.process_index, run.accelerator.num_processes
    first, last = rank * count // world, (rank + 1) * count // world
    means, stds = [], []
    for start in range(first, last, 32):
        indices = range(start, min(start + 32, last))
        images = [tiny_world.sample(world_rng(run, index)).image for index in indices]
        posterior = vae.encode(to_pixels(images)).latent_dist
        means.append(posterior.mean)
        stds.append(posterior.std)
    return gather(torch.cat(means)), gather(torch.cat(stds))


@torch.no_grad()
def encode_world(run: Run, count: int) -> None:
    """Encode `count` images once, and write `latents.pt` with their VAE, `vae_normalised.pt`.

    The latents' means and standard deviations are both (count, 8, 16, 16), in half precision.
    """
    if run.load("vae_normalised.pt"):
        return
    vae = load_vae(run, "vae.pt")
    mean, std = world_latents(run, vae, count)
    centre, scale = mean.mean((0, 2, 3)), mean.std((0, 2, 3))  # per channel
    mean = (mean - centre[:, None, None]) / scale[:, None, None]
    std = std / scale[:, None, None]
    run.save("latents.pt", {"mean": mean.half(), "std": std.half()})
    models.normalise_latents(vae, centre, scale)
    run.save("vae_normalised.pt", vae.state_dict())
    run.accelerator.wait_for_everyone()


def unet_batch(
    rng: random.Random,
    latents: dict[str, torch.Tensor],
    shown: list[tuple[str, str, str]],
    size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[str]]:
    """Return clean latents, noise, timesteps and captions; `shown` describes the latents' images.

    One timestep comes from each of `size` equal bands, which steadies the loss. A tenth of the
    captions are empty, for classifier-free guidance.
    """
    chosen = [rng.randrange(len(shown)) for _ in range(size)]
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    mean, std = latents["mean"][chosen].float(), latents["std"][chosen].float()
    clean = mean + std * torch.randn(mean.shape, generator=generator)
    noise = torch.randn(mean.shape, generator=generator)
    bands = (torch.arange(size) + torch.rand(size, generator=generator)) / size
    captions = [
        "" if rng.random() < 0.1 else tiny_world.describe(*shown[index], rng) for index in chosen
    ]
    return clean, noise, (bands * 1000).long().clamp(max=999), captions


def build_ema(denoiser: nn.Module) -> EMAModel:
    """Return a moving average of the weights that follows quickly at first."""
    return EMAModel(
        denoiser.parameters(), decay=0.9995, use_ema_warmup=True, power=0.75, foreach=True
    )


def train_denoiser(
    run: Run,
    stage: str,
    denoiser: nn.Module,
    steps: int,
    batch_size: int,
    peak: float,
    loss_of: Callable[[nn.Module, int], torch.Tensor],
) -> None:
    """Train all weights of a module; `<stage>_checkpoint.pt` also has their average.

    `loss_of` returns the loss of the module at a step, which has `batch_size` samples.
    """
    parameters = list(denoiser.train().parameters())
    optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.99), weight_decay=1e-2)
    ema = build_ema(denoiser)
    step, spent, losses = 0, 0.0, []
    if state := run.load(f"{stage}_checkpoint.pt"):
        denoiser.load_state_dict(state["denoiser"])
        optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["ema"])
        step, spent = state["step"], state["spent"]
    model = run.accelerator.prepare_model(denoiser)
    clock = Clock(spent)
    while step < steps:
        rate = optimizer.param_groups[0]["lr"] = learning_rate(step, steps, peak)
        loss = loss_of(model, step)
        run.accelerator.backward(loss)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(parameters)
        losses.append(loss.item())
        step += 1
        if step % 100 == 0 or step == steps:
            samples = step * batch_size * run.accelerator.num_processes
            record = {"step": step, "samples": samples, "loss": sum(losses) / len(losses)}
            run.log(stage=stage, **record, lr=rate, sec=clock.spent)
            losses = []
        if clock.is_time_to_save() or step == steps:
            state = {"denoiser": denoiser.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"ema": ema.state_dict(), "step": step, "spent": clock.spent}
            run.save(f"{stage}_checkpoint.pt", state)
    run.accelerator.wait_for_everyone()


def load_average(run: Run, stage: str, denoiser: nn.Module) -> int:
    """Give a module the averaged weights of a stage's last checkpoint; return the steps of that."""
    state = run.require(f"{stage}_checkpoint.pt")
    ema = build_ema(denoiser.eval())
    ema.load_state_dict(state["ema"])
    ema.copy_to(denoiser.parameters())
    return int(state["step"])


def train_unet(run: Run, steps: int, batch_size: int, peak: float, bf16: bool) -> None:
    """Train UNet and text encoder on the latents; `unet_checkpoint.pt` also has their average."""
    latents = run.require("latents.pt")
    count = len(latents["mean"])
    shown = [tiny_world.combination(world_rng(run, index)) for index in range(count)]
    tokenizer, scheduler = models.build_tokenizer(), models.build_scheduler()

    def loss_of(denoiser: nn.Module, step: int) -> torch.Tensor:
        rng = run.rng("unet", step)
        clean, noise, timesteps, captions = unet_batch(rng, latents, shown, batch_size)
        noisy_latents = scheduler.add_noise(clean, noise, timesteps)
        ids = models.tokenize(tokenizer, captions)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            prediction = denoiser(noisy_latents, timesteps, ids)
        target = scheduler.get_velocity(clean, noise, timesteps)
        return functional.mse_loss(prediction.float(), target)

    denoiser = models.Denoiser(models.build_unet(), models.build_text_encoder(tokenizer))
    train_denoiser(run, "unet", denoiser, steps, batch_size, peak, loss_of)
