"""Adapters on a quantized base: bitsandbytes nf4 and int8, torchao fp8 and int8."""

import copy
from pathlib import Path

import pytest
import torch
from diffusers import PipelineQuantizationConfig, StableDiffusionPipeline, TorchAoConfig
from peft import GraloraConfig
from safetensors.torch import load_file
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.checkpoint import checkpoint
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

import gralora_diffusion  # noqa: F401  gives pipelines their methods
from gralora_diffusion import inject
from gralora_diffusion.adapters.adapter_file import WEIGHTS_NAME, read_adapter
from gralora_diffusion.adapters.layers import GraloraLinear
from gralora_diffusion.adapters.layers.functional import lora_factors
from gralora_diffusion.adapters.placement.targets import base_of, quantization_of
from tests.models import adapt, draw
from tests.quantized import KINDS, dequantized, identical, pipeline, quantize, stored
from tests.reference import dense_update, relative_error

FLOATING = {torch.float32, torch.bfloat16, torch.float16}
STORED_AS = {
    "bnb-nf4": "bitsandbytes Params4bit",
    "bnb-int8": "bitsandbytes Int8Params",
    "torchao-fp8": "torchao Float8Tensor",
    "torchao-int8": "torchao Int8Tensor",
}


class Net(nn.Module):
    """Two layers, so that a gradient passes through a quantized one."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 128)
        self.down = nn.Linear(128, 32, bias=False)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def adapted(kind: str, dtype=torch.float32, **changes) -> nn.Module:
    torch.manual_seed(0)
    values = {"r": 8, "gralora_k": 4, "alpha": 12, "hybrid_r": 2, "init_weights": False}
    values |= {"target_modules": ["up", "down"], **changes}
    return inject(quantize(Net().to(dtype), kind), GraloraConfig(**values))


def update(layer: nn.Module) -> torch.Tensor:
    """The layer's scaled update in float64, differentiable, by the definition."""
    A, B = layer.gralora_A["default"], layer.gralora_B["default"]
    down, up = (p["default"].weight for p in (layer.gralora_A_general, layer.gralora_B_general))
    return 1.2 * (dense_update(A, B) + up.double() @ down.double())  # 12 / (8 + 2)


