"""A dress rehearsal on a GPU that is pretended: ``python -m tests.rehearsal``.

Tensors say ``cuda:0`` while their values lie on the CPU. Autograd, CUDA autocast, gradient
scaling, fused optimizers, checkpoints and offloading run as they would. What CUDA refuses is
refused: tensors of two devices in one operation, and a generator of the CPU for a tensor of the
GPU. Whatever would make the host wait for the GPU is counted. bitsandbytes, Triton, NCCL, streams
and real memory are out of its reach.
"""
