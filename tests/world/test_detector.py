"""The detector reads back what was drawn."""

import pytest
import torch
from scenes import generator, random_scene, same_scene

from danceopd.world.detector import detect
from danceopd.world.scene import render
from danceopd.world.sprites import background_rgb


@pytest.mark.parametrize(("noise", "share"), [(0.0, 0.999), (0.03, 0.99)])
def test_detector_reads_pictures(noise, share):
    """noise: standard deviation in units of [0, 1], in which it is added."""
    scene = random_scene(10_000, seed=1)
    images = render(scene)
    images += 2 * noise * torch.randn(images.shape, generator=generator(2))
    seen = detect(images)
    occupied = scene.occupied
    right = (seen.scene.objects == scene.objects).all(-1) & (seen.scene.colors == scene.colors).all(-1)
    right &= ((seen.style == scene.style[:, None]) | ~occupied).all(-1)
    right &= (seen.scene.style == scene.style) | ~occupied.any(-1)
    right &= seen.scene.background == scene.background
    right &= seen.clear.all(-1) & (seen.found == occupied).all(-1)
    assert right.float().mean() >= share
    jitter = (seen.scene.jitter == scene.jitter)[occupied]
    assert jitter.float().mean() >= share
    assert seen.error.mean().item() == pytest.approx(noise, abs=0.006)
    torch.testing.assert_close(seen.confidence, (1 - seen.error / 0.2).clamp(0, 1))


def test_detector_is_sure_of_nothing_in_noise():
    images = torch.rand(100, 3, 32, 32, generator=generator()) * 2 - 1
    seen = detect(images)
    assert not seen.found.any()
    assert not seen.clear.any()


def test_detector_reads_each_picture_alone_and_clips():
    scene = random_scene(10)
    images = render(scene)
    whole, parts = detect(images), detect(images, chunk=3)
    assert same_scene(whole.scene, parts.scene)
    torch.testing.assert_close(whole.error, parts.error, atol=5e-3, rtol=0)
    beyond = torch.where(images > 0.999, 7.0, torch.where(images < -0.999, -7.0, images))
    assert same_scene(detect(beyond).scene, whole.scene)
    assert same_scene(detect(images.half()).scene, whole.scene)
    assert len(detect(images[:0]).scene) == 0


@pytest.mark.parametrize("cell", range(4))
def test_one_spoiled_cell_spoils_no_other(cell):
    """The background is judged by the whole picture."""
    scene, others = random_scene(100, seed=3), torch.arange(4) != cell
    images = render(scene).view(100, 3, 2, 16, 2, 16)
    images[:, :, cell // 2, :, cell % 2] = background_rgb()[(scene.background + 1) % 4][:, :, None, None] * 2 - 1
    seen = detect(images.view(100, 3, 32, 32))
    assert torch.equal(seen.scene.background, scene.background)
    assert torch.equal(seen.scene.objects[:, others], scene.objects[:, others])
    assert torch.equal(seen.scene.colors[:, others], scene.colors[:, others])
