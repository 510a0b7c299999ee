"""What Ray runs on a machine of the cluster: importing this module takes a moment alone."""

from __future__ import annotations

from gralora_diffusion.io.process import lasting_imports, own_process

from .jobs import Files, Job, Reply
from .node_check import Requirements, node_name, node_problems
from .settings import leave_out_unused_by


def check_node(required: Requirements) -> tuple[str, list[str]]:
    """Return this machine's name, and why it cannot run trials, if it cannot."""
    return node_name(), node_problems(required)


def run_task(job: Job, shared: Files) -> Reply:
    """Run a job in a process that is Ray's."""
    own_process()
    leave_out_unused_by(job.settings)
    with lasting_imports():
        from .node import run_job  # imports torch, diffusers and PEFT

    return run_job(job, shared)
