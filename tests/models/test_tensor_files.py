"""Headers of safetensors files as strangers and broken disks leave them."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from danceopd.models.tensor_files import opened, read_header
from danceopd.support.errors import UserError

WHOLE = {"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}


def write(path, header, data=bytes(16)):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(**changes):
    return {"a": WHOLE["a"] | changes}


def test_a_whole_file(tmp_path):
    save_file({"a": torch.zeros(2, 2), "b": torch.zeros(3, dtype=torch.bool)}, tmp_path / "a.safetensors", {"k": "v"})
    expected = {"a": ("F32", torch.Size([2, 2])), "b": ("BOOL", torch.Size([3]))}
    assert read_header(tmp_path / "a.safetensors") == expected
    assert read_header(write(tmp_path / "b.safetensors", WHOLE)) == {"a": ("F32", torch.Size([2, 2]))}


@pytest.mark.parametrize(
    "header",
    [
        *(entry(shape=shape) for shape in ([10**400], [2**63], [2.5], ["2"], "22", None, {"0": 2}, [2, 3], [[2, 2]])),
        *(entry(data_offsets=ends) for ends in ([0], [16, 0], ["0", "16"], [0, 10**30], None, [0, 1e300], [0, None])),
        *(entry(dtype=dtype) for dtype in (["F32"], {}, "F64", "F16")),
        *({"a": value} for value in (None, [], 5, "x", {})),
        *([], None, 5, "x", b"{", b"[" * 5000 + b"]" * 5000, b"\xff\xfe"),
    ],
)
def test_a_header_that_is_none_is_named(tmp_path, header):
    path = write(tmp_path / "odd.safetensors", header)
    for read in (read_header, lambda file: opened(file).__enter__()):
        with pytest.raises(UserError, match=r"odd\.safetensors"):
            read(path)
