"""Damages files: by their bytes, by the values of JSON and YAML, and by the header of a safetensors file."""

import copy
import json
import random
import struct

import yaml

DEEP = 3000  # levels of nesting

SURROGATE = "\ud83d"  # half a character

ODD = (
    *(None, True, False, 0, -1, 1, 2, 2.5, -0.0, 1e308, float("nan"), float("inf"), 10**9, 2**31, 2**63, 10**400),
    *("", " ", "x", "0", "nan", "auto", "é", "\u2028", "\0", SURROGATE, "a" * 10_000, "{", "{}", "{x!r:>9}", "%s"),
    *(
        "../outside/secret.png",
        "/etc/passwd",
        "~",
        ".",
        "..",
        "a/../../b",
        "file:///etc/passwd",
        "<script>",
        "2024-13-45",
        "$\\frac$",
    ),
    *([], [[]], [None], [1, 2], ["x"], {}, {"": None}, {"x": {"y": 1}}),
)

MARKS = (b"", b"\0", b"\xff", b"\xff\xfe", b"{", b"}", b"[", b'"', b"\n", b",", b":", b"-", b"9" * 30, b"\xe2\x80\xa8")


def damaged(data: bytes, name: str, dice: random.Random) -> bytes:
    """Damages a file once, or a few times, in a way that its name's ending makes likely to be looked at."""
    for _ in range(dice.choice((1, 1, 1, 2, 4))):
        data = _once(data, name, dice)
    return data


def _once(data: bytes, name: str, dice: random.Random) -> bytes:
    ways = [_bytes]
    if name.endswith((".json", ".jsonl", ".yaml")):
        ways += [_values] * 3
    if name.endswith(".safetensors"):
        ways += [_header] * 3
    try:
        return dice.choice(ways)(data, name, dice)
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError, struct.error, yaml.YAMLError, IndexError):
        return _bytes(data, name, dice)  # what an earlier damage has left is no such file any more


def _bytes(data: bytes, name: str, dice: random.Random) -> bytes:
    at = dice.randrange(len(data) + 1) if dice.random() < 0.5 else dice.randrange(min(len(data), 200) + 1)
    length = dice.choice((1, 1, 2, 8, 100, len(data)))
    before, here, after = data[:at], data[at : at + length], data[at + length :]
    way = dice.randrange(7)
    if way == 0:
        return before
    if way == 1:
        return before + after
    if way == 2:
        return before + here * dice.choice((2, 3, 50)) + after
    if way == 3:
        return before + bytes(b ^ (1 << dice.randrange(8)) for b in here[:1]) + here[1:] + after
    if way == 4:
        return before + dice.choice(MARKS) + here + after
    if way == 5:
        return before + bytes(len(here)) + after
    return before + dice.randbytes(min(len(here), 64)) + here[64:] + after


def _values(data: bytes, name: str, dice: random.Random) -> bytes:
    """Changes a value in JSON, in one line of JSONL, or in YAML."""
    text = data.decode()
    if name.endswith(".jsonl"):
        lines = text.splitlines()
        at = dice.randrange(len(lines))
        lines[at] = json.dumps(changed(json.loads(lines[at]), dice))
        if dice.random() < 0.1:
            lines.insert(dice.randrange(len(lines)), lines[at])
        return ("\n".join(lines) + "\n").encode()
    if name.endswith(".yaml"):
        return yaml.safe_dump(changed(yaml.safe_load(text), dice), sort_keys=False).encode(errors="surrogatepass")
    if dice.random() < 0.03:
        return ("[" * DEEP + "]" * DEEP).encode()
    return json.dumps(changed(json.loads(text), dice)).encode()


def _header(data: bytes, name: str, dice: random.Random) -> bytes:
    """Changes the header of a safetensors file, or its length; metadata that holds JSON is changed inside too."""
    (length,) = struct.unpack("<Q", data[:8])
    if dice.random() < 0.05:
        return struct.pack("<Q", dice.choice((0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1))) + data[8:]
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    metadata = header.get("__metadata__", {})
    if metadata and dice.random() < 0.5:
        key = dice.choice(sorted(metadata))
        metadata[key] = json.dumps(changed(json.loads(metadata[key]), dice))
    else:
        header = changed(header, dice)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + rest


def changed(value: object, dice: random.Random) -> object:
    """Copies plain values with one of them changed, left out, doubled or put under another key."""
    value = copy.deepcopy(value)
    places = list(_places(value))
    if not places:
        return dice.choice(ODD)
    holder, key = dice.choice(places)
    way = dice.randrange(6)
    if way == 0:
        del holder[key]
    elif way == 1 and isinstance(holder, dict):
        holder[str(dice.choice((f"{key}x", key[:-1], key.upper(), "", "__proto__")))] = holder.pop(key)
    elif way == 2:
        other, there = dice.choice(places)
        holder[key] = copy.deepcopy(other[there])
    elif way == 3 and isinstance(holder[key], int | float):
        holder[key] = dice.choice((-1, 0, 10, 1000, 10**7, -0.5)) * holder[key]
    elif way == 4 and isinstance(holder[key], str):
        at = dice.randrange(len(holder[key]) + 1)
        holder[key] = holder[key][:at] + dice.choice(("", "\0", SURROGATE, "/", "..", "{", " ")) + holder[key][at + 1 :]
    else:
        holder[key] = copy.deepcopy(dice.choice(ODD))
    return value


def _places(value: object):
    """Yields (the mapping or list, its key) of every value inside."""
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])
