"""README and docs: every command is parsed, every Python block compiles or runs, every link leads
somewhere, and the tree in architecture.md is the tree."""

import ast
import importlib
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from diffusers import (
    DDIMScheduler,
    FluxImg2ImgPipeline,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
)
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.run import get_args_parser as torchrun_parser
from transformers import T5Config, T5EncoderModel

from gralora_diffusion import AdapterFileError, cli, demo, families, get_family
from gralora_diffusion.benchmark.run_config import (
    SETTINGS_NAME,
    SUITES,
    check_same_run,
    parse_settings,
)
from gralora_diffusion.benchmark.settings import BenchmarkSettings
from gralora_diffusion.benchmark.tasks import read_tasks
from gralora_diffusion.export import main as exporting
from gralora_diffusion.inspection import main as inspecting
from gralora_diffusion.io.errors import ConfigError
from gralora_diffusion.lora_import import main as importing
from gralora_diffusion.pipelines import sample_command
from gralora_diffusion.studio import main as studio
from gralora_diffusion.training import caption_command, control_command, data_command
from gralora_diffusion.training.checks.options import find_image_problems, find_problems
from gralora_diffusion.training.config.training_config import TrainingConfig, parse_config
from gralora_diffusion.training.run import train
from tests import ROOT, models
from tests.offloading import offload_groups
from tests.performance import gpu, layer

#: The generated example report quotes what it was made of, and links only within itself.
GENERATED = ROOT / "docs/benchmark_tiny/report.md"
DOCS = [ROOT / "README.md", *sorted({*(ROOT / "docs").rglob("*.md")} - {GENERATED})]
LINKING = [*DOCS, *sorted((*ROOT.glob("samples/**/*.md"), *ROOT.glob(".github/*.md")))]
BENCHMARK_CONFIGS = sorted((ROOT / "samples/configs").glob("benchmark_*.yaml"))
CONFIGS = sorted({*(ROOT / "samples/configs").glob("*.yaml")} - {*BENCHMARK_CONFIGS})
SCRIPT = "train_scripts/train_dreambooth_gralora.py"
PACKAGE = "gralora_diffusion"  # as a module, the same as the command
BENCHMARK = f"{PACKAGE}.benchmark"
BASE = "stable-diffusion-v1-5/stable-diffusion-v1-5"
#: What a machine may lack on which a right command is checked.
OF_THE_MACHINE = ("needs a GPU", "pip install", "cannot be used on this machine")


