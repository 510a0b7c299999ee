#!/usr/bin/env python
"""Train a GraLoRA adapter with DreamBooth.

    accelerate launch train_scripts/train_dreambooth_gralora.py \\
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --instance_data_dir my_pictures --instance_prompt "a photo of sks dog" \\
        --output_dir my_adapter

``--help`` lists every option; docs/training/ explains them.
"""

from gralora_diffusion.training.main import main

if __name__ == "__main__":
    main()
