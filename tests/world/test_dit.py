"""The embedded network as a field, and its weights on disk."""

import errno
import json
import os

import pytest
import torch
from safetensors.torch import save_file

from danceopd.core.conditioning import Conditioning
from danceopd.support.errors import UserError
from danceopd.world.dit import DiT, DiTConfig
from danceopd.world.files import SHIPPED, load_model, read_config, save_model

SMALL = DiTConfig(image_size=16, patch_size=4, width=32, depth=2, heads=2, vocab_size=50, text_length=6)


def make(config=SMALL, seed=0, random_weights=True) -> DiT:
    torch.manual_seed(seed)
    model = DiT(config)
    if random_weights:
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.15)
    return model


def batch(n=6, seed=1, config=SMALL):
    g = torch.Generator().manual_seed(seed)
    size = config.image_size
    latents, source = torch.randn(2, n, 3, size, size, generator=g)
    tokens = torch.randint(1, config.vocab_size, (n, config.text_length), generator=g)
    sigma = 0.2 + 0.8 * torch.rand(n, generator=g)
    return latents, sigma, Conditioning(tokens, source, torch.arange(n) % 3 != 0)


def replaced(c, **changes):
    return Conditioning(**{"prompt": c.prompt, "source": c.source, "has_source": c.has_source, **changes})


@torch.no_grad()
def test_mixed_batch_equals_separate_passes():
    model, (z, sigma, c) = make(), batch()
    mixed = model(z, sigma, c)
    for i in range(len(z)):
        source = c.source[i : i + 1] if c.has_source[i] else None
        alone = Conditioning(c.prompt[i : i + 1], source, c.has_source[i : i + 1])
        torch.testing.assert_close(mixed[i], model(z[i : i + 1], sigma[i : i + 1], alone)[0], atol=1e-5, rtol=1e-5)
    for rows in (c.has_source, ~c.has_source):
        torch.testing.assert_close(mixed[rows], model(z[rows], sigma[rows], c[rows]), atol=1e-6, rtol=1e-6)