@dataclass(frozen=True)
class Block:
    """A fenced block: its file, line, what stands behind the fence, and its text."""

    path: Path
    line: int
    info: str
    text: str

    def __str__(self) -> str:
        return f"{_name(self.path)}:{self.line}"


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _blocks(path: Path) -> list[Block]:
    text = path.read_text(encoding="utf-8")
    return [
        Block(path, text[: found.start()].count("\n") + 1, found[1].strip(), found[2])
        for found in re.finditer(r"^```([^\n]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]


BLOCKS = [block for path in DOCS for block in _blocks(path)]


def _commands(block: Block) -> list[list[str]]:
    lines = block.text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


SHELL = [pytest.param(c, id=f"{b}") for b in BLOCKS if b.info == "bash" for c in _commands(b)]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """The repository as a reader of the docs has it, with images of their own beside it."""
    for name in ("samples", "train_scripts", "tests", ".ci", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "my_base.safetensors").touch()
    for folder in (
        "my_pictures",
        "my_other_pictures",
        "my_last_pictures",
        "other_dogs",
        "before",
        "after",
    ):
        (tmp_path / folder).mkdir()
        for i in range(3):
            Image.new("RGB", (48, 32), (80 * i, 90, 20)).save(tmp_path / folder / f"{i}.jpg")
    Image.new("RGB", (48, 32)).save(tmp_path / "a_new_photo.png")
    for block in BLOCKS:  # a file that the text has the reader write says its name
        if block.info == "yaml" and (named := re.match(r"# (\w+\.yaml)\n", block.text)):
            (tmp_path / named[1]).write_text(block.text, encoding="utf-8")
            content = yaml.safe_load(block.text)
            if isinstance(content, list):  # a data file, which another option names
                continue
            run = tmp_path / content["output_dir"]  # what it was run with
            run.mkdir()
            (run / SETTINGS_NAME).write_text(block.text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a tiny base, which goes by the name of the real one, and an adapter for it."""
    folder = tmp_path_factory.mktemp("trained")
    models.stable_diffusion().save_pretrained(folder / BASE)
    (folder / "pictures").mkdir()
    Image.new("RGB", (16, 16)).save(folder / "pictures/0.png")
    options = {
        "pretrained_model_name_or_path": folder / BASE,
        "instance_data_dir": folder / "pictures",
        "instance_prompt": "a",
        "max_train_steps": 1,
        "report_to": "none",
        "output_dir": folder / "adapter",
    }
    train(parse_config([f"--{name}={value}" for name, value in options.items()]))
    return folder


@pytest.fixture
def reader(workplace, trained):
    """The work place with what the docs' Python needs: a base, and adapters for it."""
    shutil.copytree(trained / BASE, BASE)
    for name in ("my_adapter", "my_other_adapter"):
        shutil.copytree(trained / "adapter", name)
    return workplace


# -- shell -----------------------------------------------------------------------------------------


def _program(command: list[str]) -> tuple[str, list[str]]:
    """What a command line starts, by whatever launcher, and the arguments of that."""
    program, *rest = [word for word in command if not re.match(r"[A-Z_]+=", word)]
    if (program, *rest[:1]) == ("accelerate", "launch"):
        launch = launch_command_parser().parse_args(rest[1:])
        assert bool(launch.module) == (launch.training_script in (PACKAGE, BENCHMARK))
        program, rest = launch.training_script, launch.training_script_args
    elif program == "torchrun":
        launch = torchrun_parser().parse_args(rest)
        assert bool(launch.module) == (launch.training_script in (PACKAGE, BENCHMARK))
        program, rest = launch.training_script, launch.training_script_args
    elif (program, *rest[:1]) == ("python", "-m"):
        program, *rest = rest[1:]
    if program in ("gralora", PACKAGE):
        program, *rest = f"gralora {rest[0]}", *rest[1:]
    return program, rest


def _problems(config: TrainingConfig) -> list[str]:
    """What is wrong with the trainer's options, wherever they are used."""
    problems = find_problems(config)
    return [p for p in problems if not any(known in p for known in OF_THE_MACHINE)]


def _benchmark_problems(settings: BenchmarkSettings) -> list[str]:
    """The same for the benchmark's, whose check raises for those of its own."""
    settings.check()
    check_same_run(settings)
    config = settings.training
    if not config.dataset_name:  # the benchmark says what is trained on
        config = replace(config, instance_data_dir="my_pictures", instance_prompt="a sks dog")
    elif settings.captions:  # it has them instead of the dataset
        config = replace(config, instance_prompt="a sks dog")
    return _problems(config)


@pytest.mark.parametrize("command", SHELL)
def test_command(command, workplace):
    program, arguments = _program(command)
    if program in (SCRIPT, "gralora train"):
        assert _problems(parse_config(arguments)) == []
    elif program in (BENCHMARK, "gralora benchmark"):
        assert _benchmark_problems(parse_settings(arguments)) == []
    elif program == "gralora data":
        config, sheet, parsed = data_command.read(arguments)
        assert [*parsed.problems, *find_image_problems(config, sheet)] == []
    elif program == "gralora demo":
        assert arguments == []
    elif program.startswith("./"):
        assert os.access(program, os.X_OK)
    elif program in PARSERS:
        PARSERS[program]().parse_args(arguments)
    elif program.startswith("tests.performance."):
        importlib.import_module(program).build_parser().parse_args(arguments)
    elif program in ("tests.fuzzing", "tests.rehearsal"):
        importlib.import_module(f"{program}.__main__").build_parser().parse_args(arguments)
    elif program == "python":
        script = ROOT / arguments[0]
        assert script.is_file()
        assert script.parent.name == "tiny_world"  # on the path of the tests
        importlib.import_module(script.stem).build_parser().parse_args(arguments[1:])
    else:
        assert command[:2] in (["pip", "install"], ["git", "clone"])


SAMPLING = [c for c in SHELL if c.values[0][:2] == ["gralora", "sample"] and BASE in c.values[0]]


@pytest.mark.parametrize("command", SAMPLING)
def test_sampling_command(command, reader):
    cli.main([*command[1:], "--num_inference_steps", "1", "--size", "16"])
    assert Image.open("grid.png").size[0] > 192


#: Commands whose parsers can be had without what they work on.
PARSERS = {
    "gralora caption": caption_command.parser,
    "gralora control": control_command.parser,
    "gralora export": exporting.parser,
    "gralora inspect": inspecting.parser,
    "gralora import": importing.parser,
    "gralora sample": sample_command.parser,
    "gralora samples": demo.samples_parser,
    "gralora studio": studio.parser,
}
OPTIONS = (TrainingConfig, BenchmarkSettings, data_command.SheetOptions)
FLAGS = {f"--{f.name}" for options in OPTIONS for f in fields(options)}
FLAGS |= {f for p in PARSERS.values() for a in p()._actions for f in a.option_strings}
FLAGS |= {f for a in launch_command_parser()._actions for f in a.option_strings}
FLAGS |= {"--version"}
FLAGS |= {f for p in (layer, gpu) for a in p.build_parser()._actions for f in a.option_strings}
#: Flags that the docs name as wrong ones.
WRONG_FLAGS = {"--ranks", "--tokenizer_name", "--do_fp8_training"}


@pytest.mark.parametrize("path", [path for path in DOCS if "options" not in path.name], ids=_name)
def test_flags_in_the_text_exist(path):
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    if path.name == "coming_from.md":  # the first column has those of other programs
        text = re.sub(r"^\|.*? \|", "", text, flags=re.M)
    named = set(re.findall(r"(?<![\w-])--[a-z]\w+", text))
    assert named - FLAGS - WRONG_FLAGS == set()


@pytest.mark.parametrize("path", CONFIGS, ids=_name)
def test_sample_config(path, workplace):
    config = parse_config(["--config", str(path), "--output_dir", "new"])
    if config.instance_data_dir is None:  # what is the user's to say
        config.instance_data_dir, config.instance_prompt = "my_pictures", "a photo of sks dog"
    assert _problems(config) == []


@pytest.mark.parametrize("path", BENCHMARK_CONFIGS, ids=_name)
def test_benchmark_config(path, workplace):
    settings = parse_settings(["--config", str(path), "--output_dir", "new"])
    assert _benchmark_problems(settings) == []
    if settings.dreambooth_dir:  # bundled; a dataset comes from the Hub
        assert {task.subject for task in read_tasks(settings)} == {*settings.subjects}
    assert path.relative_to(ROOT / "samples").as_posix() in SUITES.values()


# -- Python ----------------------------------------------------------------------------------------

PYTHON = [block for block in BLOCKS if block.info.startswith("python")]
RUNNABLE = sorted({block.path for block in PYTHON if block.info == "python runnable"})


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_compiles(block):
    assert block.info in ("python", "python runnable", "python family", "python flux")
    compile(block.text, str(block), "exec")


@pytest.mark.parametrize("path", RUNNABLE, ids=_name)
def test_python_runs(path, reader):
    """The blocks of a page run one after the other, as in a notebook."""
    names = {}
    for block in PYTHON:
        if block.path == path and block.info == "python runnable":
            exec(compile(block.text, str(block), "exec"), names)


def test_python_of_flux_runs(workplace):
    """As it stands there, but for the size of the models."""
    pipe = models.PIPELINES["flux"]()
    pipe.save_pretrained("black-forest-labs/FLUX.1-dev")
    models.adapt_everywhere(pipe, ["transformer"])
    pipe.save_gralora_weights("my_flux_adapter")
    other = models.PIPELINES["flux"](seed=1).transformer
    other.save_pretrained("black-forest-labs/FLUX.1-Kontext-dev/transformer")
    (block,) = [block for block in PYTHON if block.info == "python flux"]
    names = {}
    exec(compile(block.text, str(block), "exec"), names)
    pipe, kontext = names["pipe"], names["kontext"]
    for shared in ("image_to_image", "inpaint"):
        assert names[shared].transformer is pipe.transformer
        assert names[shared].get_list_adapters()["transformer"] == ["dog"]
    assert kontext.text_encoder_2 is pipe.text_encoder_2
    assert kontext.get_list_adapters()["transformer"] == ["dog for Kontext"]
    expected, made = other.x_embedder.weight, kontext.transformer.x_embedder.weight
    assert torch.equal(made, expected.bfloat16())
    for model in (pipe.transformer, pipe.text_encoder, pipe.vae, kontext.transformer):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    FluxImg2ImgPipeline.from_pipe(pipe)  # without dtype all of it would be fp32
    assert {parameter.dtype for parameter in pipe.vae.parameters()} == {torch.float32}


# -- adding a family -------------------------------------------------------------------------------


@pytest.fixture
def family(tmp_path, monkeypatch):
    """The family of adding_a_family.md, found as the package finds its own."""
    (block,) = [block for block in PYTHON if block.info == "python family"]
    folder = tmp_path / "more_families"
    folder.mkdir()
    (folder / "pixart_of_the_docs.py").write_text(block.text, encoding="utf-8")
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(folder)])
    families._families.cache_clear()
    yield get_family("pixart-alpha")
    families._families.cache_clear()


def _pixart() -> PixArtAlphaPipeline:
    torch.manual_seed(0)
    tokenizer = models.tokenizer()
    transformer = PixArtTransformer2DModel(
        sample_size=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        in_channels=4,
        out_channels=8,
        caption_channels=32,
        cross_attention_dim=32,
    )
    torch.nn.init.normal_(transformer.proj_out.weight)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4
    )
    pipe = PixArtAlphaPipeline(
        tokenizer=tokenizer,
        text_encoder=T5EncoderModel(config).eval(),
        vae=models.vae(),
        transformer=transformer.eval(),
        scheduler=DDIMScheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _tensors(value) -> list[torch.Tensor]:
    if isinstance(value, dict):
        value = [value[key] for key in sorted(value)]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in _tensors(item)]
    return [value] if isinstance(value, torch.Tensor) else []


