"""Configurations of a pipeline's folder that no pipeline writes are said to be that, by name."""

import json
import shutil

import pytest
import tiny_sd3

from danceopd.models.backbones import empty_transformer, sd3
from danceopd.support.errors import UserError


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return tiny_sd3.save_tiny(tmp_path_factory.mktemp("odd") / "model")


READERS = {
    "scheduler/scheduler_config.json": lambda model: sd3.sigmas(model, 4, 64, 64),
    "vae/config.json": lambda model: sd3.latent_shape(model, 64, 64),
    "transformer/config.json": lambda model: sd3.latent_shape(model, 64, 64),
    "transformer": empty_transformer,
}


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("scheduler/scheduler_config.json", "num_train_timesteps", 0),
        ("scheduler/scheduler_config.json", "shift", "three"),
        ("scheduler/scheduler_config.json", "shift", None),
        ("vae/config.json", "block_out_channels", None),
        ("vae/config.json", "block_out_channels", 5),
        ("transformer/config.json", "in_channels", ...),
        ("transformer/config.json", "patch_size", "2"),
        ("transformer/config.json", "patch_size", None),
        ("transformer", "num_attention_heads", []),
        ("transformer", "num_layers", "2"),
        ("transformer", "dual_attention_layers", 7),
    ],
)
def test_the_folder_is_named(whole, tmp_path, file, key, value):
    model = shutil.copytree(whole, tmp_path / "model")
    path = model / (file if file.endswith(".json") else f"{file}/config.json")
    config = json.loads(path.read_text())
    config = {k: v for k, v in config.items() if k != key} | ({} if value is ... else {key: value})
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=str(model)):
        READERS[file](model)
    READERS[file](whole)
