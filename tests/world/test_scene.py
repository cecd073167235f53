"""Scenes of the picture world and their pictures."""

import pytest
import torch
from scenes import random_scene, same_scene

from danceopd.world.scene import blank, render
from danceopd.world.sprites import CLASSES, COLORS, JITTER, background_rgb


def test_rendering():
    scene = random_scene(200)
    images = render(scene)
    assert images.shape == (200, 3, 32, 32)
    assert images.dtype == torch.float32
    assert images.min() >= -1
    assert images.max() <= 1
    assert torch.equal(images[17:18], render(scene[17:18]))


def test_empty_picture_is_its_background():
    images = (render(blank(4, torch.arange(4))) + 1) / 2
    torch.testing.assert_close(images, background_rgb()[:, :, None, None].expand(4, 3, 32, 32))


@pytest.mark.parametrize("cell", range(4))
def test_objects_stay_in_their_cell_in_reading_order(cell):
    scene = blank(9 * 8, torch.full((72,), 3))
    scene.objects[:, cell], scene.jitter[:, cell] = torch.arange(72) % 8, torch.arange(72) // 8
    changed = (render(scene) != render(blank(72, scene.background))).any(1)
    quarters = changed.view(-1, 2, 16, 2, 16).sum((2, 4)).flatten(1)
    assert (quarters[:, cell] > 50).all()
    assert quarters.sum() == quarters[:, cell].sum()


def test_jitter_moves_the_sprite_by_its_offset():
    for j, (dy, dx) in enumerate(JITTER):
        scene = blank(1)
        scene.objects[:, 0] = 3
        centred = render(scene)
        scene.jitter[:] = j
        torch.testing.assert_close(render(scene), centred.roll((dy, dx), (2, 3)))


def test_every_object_colour_and_style_looks_different():
    axes = torch.cartesian_prod(torch.arange(len(CLASSES)), torch.arange(len(COLORS)), torch.arange(2))
    scene = blank(len(axes))
    scene.objects[:, 0], scene.colors[:, 0], scene.style = axes.T
    distance = torch.cdist(*[(render(scene)[:, :, :16, :16].flatten(1) + 1) / 2] * 2) / 768**0.5
    assert distance.fill_diagonal_(1).min() > 0.02


def test_a_part_and_a_copy_of_a_scene():
    scene = random_scene(7)
    for index in (slice(2, 5), torch.tensor([2, 3, 4])):
        assert same_scene(scene[index].clone(), scene[2:5])
        assert torch.equal(render(scene[index]), render(scene)[2:5])
    copy = scene.clone()
    copy.objects.fill_(0)
    assert not same_scene(copy, scene)
