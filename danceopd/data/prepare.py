"""Encodes a manifest's prompts and pictures into a cache, once before training, which then needs no encoder."""

import hashlib
import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from danceopd.data.bad_rows import BadRows, Problem, list_path, write_list
from danceopd.data.cache import Cache, key_of, not_finite
from danceopd.data.column_names import column_notes
from danceopd.data.manifest import Row, read_manifest, usable_picture
from danceopd.data.picture_changes import changes_of, picture_notes
from danceopd.data.prompt_limits import look_at_prompts, prompt_notes
from danceopd.models.backbones import backbone_of
from danceopd.models.fingerprint import fingerprint
from danceopd.models.loading import class_name_of, length_of_prompts, multiple_of
from danceopd.support.bars import bar
from danceopd.support.errors import UserError
from danceopd.support.files import write_atomic
from danceopd.support.pictures import decode_picture
from danceopd.support.texts import columns_of, filled, lines_of, parse_json

TEXT_PARTS = ("text_encoder", "tokenizer", "processor", "siglip")  # what a pipeline's text encodings depend on

PICTURE_PART = "vae"  # and its latents


@dataclass(frozen=True)
class Prepared:
    """What came of a preparation.

    Attributes:
        path: The rows that training reads.
        rows: Number of rows written.
        made, found: Entries that were encoded, and that were in the cache.
        problems: What was wrong with rows that were left out.
        damaged: Shards that were mended.
        notes: What is passed over or changed of the rows, a line each.
        listed: The file that lists what was left out; None without any.
    """

    path: Path
    rows: int
    made: int
    found: int
    problems: list[Problem]
    damaged: list[str]
    notes: list[str]
    listed: Path | None


def fingerprints(model: Path) -> dict[str, str]:
    """Returns the fingerprint of each part of a pipeline that encodes, by name, leaving out those without weights."""

    def whole(part: Path) -> bool:
        has_none = "tokenizer" in part.name or "processor" in part.name
        return any(part.glob("*" if has_none else "*.safetensors"))

    parts = [part for part in sorted(model.iterdir()) if part.name.startswith((*TEXT_PARTS, PICTURE_PART))]
    return {part.name: fingerprint(part) for part in parts if whole(part)}


def check_encoders(prepared: Path, head: dict, model: Path, there: dict[str, str]) -> None:
    """Raises UserError where prepared rows come from other encoders than a model's own.

    head: the rows' first line; there: fingerprints(model). What one of the two lacks is not compared: training needs no
    encoder, and they may be deleted.
    """
    made = head.get("encoders", {})
    if other := [part for part in made if made[part] != there.get(part, made[part])]:
        raise UserError(
            f"{prepared} was made with another {' and '.join(other)} than {model} has (with those of {head['model']}); "
            f"run `danceopd data prepare` again with --model {model}"
        )


def buckets(resolution: int, multiple: int) -> list[tuple[int, int]]:
    """Lists the sizes (height, width) of about resolution^2 pixels, in multiples of `multiple`, from 1 : 2 to 2 : 1."""
    sizes = set()
    for width in range(multiple, 2 * resolution + 1, multiple):
        height = max(multiple, round(resolution**2 / width / multiple) * multiple)
        if 0.5 <= height / width <= 2:
            sizes.add((height, width))
    return sorted(sizes)


def bucket_of(height: int, width: int, sizes: list[tuple[int, int]]) -> tuple[int, int]:
    """Returns the bucket whose aspect ratio is nearest, by the logarithm."""
    ratio = np.log(height / width)
    return min(sizes, key=lambda size: (abs(np.log(size[0] / size[1]) - ratio), size))


def fit(picture: Image.Image, size: tuple[int, int]) -> torch.Tensor:
    """Scales a picture to cover (height, width) and cuts it at its middle: [3, H, W] float32 in [-1, 1]."""
    height, width = size
    scale = max(height / picture.height, width / picture.width)
    scaled = picture.resize((max(width, round(picture.width * scale)), max(height, round(picture.height * scale))),
                            Image.Resampling.LANCZOS)  # fmt: skip
    left, top = (scaled.width - width) // 2, (scaled.height - height) // 2
    array = np.asarray(scaled.crop((left, top, left + width, top + height)).convert("RGB"), dtype=np.float32)
    return torch.from_numpy(array / 127.5 - 1).permute(2, 0, 1).contiguous()