def test_mixed_batch_has_the_gradient_of_separate_passes():
    z, sigma, c = batch()
    grads = []
    for parts in ([slice(None)], [c.has_source, ~c.has_source]):
        model = make()
        for rows in parts:
            model(z[rows], sigma[rows], c[rows]).square().sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        assert all(p.grad.abs().sum() > 0 for p in model.parameters())
    torch.testing.assert_close(*grads, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("config", [SMALL, DiTConfig()], ids=["small", "default"])
def test_new_network_estimates_grey(config):
    """The output head starts at zero: the clean estimate is 0 and v = z / sigma."""
    z, sigma, c = batch(config=config)
    with torch.no_grad():
        velocity = make(config, random_weights=False)(z, sigma, c)
    torch.testing.assert_close(velocity, z / sigma.view(-1, 1, 1, 1))


@torch.no_grad()
def test_velocity_is_what_takes_the_noisy_picture_to_the_clean_one():
    """With nothing but a bias in the head the estimate is that constant picture: z - sigma v = bias."""
    model, (z, sigma, c) = make(random_weights=False), batch()
    picture = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    model.patch_out.bias.copy_(picture.flatten())
    clean = z - sigma.view(-1, 1, 1, 1) * model(z, sigma, c)
    torch.testing.assert_close(clean, picture.repeat(len(z), 1, 4, 4), atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("size", [(16, 4), (32, 8), (16, 16)])
def test_patchify_is_undone(size):
    model = DiT(DiTConfig(image_size=size[0], patch_size=size[1], width=16, depth=1, heads=2))
    images = torch.randn(2, 3, size[0], size[0])
    patches = model.patchify(images)
    assert patches.shape == (2, (size[0] // size[1]) ** 2, 3 * size[1] ** 2)
    assert torch.equal(patches[0, 0], images[0, :, : size[1], : size[1]].flatten())
    assert torch.equal(model.unpatchify(patches), images)


@torch.no_grad()
def test_what_the_velocity_depends_on():
    model, (z, sigma, c) = make(), batch()
    before = model(z, sigma, c)

    def changed(velocity):
        return (velocity - before).abs().flatten(1).amax(1) > 1e-4

    everyone = torch.ones(6, dtype=torch.bool)
    assert torch.equal(changed(model(z, sigma, replaced(c, source=c.source.flip(0)))), c.has_source)
    assert torch.equal(changed(model(z, sigma, replaced(c, source=c.source + 0.5))), c.has_source)
    assert torch.equal(changed(model(z, sigma, replaced(c, source=None))), c.has_source)
    assert torch.equal(changed(model(z, sigma, replaced(c, prompt=c.prompt.flip(1)))), everyone)  # word order
    assert torch.equal(changed(model(z, sigma * 0.9, c)), everyone)
    one = c.prompt.clone()
    one[2, 3] = 0
    assert torch.equal(changed(model(z, sigma, replaced(c, prompt=one))), torch.arange(6) == 2)


@torch.no_grad()
def test_samples_keep_their_order():
    model, (z, sigma, c) = make(), batch()
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    torch.testing.assert_close(model(z[order], sigma[order], c[order]), model(z, sigma, c)[order])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_velocity_has_the_latents_dtype(dtype):
    model, (z, sigma, c) = make(), batch()
    velocity = model(z.to(dtype), sigma, c)
    assert velocity.dtype == dtype
    torch.testing.assert_close(velocity.float(), model(z, sigma, c), atol=0.15, rtol=0.05)


# Weights on disk


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_round_trip(tmp_path, dtype):
    model, (z, sigma, c) = make(), batch()
    path = tmp_path / "deep" / "er" / "model.safetensors"
    save_model(model, path, dtype)
    loaded = load_model(path)
    assert loaded.config == SMALL
    assert not loaded.training
    for (name, a), (other, b) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert name == other
        assert b.dtype == torch.float32
        assert torch.equal(b, a.to(dtype).float())
    with torch.no_grad():
        tolerance = 0 if dtype == torch.float32 else 0.02
        torch.testing.assert_close(loaded(z, sigma, c), model(z, sigma, c), atol=tolerance, rtol=tolerance)
    assert [p.name for p in path.parent.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("keep", [0, 1, 7, 100, 0.5, -1])
def test_truncated_file(tmp_path, keep):
    path = tmp_path / "model.safetensors"
    save_model(make(), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole"):
        load_model(path)


def test_files_of_something_else(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"w": torch.zeros(3)}, path)  # no configuration
    with pytest.raises(ValueError, match="not a whole"):
        load_model(path)
    save_file({"w": torch.zeros(3)}, path, {"config": "{}"})  # a configuration, other weights
    with pytest.raises(ValueError, match="not a whole"):
        load_model(path)
    path.write_text("<html>not found</html>")
    with pytest.raises(ValueError, match="not a whole"):
        load_model(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"text_length": 10**9}, "text_pool.0.weight: it holds"),
        ({"width": 10**12}, "not a whole"),
        ({"depth": 10**9}, "says 1000000000 blocks"),
        ({"depth": 3}, r"blocks\.2\..*: it holds no such tensor"),
        ({"depth": 1}, r"blocks\.1\..*by its configuration no such tensor"),
        ({"heads": 0}, "heads of its configuration is 0"),
        ({"patch_size": 2.0}, "patch_size of its configuration is 2.0"),
        ({"mlp_ratio": True}, "mlp_ratio of its configuration is True"),
        ({"depths": 3}, "not a whole"),
    ],
)
def test_a_header_that_claims_another_network(tmp_path, change, said, monkeypatch):
    model, path = make(), tmp_path / "x.safetensors"
    config = model.config.to_dict() | change
    save_file(model.state_dict(), path, {"config": json.dumps(config)})
    monkeypatch.setattr(DiT, "load_state_dict", lambda *_: 1 / 0)  # nothing is loaded
    for read in (read_config, load_model):
        with pytest.raises(UserError, match=said):
            read(path)


def test_missing_file(tmp_path):
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(FileNotFoundError, match="no weights"):
            load_model(path)


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("existed", [True, False])
def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch, call, existed):
    path, first, second = tmp_path / "model.safetensors", make(seed=0), make(seed=1)
    if existed:
        save_model(first, path)
    before = path.read_bytes() if existed else None

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(OSError, match="No space left"):
            save_model(second, path)
    assert list(tmp_path.iterdir()) == ([path] if existed else [])
    assert not existed or path.read_bytes() == before
    save_model(second, path)
    assert torch.equal(load_model(path).patch_out.weight, second.patch_out.weight)


def test_shipped_networks_are_small():
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 25e6
