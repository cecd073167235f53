"""A tiny model to draw with and tiny evaluators, made once."""

import pytest
import tiny_geneval as tiny
import tiny_sd3

from danceopd.evaluation.geneval import models as geneval_models


@pytest.fixture(scope="module")
def evaluators(tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluators")
    return tiny.save_detector(root / "mask2former"), tiny.save_clip(root / "clip")


@pytest.fixture
def small(monkeypatch):
    """Detectors see small pictures: at 800 pixels a test takes seconds."""
    monkeypatch.setattr(geneval_models, "SHORT", 96)
    monkeypatch.setattr(geneval_models, "LONG", 160)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_sd3.save_tiny(tmp_path_factory.mktemp("sd3") / "model")