@dataclass(frozen=True)
class Seen:
    """A picture as it is encoded: a digest of its file's bytes, the (height, width) of its bucket, and what of it
    changes, of picture_changes.CHANGES."""

    digest: str
    size: tuple[int, int]
    changes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Names:
    """Names the entries of a model in the cache."""

    text_model: str
    picture_model: str
    seen: dict[Path, Seen]
    prompts_see_pictures: bool  # where the text encoder looks at the source pictures too

    def prompt(self, prompt: str, sources: tuple[Path, ...] = ()) -> str:
        looked_at = [self.picture(path) for path in sources] if self.prompts_see_pictures else []
        return key_of("prompt", self.text_model, prompt, *(looked_at or [""]))

    def picture(self, path: Path) -> str:
        return key_of("latents of sRGB", self.picture_model, self.seen[path].digest, str(self.seen[path].size))


# Long: a third of it says what its arguments are.
def prepare(
    manifest: Path,
    model: Path,
    folder: Path,
    *,
    resolution: int = 1024,
    root: Path | None = None,
    needs_source: Iterable[str] = (),
    texts: Iterable[str] = (),
    batch_size: int = 8,
    entries_per_shard: int = 256,
    workers: int = 2,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    on_bad_row: str = "skip",
    max_bad_rows: int | None = None,
    max_sequence_length: int | None = None,
) -> Prepared:
    """Encodes what a manifest names and is not in the cache yet, and writes the rows that training reads.

    Prompts are encoded first, and their encoders let go before the pictures'. Equal prompts and pictures are encoded
    once, whatever rows or manifests name them. A row's picture is of the target's shape, else of the first source's,
    else a square. A row with more source pictures than the model takes is bad, and so is one that cannot be encoded
    to finite values; the others go on. What was left out is listed beside the rows, in NAME.left_out.txt.

    Args:
        manifest: JSONL or CSV, as data.manifest reads it.
        model: The folder of a diffusers pipeline: its encoders.
        folder: The cache; manifests may share it.
        resolution: A picture has about resolution^2 pixels.
        root: The folder that picture paths start from; the manifest's own if not given.
        needs_source: Capabilities whose rows must have a source picture.
        texts: What sources are asked with beside the rows' prompts: negative prompts, and texts with a row's columns in
            braces, such as "{prompt}, in ink". The empty prompt is always among them. Where the text encoder sees the
            source pictures they are encoded with each row's.
        batch_size: Prompts or pictures that are encoded at a time.
        entries_per_shard: After so many a shard of the cache is written, which a killed process leaves behind.
        workers: Threads that read pictures.
        device, dtype: Of the encoders.
        on_bad_row: "skip" leaves bad rows out, "refuse" ends before the next step where there is any.
        max_bad_rows: How many may be left out; any number if not given.
        max_sequence_length: Tokens of a prompt; the pipeline's default if not given. Where padding is not masked (FLUX,
            FLUX.2) the student then draws best from a pipeline that is called with the same number.

    Returns:
        Where the rows are, and what came of them.

    Raises:
        UserError: The manifest, model or cache is of no use, bad rows may not be left out, or the rows would overwrite
            those of another manifest.
    """
    backbone, bad_rows = backbone_of(model), BadRows(on_bad_row, max_bad_rows)
    texts = _check_texts(texts)
    rows, problems = read_manifest(manifest, root, needs_source=needs_source)
    sizes = buckets(resolution, multiple_of(backbone, model))
    rows, too_many = _check_counts(rows, backbone, model)
    if not sizes or any(not (row.source_images or row.target_image) for row in rows):  # these are of this size exactly
        backbone.latent_shape(model, resolution, resolution)
    rows, unfilled = _check_columns(rows, texts)
    rows, seen, unreadable = _look_at_pictures(rows, sizes, workers)
    problems = sorted([*problems, *too_many, *unfilled, *unreadable], key=lambda problem: problem.line)
    bad_rows.settle(manifest, problems, len(rows))
    encoders = fingerprints(model)
    if PICTURE_PART not in encoders:
        raise UserError(f"no {PICTURE_PART} with weights in {model}; give the folder of a whole pipeline")
    length = length_of_prompts(max_sequence_length, backbone, model)
    own_length = [] if length == backbone.MAX_SEQUENCE_LENGTH else [f"max_sequence_length {length}"]
    names = Names(
        key_of(*(value for part, value in encoders.items() if part != PICTURE_PART), *own_length),
        encoders[PICTURE_PART],
        seen,
        backbone.PROMPTS_SEE_PICTURES and "edit" in backbone.tasks(model),
    )
    path = folder / f"{manifest.stem}.jsonl"
    made_from = {"path": str(manifest.resolve()), "rows": key_of(*(str(_record(row, names, (), 0)) for row in rows))}
    _check_not_anothers(path, made_from)
    cache = Cache(folder)
    run = partial(_encode, cache=cache, batch_size=batch_size, entries_per_shard=entries_per_shard)
    said = [(prompt, row.source_images) for row in rows for prompt in (row.prompt, *_filled(row, texts).values())]
    shown = {row.source_images for row in rows} if names.prompts_see_pictures else set()
    said += [(text, sources) for sources in sorted({(), *shown}) for text in _constant(texts)]
    prompts = {names.prompt(*one): one for one in said}
    bad: dict[str, str] = {}
    new_prompts = {key: value for key, value in prompts.items() if not cache.sound(key)}
    if new_prompts:
        bad = run(
            list(new_prompts),
            _prompt_encoder(backbone, model, device, dtype, length, new_prompts, names),
            name="prompts",
        )
    for text in _constant(texts):
        if (key := names.prompt(text)) in bad:
            raise UserError(f"the negative prompt {text!r} cannot be encoded by {model}: {bad[key]}")
    rows, unencoded = _without(bad, rows, names, texts)
    problems = sorted([*problems, *unencoded], key=lambda problem: problem.line)
    bad_rows.settle(manifest, problems, len(rows))
    pictures = {names.picture(path): path for path in sorted({path for row in rows for path in row.pictures})}
    new_pictures = {key: path for key, path in pictures.items() if not cache.sound(key)}
    bad = {}
    if new_pictures:
        encode = _picture_encoder(backbone, model, device, dtype, new_pictures, seen, workers)
        for size in sorted({seen[path].size for path in new_pictures.values()}):  # one batch is of one size
            group = [key for key, path in new_pictures.items() if seen[path].size == size]
            bad |= run(group, encode, name=f"pictures {size[0]} x {size[1]}")
    rows, unencoded = _without(bad, rows, names, texts)
    problems = sorted([*problems, *unencoded], key=lambda problem: problem.line)
    bad_rows.settle(manifest, problems, len(rows))
    spoken = {row.id: [row.prompt, *_filled(row, texts).values()] for row in rows}
    changed, limits = look_at_prompts(
        backbone, model, list(dict.fromkeys(prompt for prompts in spoken.values() for prompt in prompts)), length
    )
    records = [_record(row, names, texts, resolution) | _changes(spoken[row.id], changed) for row in rows]
    head = {"model": str(model), "encoders": encoders, "manifest": made_from, "prompt_limits": limits}
    head["max_sequence_length"] = length
    head["made_with"] = {"resolution": resolution, "dtype": str(dtype).removeprefix("torch.")}
    head["made_with"] |= {} if root is None else {"root": str(root)}
    head["made_with"] |= {"max_sequence_length": length} if own_length else {}
    head["left_out"] = len({problem.line for problem in problems})
    write_list(path, manifest, problems)
    _write_rows(path, records, names, head, texts)
    return Prepared(
        path,
        len(rows),
        made=sum(key in cache for key in (*new_prompts, *new_pictures)),
        found=len(prompts) + len(pictures) - len(new_prompts) - len(new_pictures),
        problems=problems,
        damaged=cache.damaged,
        notes=[
            *column_notes(rows),
            *prompt_notes(records, limits),
            *picture_notes({path: seen[path].changes for path in pictures.values()}),
        ],
        listed=list_path(path) if problems else None,
    )