@pytest.mark.parametrize("kind", KINDS)
class TestLayers:
    def test_forward_and_every_gradient(self, kind):
        """Against the dequantized weight plus the dense update, in float64."""
        for layer in (adapted(kind).up, adapted(kind).down):
            x = torch.randn(3, 5, layer.in_features, requires_grad=True)
            seed = torch.randn(3, 5, layer.out_features)
            out = layer(x)
            (out * seed).sum().backward()
            factors = {n: p for n, p in layer.named_parameters() if p.requires_grad}
            assert len(factors) == 4
            exact = x.detach().double().requires_grad_()
            weight = dequantized(layer.base_layer)
            expected = exact @ (weight + update(layer)).T
            if layer.base_layer.bias is not None:
                expected = expected + layer.base_layer.bias
            gradients = torch.autograd.grad(
                (expected * seed).sum(), [exact, *factors.values()], allow_unused=False
            )
            assert relative_error(out, expected) < 1e-5
            assert relative_error(x.grad, gradients[0]) < 1e-5
            for (name, factor), gradient in zip(factors.items(), gradients[1:], strict=True):
                assert relative_error(factor.grad, gradient) < 1e-5, name

    def test_gradients_of_gradients(self, kind):
        layer = adapted(kind).up
        factors = [p for p in layer.parameters() if p.requires_grad]
        weight, bias = dequantized(layer.base_layer), layer.base_layer.bias
        values = torch.randn(5, 64)
        results = []
        for dtype, function in (
            (torch.float32, layer),
            (torch.float64, lambda x: x @ (weight + update(layer)).T + bias),
        ):
            inputs = [values.to(dtype).requires_grad_(), *factors]
            loss = function(inputs[0]).tanh().sum()
            first = torch.autograd.grad(loss, inputs, create_graph=True)
            penalty = torch.stack([gradient.double().square().sum() for gradient in first]).sum()
            results.append([*first, *torch.autograd.grad(penalty, inputs)])
        for actual, exact in zip(*results, strict=True):
            assert relative_error(actual, exact) < 1e-5

    def test_function_transforms(self, kind):
        """Where the base layer's own product can be transformed."""
        layer, x, along = adapted(kind).up, torch.randn(4, 5, 64), torch.randn(4, 5, 64)
        if kind.startswith("bnb"):  # its product is an autograd.Function without setup_context
            with pytest.raises(RuntimeError, match=r"autograd\.Function with functorch"):
                grad(lambda x: layer.base_layer(x).sum())(x)
            # under torch.func.jvp, its 4-bit product on the CPU has no derivative and says nothing
            with pytest.raises(RuntimeError, match=r"dropped the tangent|autograd\.Function"):
                jvp(layer, (x,), (along,))
            whole = dequantized(layer.base_layer) + update(layer)
            if kind == "bnb-nf4":
                with torch.no_grad(), forward_ad.dual_level():
                    dual = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, along)))
                    assert relative_error(dual.tangent, along.double() @ whole.T) < 1e-5
            tangent = torch.autograd.functional.jvp(layer, x, along)[1]
            assert relative_error(tangent, along.double() @ whole.T) < 1e-5
            return
        whole = dequantized(layer.base_layer) + update(layer)
        assert relative_error(jvp(layer, (x,), (along,))[1], along.double() @ whole.T) < 1e-5
        frozen = {n: p.detach() for n, p in layer.named_parameters() if p.requires_grad}
        each = vmap(grad(lambda f, x: functional_call(layer, f, x).tanh().sum()), (None, 0))
        factors = [layer.get_parameter(name) for name in frozen]
        for n, gradients in enumerate(zip(*each(frozen, x).values(), strict=True)):
            result = x[n].double() @ (dequantized(layer.base_layer) + update(layer)).T
            loss = (result + layer.base_layer.bias).tanh().sum()
            for actual, exact in zip(gradients, torch.autograd.grad(loss, factors), strict=True):
                assert relative_error(actual, exact) < 1e-5

    def test_gradient_checkpointing_and_dropout(self, kind):
        net = adapted(kind, gralora_dropout=0.3).train()
        x = torch.randn(5, 64, requires_grad=True)
        gradients = []
        for run in (net, lambda x: checkpoint(net, x, use_reentrant=False)):
            net.zero_grad()
            x.grad = None
            torch.manual_seed(1)
            run(x).square().mean().backward()
            trained = {n: p.grad for n, p in net.named_parameters() if p.requires_grad}
            gradients.append({**trained, "x": x.grad})
        assert len(gradients[0]) == 9
        for name, gradient in gradients[0].items():
            assert gradient.abs().max() > 0, name
            assert torch.equal(gradients[1][name], gradient), name

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_factors_are_floating_and_outputs_as_the_base_gives_them(self, kind, dtype):
        net = adapted(kind, dtype)
        x = torch.randn(5, 64, dtype=dtype)
        plain = net.up.base_layer(x)
        out = net.up(x)
        assert out.dtype == plain.dtype == dtype
        assert not torch.equal(out, plain)
        assert {p.dtype for n, p in net.named_parameters() if "gralora_" in n} <= FLOATING
        net.up.cast_adapter("default", torch.float32)
        assert {p.dtype for n, p in net.up.named_parameters() if "gralora_" in n} == {torch.float32}
        assert relative_error(net.up(x), out) < 2e-2
        with torch.autocast("cpu", torch.bfloat16):
            cast, plain = net.up(x), net.up.base_layer(x)
        assert cast.dtype == plain.dtype
        assert relative_error(cast, out) < 2e-2

    def test_merging_is_refused_and_changes_nothing(self, kind):
        net = adapted(kind)
        before, layer = stored(net), net.up
        text = (
            rf"up: cannot merge into a base weight stored as {STORED_AS[kind]}\. Load the "
            r"unquantized base .*, load the adapter, fuse it, and only then quantize"
        )
        for call in (
            layer.merge,
            lambda: layer.merge(safe_merge=True),
            lambda: layer.check_merge(["default"]),
        ):
            with pytest.raises(ValueError, match=text):
                call()
        assert identical(stored(net), before)
        assert not layer.merged

    def test_what_was_merged_and_then_quantized_is_not_taken_out(self, kind):
        net = Net()
        inject(net, GraloraConfig(r=8, gralora_k=4, target_modules=["up"], init_weights=False))
        net.up.merge()
        quantize(net, kind)
        x = torch.randn(5, 64)
        before = net(x)
        with pytest.raises(ValueError, match=f"up: cannot merge.* {STORED_AS[kind]}"):
            net.up.unmerge()
        assert net.up.merged
        assert torch.equal(net(x), before)

    def test_the_class_of_the_weight_tells(self, kind):
        net = adapted(kind)
        assert quantization_of(net.up.base_layer) == STORED_AS[kind]


