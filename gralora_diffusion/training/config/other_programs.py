"""What kohya's scripts, ai-toolkit, OneTrainer, diffusers and PEFT call the trainer's options.

Values are the name here, or a sentence that goes on after the other name. Nested names are written
as ``section.name``; a name without its section counts in every section.
"""

from __future__ import annotations

_FOUND = "is detected automatically. Leave it out"
_FP32 = "does not exist here: the adapter is saved in fp32. `gralora export --dtype` converts it"
_ATTENTION = "is not needed: torch's own attention is always used. Leave it out"
_DEVICE = (
    "does not exist here: accelerate finds the GPU. To choose one, set the environment variable "
    "CUDA_VISIBLE_DEVICES"
)
_CAPTIONS = (
    "does not exist here: captions are read automatically from .txt, .caption and .json files "
    "beside the images"
)
_ENCODED = "is not needed: prompts are encoded once unless --train_text_encoder is given"
_KIND = "is not needed: the adapter is always a GraLoRA"
_ADAPTER = "does not exist here. The adapter's size is --rank and --gralora_k"
_MEMORY = "does not exist here. --quantization and --gradient_checkpointing save memory"
_OFFLOAD = (
    "is called --offload_base here, with the fraction of the blocks that stays on the GPU; auto, "
    "the default, chooses it"
)
_NAME = "does not exist here: the adapter is a file in the folder --output_dir"
_SCHEDULER = "does not exist here: the base's own scheduler is used"