def _check_texts(texts: Iterable[str]) -> tuple[str, ...]:
    """Returns the texts, each once and the empty one first; a UserError for braces that are not as they should be."""
    for text in texts:
        try:
            columns_of(text)
        except ValueError as error:
            raise UserError(str(error)) from None
    return tuple(dict.fromkeys(("", *texts)))


def _check_columns(rows: list[Row], texts: tuple[str, ...]) -> tuple[list[Row], list[Problem]]:
    """Returns the rows that have all columns that texts take, and what is wrong with the others."""
    good, problems = [], []
    for row in rows:
        try:
            _filled(row, texts)
            good.append(row)
        except ValueError as error:
            problems.append(Problem(row.line, str(error)))
    return good, problems


def _changes(prompts: list[str], changed: dict[str, dict]) -> dict[str, list[str]]:
    """Joins what look_at_prompts found in a row's prompts."""
    joined: dict[str, list[str]] = {}
    for prompt in prompts:
        for key, values in changed.get(prompt, {}).items():
            joined[key] = list(dict.fromkeys([*joined.get(key, []), *values]))
    return joined


def _constant(texts: tuple[str, ...]) -> list[str]:
    """Returns the texts that take nothing from a row, as they are encoded."""
    return [text for text in texts if not columns_of(text)]


