"""The bundled samples: a tiny base, encoders, subjects, files of options and nodes for ComfyUI.

They are the repository's folder ``samples``. A wheel has it inside the package; a clone and an
editable installation have it beside the package.
"""

from __future__ import annotations

from pathlib import Path

from .file_names import real_path

_CONFIGS, _SUFFIX = "configs", ".yaml"
#: What the names of most configs end in, which is left out of the names that users give.
_USUAL = "_dreambooth"
#: What the names of the benchmark's configs begin with.
_OF_BENCHMARK = "benchmark_"
_PREFIX = "samples/"


def samples_folder() -> Path:
    """Return the folder of the bundled samples.

    Raises:
        FileNotFoundError: the package was copied without them.
    """
    package = Path(__file__).resolve().parents[1]
    places = (package / "samples", package.parent / "samples")
    for place in places:
        if (place / _CONFIGS).is_dir():
            return place
    raise FileNotFoundError(
        f"the samples of gralora_diffusion are missing: neither {places[0]} nor {places[1]} "
        "contains them. Install the package again"
    )


def config_names(benchmark: bool = False) -> list[str]:
    """Return the names under which ``find_config`` finds the bundled files of options.

    Args:
        benchmark: those for the benchmark, in place of those for the trainer.
    """
    try:
        files = (samples_folder() / _CONFIGS).glob(f"*{_SUFFIX}")
    except FileNotFoundError:
        return []
    names = (file.name.removesuffix(_SUFFIX).removesuffix(_USUAL) for file in files)
    return sorted(name for name in names if name.startswith(_OF_BENCHMARK) == benchmark)


def find_config(name: str) -> Path:
    """Return the file that ``--config`` names: a file, or a bundled one by its name.

    ``sdxl``, ``sdxl_dreambooth`` and ``sdxl_dreambooth.yaml`` all name ``sdxl_dreambooth.yaml``. A
    file at this path comes first. What is neither is returned as a path.
    """
    path = Path(name)
    if path.is_dir() or not path.exists():
        stem = name.removesuffix(_SUFFIX).removesuffix(_USUAL)
        if stem in (*config_names(), *config_names(benchmark=True)):
            folder = samples_folder() / _CONFIGS
            usual = folder / f"{stem}{_USUAL}{_SUFFIX}"
            return usual if usual.is_file() else folder / f"{stem}{_SUFFIX}"
    return path


def is_bundled(path: Path) -> bool:
    """Whether a file is one of the bundled samples."""
    try:
        return real_path(path).is_relative_to(samples_folder())
    except FileNotFoundError:
        return False


def locate(text: str) -> str:
    """Return a value of a bundled config with its path below ``samples/`` as it is found from here.

    The path may follow a name: ``dino=samples/tiny-encoders/dino``. It is relative if it lies in
    the current folder. Other values are unchanged.
    """
    name, equals, source = text.rpartition("=")
    if not source.startswith(_PREFIX):
        return text
    path = samples_folder() / source.removeprefix(_PREFIX)
    here = Path.cwd()
    shown = path.relative_to(here) if path.is_relative_to(here) else path
    return f"{name}{equals}{shown}"
