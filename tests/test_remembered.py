"""Copies of what was built once, against what is built anew."""

import inspect

import pytest
import torch
from torch import nn

from tests.models import PIPELINES, draw, stable_diffusion, structure
from tests.remembered import remembered


@pytest.mark.parametrize("name", sorted(PIPELINES))
def test_a_copy_is_as_what_is_built(name):
    built = inspect.unwrap(PIPELINES[name])()
    drawn = torch.rand(3)
    for _ in range(2):  # the first is built for it, or another test had it built
        copy = PIPELINES[name]()
        assert torch.equal(torch.rand(3), drawn)
        assert type(copy) is type(built)
        assert copy.config == built.config
        for part, theirs in built.components.items():
            ours = getattr(copy, part)
            assert type(ours) is type(theirs)
            if isinstance(theirs, nn.Module):
                assert_alike(ours, theirs)
                assert ours.config == theirs.config


def assert_alike(one, other):
    """The same modules, and the same weights as they are stored; what two modules share is one."""
    modules = [
        [(name, type(module), module.training) for name, module in model.named_modules()]
        for model in (one, other)
    ]
    assert modules[0] == modules[1]
    assert list(one.state_dict()) == list(other.state_dict())
    tensors = [[*model.named_parameters(), *model.named_buffers()] for model in (one, other)]
    for (name, ours), (path, theirs) in zip(*tensors, strict=True):
        assert (name, type(ours), ours.dtype) == (path, type(theirs), theirs.dtype)
        assert (ours.stride(), ours.requires_grad) == (theirs.stride(), theirs.requires_grad)
        assert torch.equal(ours, theirs), name


def test_copies_share_nothing():
    one, other = stable_diffusion(), stable_diffusion()
    before, image = structure(other.unet, other.text_encoder), draw(other)
    for model in (one.unet, one.text_encoder, one.vae):
        for parameter in model.parameters():
            parameter.data.zero_()
        model.config.changed = True
    one.scheduler.config.changed = True
    one.unet.add_module("another", nn.Linear(1, 1))
    assert structure(other.unet, other.text_encoder) == before
    assert torch.equal(draw(stable_diffusion()), image)
    assert not hasattr(stable_diffusion().unet.config, "changed")


def test_arguments_are_told_apart():
    def build(width, *, bias=True):
        torch.manual_seed(0)
        return nn.Linear(width, 2, bias=bias)

    build = remembered(build)
    assert [build(3).in_features, build(4).in_features] == [3, 4]
    assert build(3).bias is not None
    assert build(3, bias=False).bias is None
