"""Reports on a run on a diffusers model: its log, its sample grid, and how far the student is from each source."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from danceopd.config.reading import read_run_config
from danceopd.config.sections import Config
from danceopd.core.batch import Batch
from danceopd.core.distance import velocity_errors
from danceopd.core.fields import within
from danceopd.data.sampler import draw_batch
from danceopd.report.page import write_report
from danceopd.support.devices import machine
from danceopd.support.errors import UserError
from danceopd.support.files import write_atomic
from danceopd.support.pages import data_uri
from danceopd.support.run_log import read_log
from danceopd.training.asking import as_student, guidance_scales
from danceopd.training.assembly.build import build_model
from danceopd.training.assembly.parts import Parts
from danceopd.training.checkpoints import load_newest
from danceopd.training.rows import Rows, in_parts

HELD_OUT = 3  # stream of randomness that no step of a training draws from

SAMPLES = 8  # of each capability

WIDTH = 2048  # most pixels across of the sample grid in the page


def evaluate_model_run(folder: Path, progress: Callable = lambda items: items) -> dict:
    """Measures a model's run, and writes its results.json and report.html.

    Where the networks or the data are no longer there, the page is made without the velocity errors, and says so.

    Args:
        folder: The run's.
        progress: Wraps the list of what is measured (tqdm fits).

    Returns:
        The results.

    Raises:
        UserError: The folder holds no run.
    """
    config = read_run_config(folder)
    log, errors, warnings, step = read_log(folder / "log.jsonl"), {}, [], None
    try:
        step, errors = measure_errors(folder, config, progress)
    except UserError as error:
        warnings.append(f"velocity errors were not measured: {error}")
    last = log.training[-1] if log.training else {}
    results = {
        "rows": [],
        "velocity_errors": errors,
        "step": last.get("step") if step is None else step,
        "student": config.method,
        "seconds": last.get("seconds"),
        "network_evaluations": last.get("network_evaluations"),
        "machine": machine(),
        "config": config.to_dict(),
        "seed": config.training.seed,
        "warnings": warnings,
    }
    write_atomic(folder / "results.json", (json.dumps(results, indent=1) + "\n").encode())
    write_report(folder, results, {"samples": newest_grid(folder / "samples")})
    return results


def measure_errors(folder: Path, config: Config, progress: Callable = lambda items: items) -> tuple[int, dict]:
    """Measures the student's velocity errors before training and those of its newest average.

    An error is the mean squared difference from the capability's own source, on noise that no update drew, at every
    noise level of the rollouts of the one compared.

    Args:
        folder: The run's, where it lies now.
        config: Its configuration.
        progress: Wraps the list of what is measured.

    Returns:
        The update of the average, and {capability: its figures}: source, samples, before, after, standard_error (of
        after, over samples), closed (1 - after / before; None where the student began as its source), relative (after,
        to the mean square of the source's velocity), by_sigma.

    Raises:
        UserError: Something is no longer there.
    """
    # Where the run lies now, which need not be where it was trained.
    here = config.training.model_copy(update={"output_dir": folder, "sample_every": 0})
    config = config.model_copy(update={"training": here})
    checkpoint, _ = load_newest(folder / "checkpoints")
    if checkpoint is None:
        raise UserError(f"{folder / 'checkpoints'} holds no checkpoint; train first: danceopd train --config ...")
    parts = build_model(config)
    parts.student.eval()
    names = list(config.capabilities)
    batches = {name: held_out(config, parts, m) for m, name in enumerate(names)}
    # As many rows at a time as an update's backward takes, so that where training fits this does too.
    rows = Rows(max(1, config.training.batch_size // config.training.gradient_accumulation_steps))
    field, found = as_student(config, parts, in_parts(parts.student, rows)), {}
    sources = [within(source, lambda network: in_parts(network, rows)) for source in parts.fields]
    for who, m in progress([(who, m) for who in ("before", "after") for m in range(len(names))]):
        if who == "after" and m == 0:
            with torch.no_grad():
                for name, p in parts.student.named_parameters():
                    p.copy_(checkpoint.tensor(f"ema/{name}"))
        batch = batches[names[m]]
        found[who, names[m]] = velocity_errors(field, sources[m], batch.noise, batch.conditioning, batch.sigmas)
    return checkpoint.step, {
        name: error_figures(
            config.capabilities[name].source, batches[name].sigmas, found["before", name], found["after", name]
        )
        for name in names
    }


def held_out(config: Config, parts: Parts, m: int) -> Batch:
    """Draws the samples that capability number m is measured on: its rows, with noise that no update drew."""
    only, seed = [float(i == m) for i in range(len(config.capabilities))], config.evaluation.seed
    batch = draw_batch(parts.samples, only, SAMPLES, seed, 0, guidance_scales(config), stream=HELD_OUT)
    return batch.to(parts.device)


def error_figures(source: str, sigmas: torch.Tensor, before: list[torch.Tensor], after: list[torch.Tensor]) -> dict:
    """Works out one capability's figures of measure_errors from (errors [B, N], powers [B, N]) before and after."""
    (first, _), (last, power) = before, after
    start, end = float(first.mean()), float(last.mean())
    return {
        "source": source,
        "samples": len(last),
        "before": start,
        "after": end,
        "standard_error": float(last.mean(1).std() / len(last) ** 0.5),
        "closed": 1 - end / start if start > 1e-9 * float(power.mean()) else None,
        "relative": end / max(float(power.mean()), 1e-30),
        "by_sigma": {
            "sigma": [round(s, 4) for s in sigmas[:-1].tolist()],
            "before": first.mean(0).tolist(),
            "after": last.mean(0).tolist(),
        },
    }


def newest_grid(folder: Path) -> dict | None:
    """Reads the newest sample grid as a JPEG no wider than WIDTH.

    Returns:
        {"step", "uri", "width"}; None where none can be read.
    """
    for path in sorted(folder.glob("step-*.png"), reverse=True):
        try:
            with Image.open(path) as opened:
                image = opened.convert("RGB")
        except OSError:
            continue
        image.thumbnail((WIDTH, 4 * WIDTH))
        uri = data_uri(image, "jpeg", quality=90)
        return {"step": int(path.stem.removeprefix("step-")), "uri": uri, "width": image.width}
    return None