@torch.no_grad()
def test_family_of_the_docs_calls_the_denoiser_as_the_pipeline_does(family):
    pipe, calls, results = _pixart(), [], []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    pipe.transformer.register_forward_hook(lambda module, args, result: results.append(result[0]))
    prompts, latents = ["a cat", "two dogs"], torch.randn(2, 4, 8, 8)
    pipe(
        prompts,
        latents=latents,
        num_inference_steps=1,
        guidance_scale=1.0,
        height=16,
        width=16,
        use_resolution_binning=False,
        clean_caption=False,
        output_type="latent",
    )
    timesteps = calls[0][1]["timestep"]
    conditioning = family.encode_prompts(pipe, prompts)
    assert all(len(tensor) == 2 for tensor in conditioning.values())
    prediction = family.predict(pipe.transformer, calls[0][0][0], timesteps, conditioning)
    assert len(calls) == 2
    theirs, ours = _tensors(calls[0]), _tensors(calls[1])
    assert len(theirs) == len(ours) >= 4
    for expected, got in zip(theirs, ours, strict=True):
        assert torch.equal(expected, got)
    assert torch.equal(prediction, results[0][:, :4])


def test_family_of_the_docs_trains(family, workplace):
    _pixart().save_pretrained("base")
    options = "--pretrained_model_name_or_path base --instance_data_dir my_pictures --rank 8"
    options += " --max_train_steps 2 --learning_rate 1e-2 --report_to none --output_dir adapter"
    train(parse_config([*options.split(), "--instance_prompt", "a dog"]))
    pipe = _pixart()
    report = pipe.load_gralora_weights("adapter")
    assert report.family == "pixart-alpha"
    assert report.layers == {"transformer": 2 * 2 * 4}  # blocks, attentions, layers of each
    state = pipe.transformer.state_dict()
    assert all(tensor.abs().sum() > 0 for key, tensor in state.items() if ".gralora_B" in key)


