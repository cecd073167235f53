"""Loads more than most users have: a million rows, a log of 100,000 steps, 10,000 pictures to compare, 64 sources."""

import json
import multiprocessing
import resource
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MIB = 2**20


@dataclass(frozen=True)
class Bound:
    """What a load may take: seconds of a processor, MiB over what its imports take, MiB of the page that it writes."""

    seconds: float
    memory: float
    page: float = float("inf")


def _measured(function: Callable[[Path], object], folder: Path) -> tuple[float, float]:
    """Returns the seconds of a processor that a call takes in a forked process, and the MiB over what was there."""

    def child() -> None:
        before = _peak()
        began = time.process_time()
        function(folder)
        queue.put((time.process_time() - began, (_peak() - before) / MIB))

    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=child)
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{function.__name__} ends with {process.exitcode}")
    return queue.get()


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ------------------------------------------------------------------------------------------------------ rows


def write_manifest(folder: Path, rows: int) -> None:
    """Writes a manifest of drawings, each with a prompt of its own."""
    with open(folder / "many.jsonl", "w") as file:
        for i in range(rows):
            row = {"id": f"row-{i}", "task": "t2i", "prompt": f"a photo of {i % 7} cups and {i} spoons on a table"}
            file.write(json.dumps(row) + "\n")


def check_manifest(folder: Path) -> None:
    """Checks it."""
    from danceopd.cli.parser import main

    assert main(["data", "check", str(folder / "many.jsonl")]) == 0


def write_prepared(folder: Path, rows: int) -> None:
    """Writes prepared rows of two capabilities, with entries of their own, as `danceopd data prepare` names them."""
    import torch

    from danceopd.data.cache import Cache, key_of

    (folder / "prepared").mkdir()
    cache, keys = Cache(folder / "prepared"), [key_of(f"prompt {i}") for i in range(rows)]
    for i in range(0, len(keys), 10_000):
        cache.write({key: {"prompt_embeds": torch.zeros(1, 1)} for key in keys[i : i + 10_000]})
    with open(folder / "prepared" / "rows.jsonl", "w") as file:
        file.write(json.dumps({"model": "m", "negative_prompts": {"": keys[0]}}) + "\n")
        for i in range(rows):
            row = {"id": f"row-{i}", "capability": ("one", "two")[i % 2], "prompt": keys[i], "sources": []}
            file.write(json.dumps({**row, "source_sizes": [], "target": None, "size": [1024, 1024]}) + "\n")


def start_prepared(folder: Path) -> None:
    """Does with the rows what the start of a run does, and draws its first batch of them."""
    import torch

    from danceopd.data.prepared import PreparedData, PreparedFile, mix
    from danceopd.data.sampler import Samples

    file = PreparedFile(folder / "prepared" / "rows.jsonl")
    data = {name: PreparedData(file, name) for name in ("one", "two")}
    (kind,) = mix(data).rows
    for rows in data.values():
        part = rows.part(rows.own(kind))
        part.condition(Samples([], lambda *given: None).rows_at(torch.arange(8), len(part), 0), [False] * 8)


# ------------------------------------------------------------------------------------------------------ pages


def write_log(folder: Path, steps: int) -> None:
    """Writes the log of a run, as report_results makes it up."""
    from report_results import make_records

    (folder / "run").mkdir()
    with open(folder / "run" / "log.jsonl", "w") as file:
        for record in make_records(steps):
            file.write(json.dumps(record) + "\n")


def report(folder: Path) -> None:
    """Makes the page of it."""
    from report_results import make_results

    from danceopd.report.page import write_report

    write_report(folder / "run", make_results(), {})