def _filled(row: Row, texts: tuple[str, ...]) -> dict[str, str]:
    """Returns a row's own texts, by what they are filled from."""
    return {text: filled(text, row.columns) for text in texts if columns_of(text)}


def _check_not_anothers(path: Path, made_from: dict) -> None:
    """Raises UserError where rows are those of another manifest: manifests may share a cache, and each has its rows."""
    if not path.is_file():
        return
    try:
        before = parse_json(next(lines_of(path.read_text(encoding="utf-8")), (0, ""))[1])["manifest"]
        same = before["path"] == made_from["path"] or before["rows"] == made_from["rows"]
    except (OSError, ValueError, KeyError, IndexError, TypeError):  # damaged, or of an older version: made again
        return
    if not same:
        raise UserError(
            f"{path} holds the rows of another manifest, {before['path']}; rename {made_from['path']}, give another "
            f"--cache, or remove {path.name} if its rows are no longer needed"
        )


def _without(
    bad: dict[str, str], rows: list[Row], names: Names, texts: tuple[str, ...]
) -> tuple[list[Row], list[Problem]]:
    """Returns the rows all of whose entries were encoded, and what is wrong with the others.

    bad: of entries that were not, the reason.
    """
    good, problems = [], []
    for row in rows if bad else ():
        what = {names.prompt(row.prompt, row.source_images): f"prompt {row.prompt[:80]!r}"}
        own = [*_filled(row, texts).values(), *(_constant(texts) if names.prompts_see_pictures else ())]
        what |= {names.prompt(text, row.source_images): f"text {text[:80]!r}" for text in own}
        what |= {names.picture(path): f"picture {path.name}" for path in row.pictures}
        own = [Problem(row.line, f"{row.id}: {name}: {bad[key]}") for key, name in what.items() if key in bad]
        problems += own
        good += [] if own else [row]
    return (good if bad else rows), problems


def _prompt_encoder(backbone, model: Path, device, dtype, length: int, prompts: dict, names: Names) -> Callable:
    """Loads the text encoder; returns what encodes keys of `prompts`, {key: (prompt, source pictures)}."""
    encoder = backbone.text_encoder(model, device, dtype, length)

    def encode(keys):
        chosen = [prompts[key] for key in keys]
        shown = [[fit(decode_picture(path), names.seen[path].size) for path in sources] for _, sources in chosen]
        encoded = encoder([prompt for prompt, _ in chosen], shown if names.prompts_see_pictures else None)
        return [{name: value[i].cpu() for name, value in encoded.items()} for i in range(len(keys))]

    return encode


def _picture_encoder(backbone, model: Path, device, dtype, pictures: dict, seen: dict, workers: int) -> Callable:
    """Loads the VAE; returns what encodes keys of `pictures`, {key: path}, all of one size."""
    codec, _ = backbone.picture_codec(model, device, dtype)

    def encode(keys):
        paths = [pictures[key] for key in keys]
        with ThreadPoolExecutor(workers) as pool:
            stack = list(pool.map(lambda path: fit(decode_picture(path), seen[path].size), paths))
        return [{"latents": value.cpu()} for value in codec(torch.stack(stack))]

    return encode


def _entries(names: Names, texts: tuple[str, ...], sources: tuple[Path, ...] = ()) -> dict[str, str]:
    return {text: names.prompt(text, sources) for text in _constant(texts)}


def _record(row: Row, names: Names, texts: tuple[str, ...], resolution: int) -> dict:
    """Returns the names of a row's entries in the cache, and its sizes; one without pictures is a square."""
    shaped_by = [row.target_image] if row.target_image else row.source_images
    size = names.seen[shaped_by[0]].size if shaped_by else (resolution, resolution)
    own = {text: names.prompt(said, row.source_images) for text, said in _filled(row, texts).items()}
    sees = names.prompts_see_pictures and row.source_images
    if sees:
        own |= _entries(names, texts, row.source_images)
    return {
        "id": row.id,
        "capability": row.capability,
        "prompt": names.prompt(row.prompt, row.source_images),
        "sources": [names.picture(path) for path in row.source_images],
        "source_sizes": [list(names.seen[path].size) for path in row.source_images],
        "target": names.picture(row.target_image) if row.target_image else None,
        "size": list(size),
        **({"negative_prompts": own} if own or sees else {}),
    }


