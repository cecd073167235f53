"""Prompts of different length: nothing is computed for a shorter one's padding, and the velocity is the same."""

from collections import Counter
from importlib import import_module
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from model_runs import FAMILIES

from danceopd.core.conditioning import Conditioning
from danceopd.core.rollout import rollout
from danceopd.core.schedule import sigma_grid
from danceopd.models.attention import attention_backend, set_torch_kernels
from danceopd.models.backbones import backbone_of, flux2, qwen_image, sd3, z_image
from danceopd.models.packing import FORWARD, SHAPES, TOKENS, split_by_length, whole_batches
from danceopd.models.shared_base import SharedBase
from danceopd.models.students import FullStudent
from danceopd.support.errors import UserError
from danceopd.training.rollouts.layouts import Layout, _in_layout
from danceopd.training.rollouts.static import StaticField

LENGTHS = st.lists(st.integers(1, 48), min_size=1, max_size=5)
MADE = ("qwen", "qwen_edit", "z")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{family: a tiny pipeline's folder}."""
    return {family: FAMILIES[family](tmp_path_factory.mktemp(family) / "model") for family in (*MADE, "sd3", "klein")}


@pytest.fixture(scope="module")
def students(folders):
    """{family: a student of all weights}, drawn at random."""
    made = {}
    for family in MADE:
        backbone = backbone_of(folders[family])
        made[family] = FullStudent(backbone.load_transformer(folders[family]), backbone.velocity)
    return made


def batch_of(student, lengths, edits=(), seed=0):
    """(latents, sigma, conditioning) of prompts of these lengths; what follows a prompt's end is noise, not zeros."""
    generator, n = torch.Generator().manual_seed(seed), len(lengths)
    width = getattr(student.transformer.config, "cap_feat_dim", None) or student.transformer.config.joint_attention_dim
    mask = torch.arange(max(lengths) + 3) < torch.tensor(lengths)[:, None]
    prompt = {"prompt_embeds": torch.randn(*mask.shape, width, generator=generator), "prompt_mask": mask}
    has = torch.tensor([i in edits for i in range(n)])
    source = (torch.randn(n, 4, 8, 8, generator=generator),) if edits else None
    latents, sigma = torch.randn(n, 4, 8, 8, generator=generator), 0.1 + 0.8 * torch.rand(n, generator=generator)
    return latents, sigma, Conditioning(prompt, source, has)


def answered(student, latents, sigma, conditioning):
    """(velocity, gradient of its squares in all parameters)."""
    student.zero_grad()
    velocity = student(latents, sigma, conditioning)
    velocity.square().sum().backward()
    return velocity.detach(), torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])


def close(a, b):
    assert (a - b).norm() <= 1e-5 * b.norm()


@pytest.mark.parametrize(
    "family", [f if f in ("qwen_edit", "z") else pytest.param(f, marks=pytest.mark.slow) for f in MADE]
)
@settings(max_examples=6, deadline=None)
@given(LENGTHS, st.sets(st.integers(0, 4)))
@example([3, 40, 5, 44, 31], {0, 1})
def test_velocity_and_gradient_are_those_of_padded_and_of_single_samples(students, family, lengths, edits):
    student = students[family]
    latents, sigma, c = batch_of(student, lengths, edits if family == "qwen_edit" else ())
    grouped = answered(student, latents, sigma, c)
    with whole_batches():
        padded = answered(student, latents, sigma, c)
    parts = [answered(student, latents[i : i + 1], sigma[i : i + 1], c[i : i + 1]) for i in range(len(lengths))]
    alone = torch.cat([velocity for velocity, _ in parts]), sum(gradient for _, gradient in parts)
    for found, one, other in zip(grouped, padded, alone, strict=True):
        close(found, one)
        close(found, other)


@pytest.mark.parametrize("family", ["qwen_edit", "z"])
def test_each_sample_keeps_its_own_source(students, family):
    """On a shared transformer: routes of the samples follow them into their groups."""
    student = students[family]
    layer = next(name for name, m in student.transformer.named_modules() if name.endswith("to_q"))
    width = student.transformer.get_submodule(layer).in_features
    loras = [{layer: (torch.randn(2, width), torch.randn(width, 2), 0.5)} for _ in range(2)]
    transformer = type(student.transformer).from_config(student.transformer.config)
    transformer.load_state_dict(student.transformer.state_dict())
    shared = SharedBase(transformer.eval(), loras, student._velocity)
    latents, sigma, c = batch_of(student, [40, 2, 44, 3, 20], {1, 2} if family == "qwen_edit" else ())
    adapter = torch.tensor([0, 1, -1, 0, 1])
    found = shared(latents, sigma, c, adapter)
    for i, m in enumerate(adapter.tolist()):
        close(found[i], shared.field(m)(latents[i : i + 1], sigma[i : i + 1], c[i : i + 1])[0])