def write_pictures(folder: Path, pictures: int) -> None:
    """Writes the pictures of two runs in GenEval's layout, as many of a prompt as pictures are prompts' 4th part."""
    from manifests import picture

    samples = 4
    seen = picture(folder / "seen.png", (512, 512), (40, 90, 160)).read_bytes()
    for run in ("first", "second"):
        lines = []
        for i in range(pictures // samples):
            meta = {"tag": ("colors", "counting")[i % 2], "prompt": f"prompt {i}", "include": []}
            for number in range(samples):
                place = folder / run / f"{i:05d}" / "samples" / f"{number:04d}.png"
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(seen)
                right = (i * 7 + number * 3) % (5 if run == "first" else 4) > 1
                line = {"filename": str(place), "tag": meta["tag"], "prompt": meta["prompt"], "correct": right}
                lines.append({**line, "metadata": json.dumps(meta), "reason": "because"})
        (folder / run / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def compare(folder: Path) -> None:
    """Compares them."""
    from danceopd.cli.parser import main

    runs = [str(folder / run) for run in ("first", "second")]
    assert main(["compare", *runs, "-o", str(folder / "compare.html")]) == 0


# ------------------------------------------------------------------------------------------------------ sources


def sources(folder: Path, many: int) -> list[list[str]]:
    """Asks 2 and then many LoRAs of one base about 64 samples; they share all of their layers, a quarter, or none.

    Args:
        folder: Is written into.
        many: Number of LoRAs.

    Returns:
        Rows of a table: the time of a forward, that of a whole run's update, and the bytes of the adapters, against 2
        sources that share all.
    """
    import torch
    from small_loras import batch, prompts, random_lora, small_sd3

    from danceopd.models.backbones import sd3
    from danceopd.models.shared_base import SharedBase

    (latents, sigma), conditioning = batch(64), prompts(64)
    plain = small_sd3(width=128, layers=8)
    whole = random_lora(plain, sd3.LORA_TARGETS, 8, 0)
    names, found = list(whole), []
    for count, part, said in ((2, 1, "all"), (many, 1, "all"), (many, 4, "a quarter"), (many, len(names), "none")):
        loras = []
        for m in range(count):
            own = {name: whole[name] for i, name in enumerate(names) if i % part == m % part}
            loras.append({name: (a + 0.01 * m, b, scale) for name, (a, b, scale) in own.items()})
        shared, times = SharedBase(small_sd3(width=128, layers=8), loras, sd3.velocity), []
        with torch.no_grad():
            for _ in range(4):
                began = time.monotonic()
                shared(latents, sigma, conditioning, torch.arange(64) % count)
                times.append(time.monotonic() - began)
        found.append(
            (
                count,
                said,
                min(times[1:]),
                _seconds_of_an_update(folder, count, part),
                sum(4 * x.numel() for lora in loras for a, b, _ in lora.values() for x in (a, b)),
            )
        )
    head = ["LoRA sources of a base", "layers that they share", "time of a forward", "of an update", "adapters' memory"]
    return [head] + [
        [str(count), said, *(f"{one / first:.2f}" for one, first in zip(own, found[0][2:], strict=True))]
        for count, said, *own in found
    ]


def _seconds_of_an_update(folder: Path, count: int, part: int) -> float:
    """Trains on so many LoRAs, each of every `part`th layer, and returns the least time of an update of 64 samples."""
    from model_runs import config_of, write_lora, write_place

    from danceopd.models.backbones import sd3
    from danceopd.models.shared_base import target_layers
    from danceopd.support.run_log import read_log
    from danceopd.training.assembly.build import build_model
    from danceopd.training.loop import train

    root = write_place(folder / f"{count}-{part}", "sd3")
    transformer = sd3.load_transformer(root / "model")
    names = target_layers(transformer, sd3.LORA_TARGETS, every=False)
    part = min(part, len(names))
    files = {f"s{m}": root / f"s{m}.safetensors" for m in range(count)}
    for m, path in enumerate(files.values()):
        write_lora(path, transformer, names[m % part :: part], 8)
    rows = str(root / "cache" / "rows.jsonl")
    config = config_of(
        root,
        sources={name: {"lora": [{"path": str(path)}]} for name, path in files.items()},
        capabilities={
            name: {"source": name, "task": "t2i", "capability": "one", "data": {"prepared": rows}} for name in files
        },
        **{"training.batch_size": 64, "training.max_steps": 6, "training.log_every": 1},
    )
    log = read_log(train(config, build_model) / "log.jsonl").training
    return 64 / max(record["samples_per_second"] for record in log)


def loads(folder: Path, share: float) -> tuple[list[list[str]], list[str]]:
    """Runs every load.

    Args:
        folder: Is written into.
        share: Of the sizes, and of the bounds: 1 is all.

    Returns:
        Rows of a table, and what was over its bound.
    """
    folder.mkdir(parents=True, exist_ok=True)
    import danceopd.cli.parser  # imports are not measured
    import danceopd.data.prepared
    import danceopd.evaluation.compare
    import danceopd.report.page  # noqa: F401

    million, steps, pictures = round(1e6 * share), round(1e5 * share), round(1e4 * share)
    jobs = [
        (f"{million:,} rows of a manifest: check", write_manifest, million, check_manifest, Bound(60, 2048), ""),
        (f"{million:,} prepared rows: start", write_prepared, million, start_prepared, Bound(60, 2048), ""),
        (f"a log of {steps:,} steps: report", write_log, steps, report, Bound(30, 2048, 5), "run/report.html"),
        (
            f"2 runs of {pictures:,} pictures: compare",
            write_pictures,
            pictures,
            compare,
            Bound(60, 2048, 20),
            "compare.html",
        ),
    ]
    rows, wrong = [["load", "seconds of a processor", "memory, MiB", "page, MiB"]], []
    for name, write, count, function, bound, page in jobs:
        write(folder, count)
        seconds, memory = _measured(function, folder)
        size = (folder / page).stat().st_size / MIB if page else 0.0
        rows.append([name, f"{seconds:.1f}", f"{memory:.0f}", f"{size:.1f}" if page else ""])
        if seconds > bound.seconds or memory > bound.memory or size > bound.page:
            wrong.append(
                f"{name}: {seconds:.1f} s of a processor, {memory:.0f} MiB, page {size:.1f} MiB; it may take {bound}"
            )
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return rows, wrong