# -- troubleshooting -------------------------------------------------------------------------------


def _quoted() -> list[str]:
    """The messages in docs/troubleshooting/: in the first cell of a row, or in bold."""
    pages = sorted((ROOT / "docs/troubleshooting").glob("*.md"))
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    places = re.findall(r"^\| (`.*?) \|", text, re.M) + re.findall(r"\*\*(`.*?)\*\*", text)
    spans = [span for place in places for _, span in re.findall(r"(`+)(.+?)\1(?!`)", place)]
    return [span.replace("`", "").strip() for span in spans]


def _is_explained(message: str) -> bool:
    """Whether a page quotes something of the message; dots leave something out."""
    message = message.replace("`", "")
    return any(all(part.strip() in message for part in q.split("...")) for q in _quoted())


#: Words that a message fills in, as the docs' examples have them.
VALUES = (
    "adamw bitsandbytes flux host k missing nan one process prodigy rank tokenizer torchao "
    "torchvision transformer two unet unexpected weights"
)
#: What PEFT, Pillow and the operating system say in messages that the docs explain.
OF_OTHERS = (
    "not found in the base model",
    "types found",
    "object has no attribute",
    "image file is truncated",
    "space left on device",
)


def test_messages_are_quoted_as_the_package_words_them():
    """Runs of plain words, between values and punctuation, stand in one of its strings."""
    trees = (
        ast.parse(path.read_text(encoding="utf-8"))
        for path in (ROOT / "gralora_diffusion").rglob("*.py")
    )
    strings = "\n".join(
        " ".join(node.value.replace("`", "").split())
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    value = rf"\b(?:{VALUES.replace(' ', '|')})\b"
    plain = re.compile(r"(?<![^\s(])[a-z]+(?:'s)?(?: [a-z]+(?:'s)?)+(?![\w.'/-]*[\w/-])")
    stale = [
        f"{words!r} in {message!r}"
        for message in _quoted()
        for words in plain.findall(re.sub(value, "...", message))
        if words not in strings and words not in OF_OTHERS
    ]
    assert not stale, "\n".join(stale)


@pytest.mark.parametrize(
    "arguments",
    [
        "--instance_data_dir dogs",
        "--instance_data_dir empty",
        "--instance_data_dir dog --instance_prompt=",
        "--rank 10 --gralora_k 4",
        "--rank_pattern a=9",
        "--with_prior_preservation --class_data_dir c",
        "--ranks 8",
        "--tokenizer_name x",
        "--do_fp8_training",
        "--quantization torchao-fp8 --bnb_quantization_config_path bnb.json",
        "--lr_scheduler cosine --lr_warmup_steps 5 --max_train_steps 2",
        "--output_dir my_adapter",
    ],
)
def test_option_errors_are_explained(arguments, workplace):
    (workplace / "my_pictures").rename("dog")
    for folder in ("empty", "my_adapter/checkpoint-200"):
        (workplace / folder).mkdir(parents=True)
    right = f"--pretrained_model_name_or_path {BASE} --instance_data_dir dog --instance_prompt a"
    try:
        problems = find_problems(parse_config([*right.split(), *arguments.split()]))
    except ConfigError as error:
        problems = error.problems
    (problem,) = [p for p in problems if not any(known in p for known in OF_THE_MACHINE)]
    assert _is_explained(problem), problem


def _save(tensors, metadata=None):
    save_file(tensors, "changed.safetensors", metadata=metadata)
    return "changed.safetensors"


def _wrong_files():
    """Name -> what to load, given the tensors and the metadata of a right file."""
    key = "gralora_adapter_metadata"
    zeros = {"unet.x.lora_A.weight": torch.zeros(2, 2)}
    return {
        "nothing there": lambda t, m: "no_such/file.safetensors",
        "empty folder": lambda t, m: "my_pictures",
        "not whole": lambda t, m: "my_pictures/0.jpg",
        "a LoRA": lambda t, m: _save(zeros),
        "no metadata": lambda t, m: _save(t),
        "newer": lambda t, m: _save(
            t, {key: m[key].replace('"format_version": 1', '"format_version": 2')}
        ),
        "missing keys": lambda t, m: _save(dict(list(t.items())[1:]), m),
        "NaN": lambda t, m: _save({**t, min(t): t[min(t)] * torch.nan}, m),
    }


@pytest.mark.parametrize("wrong", _wrong_files())
def test_loading_errors_are_explained(wrong, reader):
    with safe_open("my_adapter/pytorch_gralora_weights.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        source = _wrong_files()[wrong](tensors, file.metadata())
    with pytest.raises(AdapterFileError) as caught:
        models.stable_diffusion().load_gralora_weights(source)
    assert _is_explained(str(caught.value)), str(caught.value)


def test_other_errors_of_pipelines_are_explained(reader):
    pipe, messages = models.stable_diffusion(), []

    def refused(call, *arguments, **options):
        with pytest.raises((ValueError, AttributeError)) as caught:
            call(*arguments, **options)
        messages.append(str(caught.value))

    refused(pipe.fuse_gralora)
    pipe.load_gralora_weights("my_adapter", "dog")
    refused(pipe.load_gralora_weights, "my_adapter", "dog")
    refused(pipe.set_lora_device, ["dog"], "cpu")
    offloaded = models.stable_diffusion()
    offload_groups(offloaded.unet, "leaf_level", disk=Path("offloaded"))
    refused(offloaded.load_gralora_weights, "my_adapter")
    pipe.fuse_gralora()
    refused(pipe.fuse_gralora)
    pipe.unfuse_gralora()
    pipe.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    refused(pipe.fuse_gralora)
    file = "my_adapter/pytorch_gralora_weights.safetensors"
    refused(pipe.load_lora_weights, file, adapter_name="other")
    refused(pipe.load_lora_weights, file, adapter_name="dog", hotswap=True)
    assert [message for message in messages if not _is_explained(message)] == []


# -- links and the tree ----------------------------------------------------------------------------


def _anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _links(path: Path) -> list[str]:
    """The relative links of a page, without those in fenced blocks."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]


@pytest.mark.parametrize("path", LINKING, ids=_name)
def test_links(path):
    for target in _links(path):
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        assert file.exists(), target
        assert not anchor or anchor in _anchors(file), target


def _tree() -> set[str]:
    """Paths in the tree of architecture.md; folders end in a slash."""
    (block,) = [block for block in BLOCKS if block.info == "tree"]
    paths: set[str] = set()
    above: list[str] = []
    for line in block.text.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        above = [*above[:depth], name]
        assert "".join(above) not in paths, f"{line!r} is there twice"
        paths.add("".join(above))
    return paths


def _tracked() -> set[str]:
    """The files that git tracks; none where this is no clone."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return set()
    return set(listed.split("\0")) - {""}


def test_tree():
    """Every tracked file is in the tree or in a folder that the tree describes as a whole."""
    if not (files := _tracked()):
        pytest.skip("git tracks nothing here")
    tree = _tree()
    folders = {path for path in tree if path.endswith("/")}
    whole = tuple(f for f in folders if not any(path.startswith(f) for path in tree - {f}))
    assert tree - folders - files == set()
    assert [f for f in whole if not any(path.startswith(f) for path in files)] == []
    assert [path for path in files - tree if not path.startswith(whole)] == []


def test_docs_index_links_every_page():
    index = ROOT / "docs/README.md"
    assert "docs/README.md" in _links(ROOT / "README.md")
    linked = {(index.parent / link.partition("#")[0]).resolve() for link in _links(index)}
    assert {*DOCS[1:], GENERATED} - linked == {index}


def test_family_example_is_what_the_interface_asks_for():
    """A method that a family must have is explained, and the explained ones exist."""
    text = (ROOT / "docs/adding_a_family.md").read_text(encoding="utf-8")
    for name in families.ModelFamily.__abstractmethods__:
        assert f"| `{name}` |" in text
    (row,) = re.findall(r"^\| (`encode_images`.*?) \|", text, re.MULTILINE)
    for name in re.findall(r"`(\w+)`", row):
        assert hasattr(families.ModelFamily, name)