def _write_rows(path: Path, records: list[dict], names: Names, head: dict, texts: tuple[str, ...]) -> None:
    """Writes a line a row; before them, head and the texts that all rows share."""
    head = {
        **head,
        "negative_prompts": _entries(names, texts),
        "prompts_see_pictures": names.prompts_see_pictures,
    }
    write_atomic(path, "".join(json.dumps(line) + "\n" for line in (head, *records)).encode())


def _check_counts(rows: list[Row], backbone, model: Path) -> tuple[list[Row], list[Problem]]:
    """Returns the rows with no more source pictures than the model takes, and what is wrong with the others."""
    most = backbone.MAX_SOURCES if "edit" in backbone.tasks(model) else 0
    takes = f"a {class_name_of(model)} takes {most or 'none'}"
    problems = [
        Problem(row.line, f"{len(row.source_images)} source picture{'s' * (len(row.source_images) > 1)}, but {takes}")
        for row in rows
        if len(row.source_images) > most
    ]
    return [row for row in rows if len(row.source_images) <= most], problems


def _look_at_pictures(rows: list[Row], sizes, workers: int) -> tuple[list[Row], dict[Path, Seen], list[Problem]]:
    """Returns the rows all of whose pictures can be read, those pictures, and what is wrong with the others."""

    def look(path: Path) -> Seen | str:
        try:
            picture = usable_picture(path)
            size = bucket_of(picture.height, picture.width, sizes)
            digest = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
            return Seen(digest, size, changes_of(picture, size))
        except (ValueError, OSError) as error:
            return str(error)

    paths = sorted({path for row in rows for path in row.pictures})
    with ThreadPoolExecutor(workers) as pool:
        looked = dict(zip(paths, bar(pool.map(look, paths), "pictures seen", len(paths)), strict=True))
    bad = {path: message for path, message in looked.items() if isinstance(message, str)}
    problems = [
        Problem(row.line, f"picture {path.name}: {bad[path]}")
        for row in rows
        for path in dict.fromkeys(row.pictures)
        if path in bad
    ]
    good = [row for row in rows if not any(path in bad for path in row.pictures)]
    return good, {path: looked[path] for row in good for path in row.pictures}, problems


@torch.no_grad()
def _encode(
    keys: list[str], encode: Callable, *, cache: Cache, batch_size: int, entries_per_shard: int, name: str
) -> dict[str, str]:
    """Encodes entries batch by batch; what is done is on disk after every shard.

    Returns:
        The reason for each entry that has no encoding, or none that is finite; nothing is kept of it.
    """
    waiting: dict[str, dict[str, torch.Tensor]] = {}
    bad: dict[str, str] = {}
    with bar(total=len(keys), desc=name, unit="entry") as shown:
        for start in range(0, len(keys), batch_size):
            part = keys[start : start + batch_size]
            encoded, refused = _encoded(part, encode)
            bad |= refused
            for key, tensors in encoded.items():
                if lost := not_finite(tensors):
                    dtype = str(tensors[lost].dtype).removeprefix("torch.")
                    wider = "; another dtype may hold it (--dtype float32)" if dtype != "float32" else ""
                    bad[key] = f"its encoding in {dtype} has values that are not finite, in {lost}{wider}"
                else:
                    waiting[key] = tensors
            shown.update(len(part))
            if len(waiting) >= entries_per_shard:
                cache.write(waiting)
                waiting = {}
    if waiting:
        cache.write(waiting)
    return bad


def _encoded(keys: list[str], encode: Callable) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, str]]:
    """Encodes a batch, or where that fails one entry after another, so that a bad one does not take others with it."""
    try:
        return dict(zip(keys, encode(keys), strict=True)), {}
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # tokenizers, processors and models raise almost anything
        if len(keys) == 1:
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            return {}, {keys[0]: f"the encoder refuses it ({reason})"}
    encoded, bad = {}, {}
    for key in keys:
        one, refused = _encoded([key], encode)
        encoded |= one
        bad |= refused
    return encoded, bad