def test_what_is_quantized_and_what_is_not() -> None:
    for plain in (nn.Linear(4, 4), nn.Conv2d(4, 4, 1).half(), nn.Linear(4, 4, device="meta")):
        assert quantization_of(plain) is None
    assert quantization_of(nn.Identity()) is None
    for dtype in (torch.float8_e4m3fn, torch.int8, torch.int32):
        layer = nn.Linear(4, 4)
        layer.weight = nn.Parameter(torch.zeros(4, 4).to(dtype), requires_grad=False)
        assert quantization_of(layer) == str(dtype)


def test_4_bits_packed_into_a_floating_dtype() -> None:
    """As FSDP wants it: the dtype of the weight looks like that of a plain one."""
    net = quantize(Net(), "bnb-nf4", bnb_4bit_quant_storage=torch.bfloat16)
    assert net.up.weight.dtype == torch.bfloat16
    inject(net, GraloraConfig(r=8, gralora_k=4, target_modules=["up"], init_weights=False))
    assert net.up.gralora_A["default"].dtype == torch.float32  # what it computes in
    with pytest.raises(ValueError, match="stored as bitsandbytes Params4bit"):
        net.up.merge()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An adapter of UNet and text encoder, hybrid and on convolutions too, of a plain base."""
    folder = tmp_path_factory.mktemp("adapter")
    adapt(pipeline()).save_gralora_weights(folder)
    return folder


def quantized(kind: str, dtype: torch.dtype = torch.float32) -> StableDiffusionPipeline:
    pipe = pipeline().to(dtype)
    for model in (pipe.unet, pipe.text_encoder):
        quantize(model, kind, **({"bnb_4bit_compute_dtype": dtype} if kind == "bnb-nf4" else {}))
    return pipe


def factors(pipe) -> dict[str, torch.Tensor]:
    models = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
    return {
        f"{component}.{name}": parameter
        for component, model in models.items()
        for name, parameter in model.named_parameters()
        if "gralora_" in name
    }


@pytest.mark.parametrize("kind", KINDS)
class TestPipelines:
    def test_load_scale_save_unload(self, kind, folder, tmp_path):
        pipe = quantized(kind)
        base, before = draw(pipe), stored(pipe.unet, pipe.text_encoder)
        pipe.load_gralora_weights(folder, "a")
        assert {p.dtype for p in factors(pipe).values()} == {torch.float32}
        attached = draw(pipe)
        plain = pipeline()
        for ours, theirs in ((plain.unet, pipe.unet), (plain.text_encoder, pipe.text_encoder)):
            for name, layer in ours.named_modules():
                if isinstance(layer, nn.Linear):
                    same = base_of(theirs.get_submodule(name))
                    assert quantization_of(same) == STORED_AS[kind]
                    layer.weight.data.copy_(dequantized(same))
        plain.load_gralora_weights(folder)
        assert relative_error(attached, draw(plain)) < 1e-4
        assert relative_error(attached, base) > 0.1
        pipe.set_adapters("a", 0.0)
        assert torch.equal(draw(pipe), base)
        pipe.set_adapters("a", 1.0)
        assert torch.equal(draw(pipe), attached)

        written = load_file(pipe.save_gralora_weights(tmp_path))
        original = load_file(folder / WEIGHTS_NAME)
        assert written.keys() == original.keys()
        assert all(torch.equal(written[key], original[key]) for key in original)
        again = copy.deepcopy(quantized(kind))
        again.load_gralora_weights(tmp_path)
        assert torch.equal(draw(again), attached)

        pipe.unload_gralora_weights()
        assert torch.equal(draw(pipe), base)
        assert identical(stored(pipe.unet, pipe.text_encoder), before)

    def test_bf16(self, kind, folder):
        pipe = quantized(kind, torch.bfloat16)
        base = draw(pipe)
        pipe.load_gralora_weights(folder)
        assert {p.dtype for p in factors(pipe).values()} == {torch.bfloat16}
        assert relative_error(draw(pipe), base) > 0.1
        assert torch.isfinite(draw(pipe)).all()

    def test_fusing_is_refused_and_changes_nothing(self, kind, folder):
        pipe = quantized(kind)
        pipe.load_gralora_weights(folder)
        image, before = draw(pipe), stored(pipe.unet, pipe.text_encoder)
        text = rf"\.to_q: cannot merge into .* {STORED_AS[kind]}\. Load the unquantized base"
        with pytest.raises(ValueError, match=text):
            pipe.fuse_gralora()
        assert identical(stored(pipe.unet, pipe.text_encoder), before)
        assert not pipe.fused_loras
        assert torch.equal(draw(pipe), image)
        with pytest.raises(ValueError, match=text):
            pipe.fuse_lora(components=["unet"])  # diffusers' own, after some convolutions
        pipe.unfuse_gralora()
        assert relative_error(draw(pipe), image) < 1e-4

    def test_fuse_first_then_quantize(self, kind, folder):
        """What the refusal advises."""
        pipe = pipeline()
        layers = dict(pipe.unet.named_modules())
        pipe.load_gralora_weights(folder)
        expected = {
            name: layers[name].weight + layer.get_delta_weight("default")
            for name, layer in pipe.unet.named_modules()
            if isinstance(layer, GraloraLinear)
        }
        assert len(expected) == 32
        pipe.fuse_gralora()
        pipe.unload_gralora_weights()
        quantize(pipe.unet, kind)
        # half the widest step between neighbours, in units of the largest weight; bitsandbytes
        # makes int8 from fp16
        steps = {"bnb-nf4": 0.153, "torchao-fp8": 2**-4, "bnb-int8": 0.5 / 127 + 2**-11}
        step = steps.get(kind, 0.501 / 127)
        for name, weight in expected.items():
            layer = pipe.unet.get_submodule(name)
            assert quantization_of(layer) == STORED_AS[kind]
            assert relative_error(dequantized(layer), weight) < step, name
        assert torch.isfinite(draw(pipe)).all()

    def test_layerwise_casting_leaves_the_adapter_alone(self, kind, folder):
        pipe = quantized(kind)
        pipe.load_gralora_weights(folder)
        before = {name: factor.clone() for name, factor in factors(pipe).items()}
        pipe.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
        assert torch.isfinite(draw(pipe)).all()
        after = factors(pipe)
        assert all(torch.equal(after[name], before[name]) for name in before)

    def test_as_an_ordinary_lora(self, kind, tmp_path):
        """Trained on the quantized base, the exact LoRA draws the same on the plain one."""
        train(quantized(kind)).save_gralora_weights(tmp_path)
        pipe = pipeline()
        base = draw(pipe)
        pipe.load_gralora_weights(tmp_path)
        expected = draw(pipe)
        assert relative_error(expected, base) > 0.1
        other = pipeline()
        other.load_lora_weights(as_lora(tmp_path))
        assert relative_error(draw(other), expected) < 1e-4


def train(pipe: StableDiffusionPipeline) -> StableDiffusionPipeline:
    """A few steps of a hybrid adapter on UNet and text encoder; the loss falls."""
    adapt(pipe, alpha=8)
    parameters = list(factors(pipe).values())
    optimizer = torch.optim.AdamW([p.requires_grad_() for p in parameters], lr=1e-2)
    before = stored(pipe.unet, pipe.text_encoder)
    latents, target = torch.randn(2, 2, 4, 8, 8)
    ids = pipe.tokenizer(["a cat", "a dog"], padding="max_length", return_tensors="pt").input_ids
    losses = []
    for _ in range(8):
        embeds = pipe.text_encoder(ids).last_hidden_state
        prediction = pipe.unet(latents, torch.tensor([10, 500]), embeds).sample
        loss = (prediction - target).square().mean()
        loss.backward()
        assert all(p.grad is not None for p in parameters)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0], losses
    assert identical(stored(pipe.unet, pipe.text_encoder), before)
    return pipe


def as_lora(folder: Path) -> dict[str, torch.Tensor]:
    """The exact LoRA of a saved adapter, as diffusers reads it: alpha is the rank."""
    state = {}
    for component, part in read_adapter(folder).components.items():
        scaling = part.config.alpha / (part.config.r + part.config.hybrid_r)
        for key, A in part.tensors.items():
            if not key.endswith(".gralora_A"):
                continue
            name = key.removesuffix(".gralora_A")
            down, up = lora_factors(A, part.tensors[f"{name}.gralora_B"])
            up = up.reshape(*up.shape, *[1] * (A.ndim - 3))
            if part.config.hybrid_r:
                down = torch.cat([down, part.tensors[f"{name}.gralora_A_general.weight"]])
                up = torch.cat([up, part.tensors[f"{name}.gralora_B_general.weight"]], dim=1)
            state[f"{component}.{name}.lora_A.weight"] = down
            state[f"{component}.{name}.lora_B.weight"] = scaling * up
    return state


@pytest.mark.parametrize("kind", ["torchao-fp8", "torchao-int8"])
def test_a_pipeline_that_diffusers_quantizes_saves_and_loads(kind, folder, tmp_path) -> None:
    pipeline().save_pretrained(tmp_path / "plain")
    weights = Float8WeightOnlyConfig() if kind == "torchao-fp8" else Int8WeightOnlyConfig()
    pipe = StableDiffusionPipeline.from_pretrained(
        tmp_path / "plain",
        quantization_config=PipelineQuantizationConfig(
            quant_mapping={"unet": TorchAoConfig(weights)}
        ),
        dtype=torch.float32,
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path / "quantized")
    pipe.load_gralora_weights(folder)
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "quantized", dtype=torch.float32)
    again.set_progress_bar_config(disable=True)
    again.load_gralora_weights(folder)
    assert {p.dtype for p in factors(again).values()} == {torch.float32}
    assert torch.equal(draw(again), draw(pipe))
    with pytest.raises(ValueError, match=STORED_AS[kind]):
        again.fuse_gralora()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu(kind, dtype, folder, tmp_path) -> None:
    from diffusers import BitsAndBytesConfig

    pipeline().save_pretrained(tmp_path / "base")
    if kind == "bnb-nf4":
        wanted = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    elif kind == "bnb-int8":
        wanted = BitsAndBytesConfig(load_in_8bit=True)
    else:
        weights = Float8WeightOnlyConfig() if kind == "torchao-fp8" else Int8WeightOnlyConfig()
        wanted = TorchAoConfig(weights)
    pipe = StableDiffusionPipeline.from_pretrained(
        tmp_path / "base",
        quantization_config=PipelineQuantizationConfig(quant_mapping={"unet": wanted}),
        dtype=dtype,
    ).to("cuda")
    pipe.set_progress_bar_config(disable=True)

    def image() -> torch.Tensor:
        rng = torch.Generator("cuda").manual_seed(0)
        arguments = {"num_inference_steps": 2, "output_type": "latent", "height": 16, "width": 16}
        return pipe("a cat", generator=rng, **arguments).images.float()

    base = image()
    pipe.load_gralora_weights(folder, "a")
    assert {p.dtype for p in factors(pipe).values()} == {dtype}
    assert {p.device.type for p in factors(pipe).values()} == {"cuda"}
    assert relative_error(image(), base) > 0.1
    with pytest.raises(ValueError, match=STORED_AS[kind]):
        pipe.fuse_gralora()
    pipe.enable_model_cpu_offload()
    assert torch.isfinite(image()).all()
    pipe.unload_gralora_weights()
    assert relative_error(image(), base) < 1e-2