#: Scripts of kohya (sd-scripts).
KOHYA = {
    "train_data_dir": "instance_data_dir",
    "reg_data_dir": "class_data_dir",
    "in_json": _CAPTIONS,
    "dataset_config": "is called --data_config here, and is a YAML file",
    "config_file": "config",
    "network_dim": "rank",
    "network_alpha": "lora_alpha",
    "network_dropout": "lora_dropout",
    "network_weights": "initial_adapter",
    "network_module": _KIND,
    "network_args": "does not exist here. See --gralora_k, --rank_pattern and --lora_layers",
    "network_train_unet_only": "is not needed: text encoders are trained with --train_text_encoder",
    "network_train_text_encoder_only": "does not exist here: the denoiser is always adapted",
    "unet_lr": "learning_rate",
    "lr_scheduler_type": "lr_scheduler",
    "lr_scheduler_num_cycles": "lr_num_cycles",
    "lr_scheduler_power": "lr_power",
    "max_train_epochs": "num_train_epochs",
    "save_every_n_steps": "checkpointing_steps",
    "save_every_n_epochs": "does not exist here. Give --checkpointing_steps, in optimizer steps",
    "save_last_n_steps": "checkpoints_total_limit",
    "save_last_n_epochs": "checkpoints_total_limit",
    "save_state": "is not needed: every checkpoint can be resumed. See --checkpointing_steps",
    "output_name": _NAME,
    "save_model_as": "does not exist here: the file is .safetensors. See `gralora export`",
    "save_precision": _FP32,
    "vae": "pretrained_vae_model_name_or_path",
    "conditioning_data_dir": "mask_data_dir",
    "alpha_mask": "mask_from_alpha",
    "caption_extension": _CAPTIONS,
    "shuffle_caption": "shuffle_tags",
    "keep_tokens": "keep_tags",
    "caption_tag_dropout_rate": "tag_dropout",
    "caption_dropout_rate": "caption_dropout",
    "enable_bucket": "use_aspect_ratio_buckets",
    "min_bucket_reso": "does not exist here. Sizes can be given as --aspect_ratio_buckets",
    "max_bucket_reso": "does not exist here. Sizes can be given as --aspect_ratio_buckets",
    "bucket_reso_steps": "does not exist here. Sizes can be given as --aspect_ratio_buckets",
    "bucket_no_upscale": "does not exist here: --use_aspect_ratio_buckets does not enlarge images",
    "cache_latents_to_disk": "latent_cache_dir",
    "cache_text_encoder_outputs": _ENCODED,
    "cache_text_encoder_outputs_to_disk": "latent_cache_dir",
    "flip_aug": "random_flip",
    "random_crop": "is not needed: crops are random unless --center_crop is given",
    "optimizer_type": "optimizer",
    "min_snr_gamma": "snr_gamma",
    "ip_noise_gamma": "input_perturbation",
    "v_parameterization": "is called --prediction_type v_prediction here",
    "timestep_sampling": "weighting_scheme",
    "discrete_flow_shift": "flow_shift",
    "sample_prompts": "validation_prompts_file",
    "sample_every_n_steps": "validation_steps",
    "sample_every_n_epochs": "validation_epochs",
    "sample_sampler": _SCHEDULER,
    "xformers": "enable_xformers_memory_efficient_attention",
    "sdpa": _ATTENTION,
    "mem_eff_attn": _ATTENTION,
    "fp8_base": "is called --quantization torchao-fp8 here",
    "full_fp16": "does not exist here: the adapter stays in fp32. See --mixed_precision",
    "full_bf16": "does not exist here: the adapter stays in fp32. See --mixed_precision",
    "no_half_vae": "is not needed: the VAE is kept from overflowing. Leave it out",
    "blocks_to_swap": _OFFLOAD,
    "block_swap_h2d_only": _OFFLOAD,
    "lowram": _MEMORY,
    "max_data_loader_n_workers": "dataloader_num_workers",
    "persistent_data_loader_workers": "is not needed. See --dataloader_num_workers",
    "max_token_length": "max_sequence_length",
    "resume": "resume_from_checkpoint",
    "log_with": "report_to",
    "huggingface_repo_id": "hub_model_id",
    "huggingface_token": "hub_token",
    "num_repeats": "repeats",
    "v2": _FOUND,
    "sdxl": _FOUND,
}
#: ai-toolkit, whose files are nested.
AI_TOOLKIT = {
    "model.name": "pretrained_model_name_or_path",
    "model.path": "pretrained_model_name_or_path",
    "name_or_path": "pretrained_model_name_or_path",
    "arch": "family",
    "is_flux": _FOUND,
    "is_xl": _FOUND,
    "is_v3": _FOUND,
    "quantize": "quantization",
    "quantize_te": "quantize_text_encoders",
    "low_vram": _MEMORY,
    "layer_offloading": _OFFLOAD,
    "layer_offloading_transformer_percent": _OFFLOAD,
    "datasets": "is a file of its own here, --data_config",
    "folder_path": "instance_data_dir",
    "control_path": "control_data_dir",
    "ctrl_img": "validation_image",
    "mask_path": "mask_data_dir",
    "mask_min_value": "mask_outside_weight",
    "caption_ext": _CAPTIONS,
    "shuffle_tokens": "shuffle_tags",
    "token_dropout_rate": "tag_dropout",
    "network.type": _KIND,
    "linear": "rank",
    "linear_alpha": "lora_alpha",
    "conv": "does not exist here. Convolutions are adapted by --target_preset and --lora_layers",
    "conv_alpha": "does not exist here. See --alpha_pattern",
    "train.optimizer": "optimizer",
    "train.dtype": "mixed_precision",
    "train_unet": "is not needed: the denoiser is always adapted",
    "noise_scheduler": _SCHEDULER,
    "gradient_accumulation": "gradient_accumulation_steps",
    "save.dtype": _FP32,
    "save_every": "checkpointing_steps",
    "max_step_saves_to_keep": "checkpoints_total_limit",
    "training_folder": "output_dir",
    "prompts": "validation_prompt",
    "sample_every": "validation_steps",
    "sample.width": "validation_width",
    "sample.height": "validation_height",
    "sample.seed": "seed",
    "sample.guidance_scale": "validation_guidance_scale",
    "sample_steps": "validation_inference_steps",
    "neg": "validation_negative_prompt",
    "sampler": _SCHEDULER,
    "device": _DEVICE,
    "dtype": "mixed_precision",
    "performance_log_every": "does not exist here: every step is logged",
}
#: OneTrainer.
ONETRAINER = {
    "base_model_name": "pretrained_model_name_or_path",
    "concept_file_name": "instance_data_dir",
    "output_model_destination": "output_dir",
    "workspace_dir": "output_dir",
    "model_type": "family",
    "training_method": _KIND,
    "peft_type": _KIND,
    "lora_rank": "rank",
    "learning_rate_scheduler": "lr_scheduler",
    "learning_rate_warmup_steps": "lr_warmup_steps",
    "learning_rate_cycles": "lr_num_cycles",
    "clip_grad_norm": "max_grad_norm",
    "train_dtype": "mixed_precision",
    "weight_dtype": "mixed_precision",
    "output_dtype": _FP32,
    "aspect_ratio_bucketing": "use_aspect_ratio_buckets",
    "masked_training": "masked_loss",
    "unmasked_weight": "mask_outside_weight",
    "masked_prior_preservation_weight": "is called --mask_outside base here, with "
    "--mask_outside_weight",
    "latent_caching": "cache_latents",
    "layer_filter": "lora_layers",
    "layer_offload_fraction": _OFFLOAD,
    "dropout_probability": "lora_dropout",
    "offset_noise_weight": "noise_offset",
    "timestep_shift": "flow_shift",
    "timestep_distribution": "weighting_scheme",
    "sample_after": "validation_steps",
    "backup_after": "checkpointing_steps",
    "dataloader_threads": "dataloader_num_workers",
    "ema": "use_ema",
}
#: Names of PEFT, and short ones that people try.
USUAL = {
    "lr": "learning_rate",
    "te_lr": "text_encoder_lr",
    "lr_te": "text_encoder_lr",
    **dict.fromkeys(("steps", "max_steps", "num_steps", "train_steps"), "max_train_steps"),
    **dict.fromkeys(("num_train_steps", "iterations", "iters"), "max_train_steps"),
    **dict.fromkeys(("epochs", "epoch", "num_epochs", "max_epochs"), "num_train_epochs"),
    **dict.fromkeys(("bs", "batch", "batch_size"), "train_batch_size"),
    **dict.fromkeys(("grad_accum", "grad_accum_steps"), "gradient_accumulation_steps"),
    **dict.fromkeys(("accumulation_steps", "accumulation"), "gradient_accumulation_steps"),
    **dict.fromkeys(("r", "dim", "lora_r", "lora_dim"), "rank"),
    **dict.fromkeys(("k", "blocks", "num_blocks"), "gralora_k"),
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "target_modules": "lora_layers",
    **dict.fromkeys(("model", "base", "base_model"), "pretrained_model_name_or_path"),
    **dict.fromkeys(("model_name", "model_path", "model_id"), "pretrained_model_name_or_path"),
    **dict.fromkeys(("model_name_or_path", "pretrained_model"), "pretrained_model_name_or_path"),
    **dict.fromkeys(("checkpoint_path", "ckpt", "ckpt_path"), "pretrained_model_name_or_path"),
    **dict.fromkeys(("data", "data_dir", "train_dir", "image_dir"), "instance_data_dir"),
    **dict.fromkeys(("images", "image_folder", "images_dir", "input_dir"), "instance_data_dir"),
    **dict.fromkeys(("dataset", "dataset_dir", "dataset_path"), "instance_data_dir"),
    "instance_dir": "instance_data_dir",
    "class_dir": "class_data_dir",
    **dict.fromkeys(("prompt", "instance_token", "token_string"), "instance_prompt"),
    "trigger": "trigger_word",
    **dict.fromkeys(("output", "out", "outdir", "out_dir", "save_dir"), "output_dir"),
    "output_path": "output_dir",
    "name": _NAME,
    **dict.fromkeys(("precision", "amp"), "mixed_precision"),
    "fp16": "is called --mixed_precision fp16 here",
    "bf16": "is called --mixed_precision bf16 here",
    **dict.fromkeys(("num_workers", "workers"), "dataloader_num_workers"),
    **dict.fromkeys(("scheduler", "lr_schedule"), "lr_scheduler"),
    **dict.fromkeys(("warmup", "warmup_steps", "num_warmup_steps"), "lr_warmup_steps"),
    **dict.fromkeys(("size", "image_size", "img_size", "res"), "resolution"),
    "width": "does not exist here. Images are square, or see --aspect_ratio_buckets",
    "height": "does not exist here. Images are square, or see --aspect_ratio_buckets",
    "weight_decay": "adam_weight_decay",
    "optim": "optimizer",
    "wd": "adam_weight_decay",
    "grad_clip": "max_grad_norm",
    "save_steps": "checkpointing_steps",
    "val_prompt": "validation_prompt",
    "validation_images": "validation_image",
    **dict.fromkeys(("control_dir", "control_directory"), "control_data_dir"),
    **dict.fromkeys(("cond_image_column", "original_image_column"), "control_column"),
    "edited_image_column": "image_column",
    "edit_prompt_column": "caption_column",
    "conditioning_dropout_prob": "does not exist here. See --caption_dropout and --control_dropout",
    "negative_prompt": "validation_negative_prompt",
    "num_inference_steps": "validation_inference_steps",
    "validation_prompts": "validation_prompt",
    "token": "hub_token",
    "hf_token": "hub_token",
    "random_seed": "seed",
    "wandb": "is called --report_to wandb here",
    **dict.fromkeys(("gpu", "gpus", "gpu_id", "gpu_ids", "device_ids", "cuda"), _DEVICE),
    "load_in_8bit": "is called --quantization bnb-int8 here",
    "load_in_4bit": "is called --quantization bnb-nf4 here",
    "init_lora_weights": "initial_adapter",
    "flip": "random_flip",
    "overwrite": "overwrite_output_dir",
    "snr": "snr_gamma",
}
#: Options of diffusers' scripts that do not exist here -> the reason, or what replaces them.
NOT_CARRIED = {
    "tokenizer_name": "the tokenizer is always the base's",
    "tokenizer_max_length": "the tokenizer's own length is used",
    "pre_compute_text_embeddings": "prompts are always encoded once unless --train_text_encoder",
    "text_encoder_use_attention_mask": "prompts are encoded as in the base's pipeline",
    "class_labels_conditioning": "only text-to-image bases are trained",
    "text_encoder_out_layers": "the layers that the base's pipeline reads are used",
    "precondition_outputs": "the loss compares the denoiser's prediction; see --weighting_scheme",
    "do_edm_style_training": "EDM bases cannot be trained",
    "final_validation_prompt": "images for --validation_prompt are generated at the end, too",
    "offload": "text encoders and VAE leave the device automatically when they are done",
    "upcast_before_saving": "the adapter is trained and saved in fp32",
    "lora_blocks": "name the layers with --lora_layers, such as 're:.*blocks[.][0-5][.].*to_q'",
    "use_dora": "the adapter is GraLoRA",
    "enable_npu_flash_attention": "torch's own attention is used",
    "fsdp_text_encoder": "text encoders are used once and then leave the device",
    "do_fp8_training": "matrix products in fp8 are not supported; --quantization torchao-fp8 "
    "stores the frozen base in fp8",
}


def _sentence(value: str) -> str:
    return value if " " in value else f"is called --{value} here"


_THEIRS = "is an option of diffusers' scripts that does not exist here:"
#: Name in another program -> how the message goes on after it.
OTHER_NAMES = {
    **{name: _sentence(text) for name, text in (ONETRAINER | AI_TOOLKIT | KOHYA | USUAL).items()},
    **{name: f"{_THEIRS} {reason}" for name, reason in NOT_CARRIED.items()},
}
