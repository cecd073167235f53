"""Static steps: the states of the plain rollout, safe to capture for every backbone, few compilations, on CUDA graphs."""

import copy
import warnings
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_dry_run import FAMILIES, prompt_of
from test_training import config_of, random_network, raw, records  # noqa: F401
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import danceopd.graphs
from danceopd.backbones import backbone_of
from danceopd.backbones.dit import DiT, DiTConfig
from danceopd.conditioning import Conditioning
from danceopd.fields import counted, guided
from danceopd.graphs import Constants, GraphSafe, NotCapturable, Program, StaticField, compile_blocks
from danceopd.lora import LoraStudent, SharedBase, target_layers
from danceopd.query import query
from danceopd.rollout import rollout
from danceopd.schedule import sigma_grid
from danceopd.sde import sde_rollout
from danceopd.training.loop import Trainer, train
from danceopd.training.setup import build
from danceopd.training.students import FullStudent

CUDA = torch.cuda.is_available()
EDITS = ("dit", "kontext", "klein", "flux2", "qwen_edit")
SIZE = 64
DIT = DiTConfig(image_size=16, patch_size=8, width=32, depth=2, heads=2)


def noise_of(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------------------------ the models


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """folder(family) -> a tiny pipeline."""
    made = {}

    def folder(family):
        if family not in made:
            made[family] = FAMILIES[family](tmp_path_factory.mktemp(family) / "model")
        return made[family]

    return folder


def randomised(network):
    """With every parameter drawn: those that begin at zero would hide an error."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator).to(p))
    return network


def student_of(family, folders, lora, transformer=None):
    """(student, latents' shape, its transformer); with `transformer`, on that one."""
    if family == "dit":
        network = transformer or randomised(DiT(DIT))
        return network.requires_grad_(False), (3, 16, 16), network
    backbone, shape = backbone_of(folders(family)), None
    transformer = transformer or backbone.load_transformer(folders(family))
    shape = backbone.latent_shape(folders(family), SIZE, SIZE)
    embedded = 3.5 if getattr(transformer.config, "guidance_embeds", False) else None
    if not lora:
        return FullStudent(transformer, backbone.velocity, embedded).requires_grad_(False), shape, transformer
    layers = target_layers(transformer, backbone.LORA_TARGETS, every=False)
    shared = SharedBase(transformer, [], backbone.velocity, layers)
    student = LoraStudent(shared, layers, 2, 2.0, embedded_guidance=embedded)
    return randomised(student) if not isinstance(next(student.parameters()), FakeStudent) else student, shape, transformer
