"""What a training says at its start and at its end."""

from __future__ import annotations

from pathlib import Path

from gralora_diffusion.training.outputs.summary import summary_of_result, summary_of_training


def test_time_loss_and_files(tmp_path: Path) -> None:
    (tmp_path / "validation").mkdir()
    (tmp_path / "metrics.jsonl").touch()
    rows = [{"step": step, "loss": abs(step - 30) / 10} for step in range(1, 41)]
    assert summary_of_result(tmp_path, rows, 3725.4).splitlines() == [
        "time     1 h 2 min",
        "loss     0.9500 at the end; lowest 0.0500 in steps 29 to 30",
        f"files    {tmp_path}/",
        "           metrics.jsonl",
        "           validation/",
    ]
    assert summary_of_result(tmp_path, [], 59.94).splitlines()[0] == "time     59.9 s"
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}, {"step": 3, "loss": 1.0}]
    loss = summary_of_result(tmp_path, rows, 1.0).splitlines()[1]
    assert loss == "loss     1.0000 at the end; lowest 1.0000 in step 3"  # one step overflowed


def test_adapter_and_steps() -> None:
    layers = {"unet": 56, "text_encoder": 12}
    assert summary_of_training(100, 8, 4, layers, 207872) == (
        "adapter  56 layers of the unet, 12 layers of the text_encoder, 207,872 parameters\n"
        "steps    100 of 4 samples, 12.5 epochs"
    )
