"""Text files as people save them: marks, line ends, separators inside lines, keys twice, deep nesting."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from danceopd.support.errors import UserError
from danceopd.support.texts import lines_of, parse_json, parse_object, read_text

SEPARATORS = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"  # where str.splitlines cuts beside line feed and carriage return


@given(
    st.lists(st.text(st.sampled_from("ab é" + SEPARATORS), min_size=1), min_size=1),
    st.sampled_from(["\n", "\r\n", "\r"]),
)
def test_a_line_is_what_ends_in_a_newline(tmp_path_factory, lines, end):
    path = tmp_path_factory.mktemp("texts") / "a.txt"
    path.write_bytes(("\ufeff" + end.join(lines) + end).encode())
    expected = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    assert [*lines_of(read_text(path))] == expected


def test_files_that_are_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes("one\ntwo\nthrée\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"a\.txt is not UTF-8 \(line 3\)"):
        read_text(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_text("one", encoding="utf-16")
    with pytest.raises(UserError, match="begins as UTF-16 does"):
        read_text(tmp_path / "a.txt")
    with pytest.raises(UserError, match="is a folder; give the list itself"):
        read_text(tmp_path, "list")
    with pytest.raises(UserError, match=r"no list .*A\.txt; there is .*a\.txt, with other upper and lower case"):
        read_text(tmp_path / "A.txt", "list")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "nests too deep"),
        ('{"a":' * 100_000, "nests too deep"),
        ('{"a": 1, "b": {"c": 1, "c": 1}}', "the key 'c' stands twice"),
        ("{torn", "Expecting property name"),
        ('{"a": ["\\ud83d"]}', "half a character"),
        (b'{"\\uDE00": 1}', "half a character"),
        ("9" * 5000, "Exceeds the limit"),
    ],
)
def test_json_that_cannot_be_used(text, said):
    with pytest.raises(ValueError, match=said):
        parse_json(text)


def test_an_escaped_pair_is_one_character():
    assert parse_json('"\\ud83d\\ude00 \\u2028"') == "\U0001f600 \u2028"


@pytest.mark.parametrize("text", ["[]", "5", "null", '"{}"'])
def test_json_that_is_no_object(text):
    assert parse_object('{"a": []}') == {"a": []}
    with pytest.raises(ValueError, match="no JSON object"):
        parse_object(text)


@given(
    st.recursive(
        st.none() | st.floats(allow_nan=False) | st.text(), lambda v: st.lists(v) | st.dictionaries(st.text(), v)
    )
)
def test_json_is_read_as_it_was_written(value):
    assert parse_json(json.dumps(value)) == value
