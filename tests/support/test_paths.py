"""Paths that differ from a file's in how they are written: the file is named, and nothing outside its folder."""

import unicodedata

import pytest

from danceopd.support.paths import near_path

COMPOSED, APART = (unicodedata.normalize(form, "café.png") for form in ("NFC", "NFD"))


@pytest.fixture
def root(tmp_path):
    for name in ("in/images/cup.png", f"in/images/{APART}", "secret.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    return tmp_path / "in"


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("images\\cup.png", "; there is images/cup.png, with slashes"),
        ("Images/CUP.png", "; there is images/cup.png, with other upper and lower case"),
        (f"images/{COMPOSED}", f"; there is images/{APART}, with another Unicode form of its letters"),
        ("images\\Cup.png", "; there is images/cup.png, with slashes and other upper and lower case"),
        ("images/plate.png", ""),
        ("../SECRET.png", ""),
        ("..\\secret.png", ""),
        ("images/../../Secret.png", ""),
        ("images/\0.png", ""),
        ("x" * 5000, ""),
    ],
)
def test_what_was_meant(root, written, said):
    assert near_path(written, root) == said


def test_a_link_that_leads_out_is_not_told(root):
    (root / "Out").symlink_to(root.parent)
    assert near_path("out/secret.png", root) == ""


def test_a_path_of_its_own(root, monkeypatch):
    assert (
        near_path(root / "IMAGES" / "cup.png") == f"; there is {root}/images/cup.png, with other upper and lower case"
    )
    assert near_path(root / "images" / "cap.png") == f"; did you mean '{root}/images/cup.png'?"
    assert near_path(root / "image" / "cup.png") == f"; did you mean '{root}/images/cup.png'?"
    assert near_path(root / "image" / "plate.png") == near_path(root / "images" / "plate.png") == ""
    assert near_path("minature") == "; did you mean 'miniature'?"
    assert near_path("miniature/woodd") == "; did you mean 'miniature/wood'?"
    monkeypatch.setenv("HOME", str(root))
    assert near_path("~/images/cup.png") == f"; there is {root}/images/cup.png, with ~ as the home folder"
    assert near_path("~/images/none.png") == ""
