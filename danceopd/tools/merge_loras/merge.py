"""From several LoRAs to one: reads them, trains, compares, and writes the file and its page."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from danceopd.config.reading import parse_config
from danceopd.config.sections import Config
from danceopd.data.prepare import prepare
from danceopd.data.prompt_limits import notes_before
from danceopd.models.backbones import pipeline_class_of
from danceopd.models.loading import length_of_prompts
from danceopd.models.lora_algebra import Lora
from danceopd.models.lora_files import FILES, add_metadata, load_lora
from danceopd.models.precision import PRECISIONS
from danceopd.support.devices import find_device
from danceopd.support.errors import UserError
from danceopd.support.files import write_atomic
from danceopd.tools.export import export, write_adapter
from danceopd.tools.merge_loras.compare import Results, compare
from danceopd.tools.merge_loras.configuration import HEARD, check_overrides, configuration, heard_otherwise, manifest_of
from danceopd.tools.merge_loras.given import Given, Options, beside, read
from danceopd.tools.merge_loras.kept import COMPARISON, check_output, check_run, written_by
from danceopd.tools.merge_loras.page import page_of
from danceopd.tools.merge_loras.prompts import Route, routes_of, say
from danceopd.tools.merge_loras.run import described, distilled, fitted
from danceopd.tools.merge_loras.triggers import Trigger, phrases_of
from danceopd.tools.provenance import named


@dataclass(frozen=True)
class Merged:
    """What came of a merge.

    Attributes:
        path: The adapter's file.
        page: The page that compares it.
        plain: The file of PEFT's best merge, where that is as good; else None.
        results: What was measured; comparison.json in the run's folder holds it too.
    """

    path: Path
    page: Path
    plain: Path | None
    results: Results


def merge_loras(
    base: Path, loras: Sequence[Path], output: Path, options: Options | None = None, dry_run: bool = False
) -> Merged | None:
    """Distils LoRAs of one pipeline into one adapter, and compares it.

    The same call goes on after an interruption; another rank or other prompts are another run beside it.

    Args:
        base: The pipeline's folder, or an id of the hub.
        loras: Two LoRAs or more: files, folders or ids of the hub.
        output: The .safetensors file to write; a page OUTPUT.html stands beside it.
        options: How they are merged.
        dry_run: Says what it takes, and ends.

    Returns:
        What came of it; None of a dry run.

    Raises:
        UserError: Something is missing or does not fit; every mistake is named before anything is encoded.
    """
    options = options or Options()
    if not dry_run:
        return _finished(*_begun(base, loras, output, options, None), output, options)
    with TemporaryDirectory() as made:  # a dry run leaves nothing of what it makes of checkpoints and weighed layers
        _begun(base, loras, output, options, Path(made))
    return None


def _begun(
    base: Path, loras: Sequence[Path], output: Path, options: Options, made: Path | None
) -> tuple[Config, Given, list[Route]]:
    """Reads, says what the merge takes, and encodes the prompts; a dry run, which has a folder, prints all."""
    given = read(base, loras, output, options, made)
    routes = routes_of(given.triggers, given.prompts, options.pairs)
    work = options.work or output.with_suffix(".work")
    manifest, rows = manifest_of(routes)
    raw = configuration(given, options, routes, work, manifest)
    config = parse_config(raw, list(options.overrides), "this merge")
    check_overrides(config, raw, options.overrides)
    if not options.overwrite:
        check_run(config)
        check_output(output, config.training.output_dir)
    for line in described(given, options, routes, config):
        say(line)
    prompts = [("", text) for text in dict.fromkeys(t for route in routes for row in route.rows for t in row)]
    length = length_of_prompts(options.max_sequence_length, given.backbone, given.base)
    for note in notes_before(given.backbone, given.base, prompts, length):
        say(f"warning: {note}")
    if not made:
        encode(config, given, options, routes, work, (manifest, rows))
    config, findings, lines = fitted(config, options.overrides, options.overwrite)
    for line in lines:
        say(line)
    if made:
        say("time: by a forward that the run itself times before its first update")
        if not (work / "cache" / manifest).is_file():  # which is no problem before the run itself
            findings.problems = [line for line in findings.problems if ".data.prepared:" not in line]
            findings.found.append("no prompt is encoded yet; activations are counted once they are")
        print(findings.text())
        if findings.problems:
            raise UserError("\n  ".join(["this merge cannot start:", *findings.problems]))
    return config, given, routes


def _finished(config: Config, given: Given, routes: list[Route], output: Path, options: Options) -> Merged:
    """Trains, compares and writes."""
    run = distilled(config, options.patience, options.overwrite)
    merged = load_lora(run / "student" / FILES[1], given.empty, pipeline_class_of(given.base))
    results = compare(config, given, routes, merged)
    plain, page = beside(output)
    files = {output: _adapter(run, options.layout, given), page: page_of(output, run, given, options, results)}
    if results.enough:
        files[plain] = _plain_merge(results.merge, options.layout, given)
    else:
        plain.unlink(missing_ok=True)  # of the same run, when it was shorter
    # Those of before too: what is there stays the run's own if this is interrupted.
    written = [*written_by(run), *(f"sha256:{hashlib.sha256(data).hexdigest()}" for data in files.values())]
    record = results.plain() | {"written": list(dict.fromkeys(written))}
    write_atomic(run / COMPARISON, (json.dumps(record, indent=1) + "\n").encode())
    for path, data in files.items():
        write_atomic(path, data)
    return Merged(output, page, plain if results.enough else None, results)


def encode(
    config: Config, given: Given, options: Options, routes: Sequence[Route], work: Path, manifest: tuple[str, bytes]
) -> None:
    """Encodes the prompts that are not in the cache yet.

    Args:
        config: Names device and precision.
        given, options, routes: What the user gave, and what is asked of whom.
        work: The folder with the cache.
        manifest: As manifest_of returns it.
    """
    name, rows = manifest
    write_atomic(work / name, rows)
    prepare(
        work / name,
        given.base,
        work / "cache",
        resolution=options.resolution,
        device=str(find_device(config.training.device)),
        dtype=PRECISIONS[config.training.precision],
        on_bad_row="refuse",
        max_sequence_length=options.max_sequence_length,
        texts=[HEARD] if heard_otherwise(routes) else [],
    )


def _adapter(run: Path, layout: str, given: Given) -> bytes:
    """Returns the adapter's file in a layout, with the words that call it in its metadata."""
    with TemporaryDirectory() as temporary:
        file = Path(temporary) / FILES[1]
        if layout == "diffusers":
            shutil.copy(run / "student" / FILES[1], file)
        else:
            file = export(run, Path(temporary) / "lora", layout=layout) / FILES[1]
        add_metadata(file, _metadata(given.triggers, given.base))
        return file.read_bytes()


def _plain_merge(lora: Lora, layout: str, given: Given) -> bytes:
    """Returns the file of a plain merge in a layout; words that were made of a LoRA's name call nothing in it."""
    known = {name: trigger for name, trigger in given.triggers.items() if trigger.known}
    with TemporaryDirectory() as temporary:
        folder, family = Path(temporary), given.backbone.__name__.rpartition(".")[2]
        pipeline_class = pipeline_class_of(given.base)
        write_adapter(lora, folder, layout, family, given.empty, pipeline_class, _metadata(known, given.base))
        return (folder / FILES[1]).read_bytes()


def _metadata(triggers: dict[str, Trigger], base: Path) -> dict[str, str]:
    """Returns the base and the phrases that call the LoRAs, as others read them; and their words, as merges do."""
    words = {name: trigger.words for name, trigger in triggers.items() if trigger.words}
    return named(base, phrases_of(triggers).values()) | ({"triggers": json.dumps(words)} if words else {})
