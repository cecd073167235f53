"""Samples of files: equal for equal content wherever it lies, and different for any other."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from danceopd.models.fingerprint import BLOCK, PROBED, WHOLE, identity, sample
from danceopd.support.errors import UserError


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A safetensors file of which a sample reads a part."""
    path = tmp_path_factory.mktemp("large") / "a.safetensors"
    save_file({"a": np.random.default_rng(0).integers(0, 256, WHOLE + 3 * BLOCK, dtype=np.uint8)}, path)
    return path


def test_a_sample_is_of_the_content_and_not_of_the_place(large, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "b.safetensors").write_bytes(large.read_bytes())
    assert sample(large) == sample(tmp_path / "there" / "b.safetensors")
    before = sample(tmp_path / "there")
    assert before == sample((tmp_path / "there").rename(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere" / "b.safetensors").rename(tmp_path / "elsewhere" / "c.safetensors")
    assert sample(tmp_path / "elsewhere") != before
    assert sample(tmp_path / "there") == "missing"


@pytest.mark.parametrize("at", [0, 100, WHOLE // 3, WHOLE // 2, -1])
def test_other_values_give_another_sample(large, tmp_path, at):
    data = bytearray(large.read_bytes())
    if at in (0, -1, 100):  # the header and both ends are read whole
        data[at] ^= 1
    else:  # of what lies between, a change as long as two blocks' distance is seen
        data[at : at + WHOLE // 32] = bytes(WHOLE // 32)
    (tmp_path / "a.safetensors").write_bytes(data)
    assert sample(tmp_path / "a.safetensors") != sample(large)


def test_a_model_of_which_only_the_middle_was_trained_is_another(tmp_path):
    """Its file has the size and both ends of the one before: pictures, scores and answers of that one are not its."""
    values = np.zeros(4 * PROBED, dtype=np.uint8)
    save_file({"a": values}, tmp_path / "model.safetensors")
    before = identity(tmp_path)
    values[2 * PROBED] = 1
    save_file({"a": values}, tmp_path / "model.safetensors")
    assert identity(tmp_path) != before
    with pytest.raises(UserError, match="there is nothing at"):
        identity(tmp_path / "gone")


def test_every_byte_of_a_small_file_counts(tmp_path):
    names = set()
    for i in range(50):
        data = bytearray(50)
        data[i] = 1
        (tmp_path / "a").write_bytes(data)
        names.add(sample(tmp_path / "a"))
    (tmp_path / "a").write_bytes(bytes(51))
    assert len(names | {sample(tmp_path / "a")}) == 51