@given(st.lists(st.integers(1, 600), min_size=1, max_size=12), st.sampled_from([16, 256, 1024, 4096]))
def test_padding_is_under_five_percent(lengths, picture):
    groups = split_by_length(lengths, picture)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    padded = sum(len(group) * max(lengths[i] for i in group) for group in groups)
    assert padded - sum(lengths) < FORWARD * (len(lengths) * picture + padded)
    assert FORWARD <= 0.05
    edges = sorted((min(lengths[i] for i in g), max(lengths[i] for i in g)) for g in groups)
    assert all(a[1] <= b[0] for a, b in pairwise(edges))


@pytest.mark.parametrize("family", ["qwen", "z"])
def test_waste_is_counted(students, family):
    lengths = [4, 9, 40, 12, 90, 92, 5, 33]
    latents, sigma, c = batch_of(students[family], lengths)

    def share():
        before = Counter(TOKENS)
        with torch.no_grad():
            students[family](latents, sigma, c)
        new = TOKENS["padding"] - before["padding"], TOKENS["computed"] - before["computed"]
        assert new[1] - new[0] == len(lengths) * 16 + sum(lengths)
        return new[0] / new[1]

    before = Counter(SHAPES)
    assert share() < 0.05
    met = Counter(SHAPES) - before
    assert 1 < len(met) < len(lengths)
    assert sum(rows * forwards for (rows, *_), forwards in met.items()) == len(lengths)
    with whole_batches():
        assert share() > 0.4
    assert (Counter(SHAPES) - before - met) == {(len(lengths), 16, max(lengths), True): 1}


@pytest.mark.parametrize(("family", "takes"), [("sd3", True), ("qwen_image", False), ("z_image", False)])
def test_no_plan_is_built_for_each_length(family, takes):
    """cuDNN's attention has one for each shape."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        set_torch_kernels(import_module(f"danceopd.models.backbones.{family}"), torch.device("cuda"))
        assert torch.backends.cuda.cudnn_sdp_enabled() == takes
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_equal_lengths_are_one_forward_without_a_mask(students):
    asked = []
    student = students["qwen"]
    kept, student._velocity = student._velocity, lambda *args: asked.append(args[3]) or kept(*args)
    try:
        student(*batch_of(student, [7, 7, 7]))
    finally:
        student._velocity = kept
    (prompt,) = asked
    assert set(prompt) == {"prompt_embeds"}
    assert prompt["prompt_embeds"].shape[1] == 7


@pytest.mark.parametrize("lengths", [[1, 31, 32], [33, 50, 64]])
def test_z_image_fills_up_prompts_itself(students, lengths):
    """Static steps: the transformer's own padding, without a length read on the host."""
    latents, sigma, c = batch_of(students["z"], lengths)
    kept = _in_layout(c, Layout(False, False, -(-max(lengths) // 32) * 32))
    assert "prompt_mask" not in kept.prompt
    for found, expected in zip(
        answered(students["z"], latents, sigma, kept), answered(students["z"], latents, sigma, c), strict=True
    ):
        close(found, expected)


@pytest.mark.parametrize("family", ["qwen", "z"])
def test_static_steps_count_their_padding_too(students, family):
    latents, _, c = batch_of(students[family], [4, 40, 60])
    before, until = Counter(TOKENS), torch.tensor([[2], [1], [2]])
    rollout(StaticField(students[family], students[family]), latents, c, sigma_grid(2), until)
    assert TOKENS["padding"] - before["padding"] == 2 * 28 + 24 + 2 * 4
    assert TOKENS["computed"] - before["computed"] == 5 * 16 + 2 * 32 + 64 + 2 * 64


# ---------------------------------------------------------------------------------------------- attention


@pytest.fixture
def asked_for(folders):
    """attends(backbone, backend, device, precision), of a tiny SD3 folder or one that dispatches."""
    of = {
        flux2: folders["klein"],
        sd3: folders["sd3"],
        qwen_image: folders["qwen"],
        z_image: folders["z"],
    }

    def attends(backbone, name, device="cpu", precision="bf16"):
        return attention_backend(name, of[backbone], precision == "bf16", backbone, torch.device(device))

    return attends


def test_backends(asked_for):
    assert asked_for(sd3, "auto") == asked_for(qwen_image, "auto", "cuda") == asked_for(z_image, "native") == "native"
    assert asked_for(qwen_image, "_native_math") == "_native_math"
    for name, message in {"flesh": "did you mean 'flash'", "nothing like it": "valid are "}.items():
        with pytest.raises(UserError, match=message):
            asked_for(qwen_image, name)
    assert asked_for(flux2, "auto") == "_native_math"
    assert asked_for(flux2, "auto", precision="fp32") == asked_for(flux2, "native") == "native"
    with pytest.raises(UserError, match=r"flash-attn>=2.*danceopd\[flash-attn\]"):
        asked_for(flux2, "flash", "cuda")
    with pytest.raises(UserError, match="have masks"):
        asked_for(qwen_image, "flash_varlen", "cuda")
    with pytest.raises(UserError, match="torch's own kernels alone"):
        asked_for(sd3, "flash", "cuda")
    with pytest.raises(UserError, match=r"xformers.*pip install xformers"):
        asked_for(z_image, "xformers")
