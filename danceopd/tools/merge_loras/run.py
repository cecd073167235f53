"""Says what a merge takes, fits it to the memory that is there, and trains it."""

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path

import torch
from tqdm import tqdm

from danceopd.config.sections import Config
from danceopd.core.fields import Field
from danceopd.planning.cluster import LEFT
from danceopd.planning.dry_run import as_it_began, dry_run, with_memory_chosen
from danceopd.planning.memory import Findings
from danceopd.planning.models import examine
from danceopd.report.names import duration
from danceopd.support.devices import find_device
from danceopd.support.memory import format_bytes, free_bytes
from danceopd.support.ranks import ALONE, Ranks
from danceopd.support.texts import many
from danceopd.tools.merge_loras.counts import PROBES, Counts, counted, score_every
from danceopd.tools.merge_loras.gaps import GROWTH, Gaps, ended_early, settled, weights_of, words
from danceopd.tools.merge_loras.given import Given, Options
from danceopd.tools.merge_loras.prompts import Route, say
from danceopd.training.assembly.build import build_model
from danceopd.training.assembly.parts import Parts, Scored
from danceopd.training.checkpoints import load_newest
from danceopd.training.loop import train

NAMES_OF_MANY = "them", "their names", "the LoRAs themselves are"  # in a line about LoRAs without words


def described(given: Given, options: Options, routes: Sequence[Route], config: Config) -> list[str]:
    """Says what will be merged, and what is asked of whom.

    Args:
        given, options, routes: What the user gave, and what is asked of whom.
        config: The training's.

    Returns:
        The lines.
    """
    lines = [f"base: {given.base}"]
    for name, trigger in given.triggers.items():
        ranks = {len(a) for a, _, _ in given.loras[name].values()}
        rank = f"rank {min(ranks)}" + (f" to {max(ranks)}" if len(ranks) > 1 else "")
        called = f"called by {trigger.words!r} ({trigger.origin})" if trigger.words else "acts on every prompt"
        weight = ", ".join([f"weight {given.weights[name]:g}", *(f"of layers {text}" for text in given.layers[name])])
        lines.append(f"{name}: {rank}, {weight}, {called}")
    new = [name for name, trigger in given.triggers.items() if not trigger.known]
    if new:
        it, its, lora = ("it", "its name", "the LoRA itself is") if len(new) == 1 else NAMES_OF_MANY
        lines.append(
            f"{' and '.join(new)}: no file says which words call {it}, so {its} will call {it} in the merged LoRA, "
            f"while {lora} asked without; --trigger NAME=WORDS where there are words, NAME= to act always"
        )
    lines += [f"note: {note}" for note in given.notes]
    weights, pairs = weights_of(config), [route for route in routes if " + " in route.name]
    total = sum(weights.values())
    for route in routes:
        if route not in pairs:
            share, of = weights[route.name] / total, " and ".join(route.loras) or "the base"
            lines.append(f"  {100 * share:.0f} % of the samples: {many(len(route.rows), 'prompt')} to {of}")
    if pairs:
        share, prompts = sum(weights[route.name] for route in pairs) / total, sum(len(route.rows) for route in pairs)
        them = f"{len(pairs)} pairs" if len(pairs) > 1 else "the pair"
        lines.append(f"  {100 * share:.0f} % of the samples: {many(prompts, 'prompt')} to {them}, both together")
    sigmas = given.backbone.sigmas(
        given.base, config.rollout.num_inference_steps, options.resolution, options.resolution
    )
    counts = counted(config, sigmas, options.patience, options.overwrite)
    each, more = config.training.batch_size, "more " if counts.updates < config.training.max_steps else ""
    line = f"result: rank {given.rank}; at most {many(counts.updates, f'{more}update')} of {many(each, 'sample')}"
    if (all_of_it := counts.total()) is not None:  # of the usual method
        line += (
            f", {counts.each:.1f} network evaluations each; {all_of_it:,.0f} in all, of which {counts.comparison:,.0f} "
            "compare the result at the end"
        )
    lines.append(line)
    return lines


def fitted(config: Config, chosen: Sequence[str], overwrite: bool = False) -> tuple[Config, Findings, list[str]]:
    """Fits a run to the memory that is free, by the dry run's estimate.

    Where it is too much for a card, blocks are computed again in the backward, then the batch is matched a sample at a
    time, then the frozen base is stored in fewer bits; what the user has chosen stays.

    Args:
        config: The run's, whose prompts are prepared.
        chosen: The user's overrides.
        overwrite: Whether another run in its folder is started again; if not, its base stays as it was stored.

    Returns:
        The configuration, what its dry run found, and lines about it.
    """
    device = find_device(config.training.device)
    began = None if overwrite or _is_chosen("base_precision", chosen) else as_it_began(config)
    config = began or config
    tries = [{}, {"gradient_checkpointing": True}]
    tries.append({**tries[1], "gradient_accumulation_steps": config.training.batch_size})
    if not began and not config.training.rollout_precision:  # which says how the base is stored
        tries.append({**tries[2], "base_precision": "auto"})
    if device.type != "cuda":
        tries = tries[:1]
    room = free_bytes(device) - (LEFT if device.type == "cuda" else 0)
    wanted, changes, findings = config, {}, Findings()
    for changes in tries:
        changes = {key: value for key, value in changes.items() if not _is_chosen(key, chosen)}
        wanted = config.model_copy(update={"training": config.training.model_copy(update=changes)})
        findings = dry_run(wanted, examine)
        if findings.total_memory() <= room:
            break
    how = "".join(f", with training.{key}={str(value).lower()}" for key, value in changes.items())
    size = format_bytes(findings.total_memory())
    without = "" if findings.activations else " without activations"
    lines = [f"memory, an estimate{without}: {size} of {format_bytes(room)} that is free on {device.type}{how}"]
    if findings.total_memory() > room:
        lines.append(
            "warning: that is more than is free; training.swap_blocks=auto lets blocks of the base wait in host "
            "memory, and a smaller --resolution or --rank takes less"
        )
    return wanted, findings, lines


def _is_chosen(key: str, overrides: Sequence[str]) -> bool:
    return any(text.partition("=")[0].strip() == f"training.{key}" for text in overrides)


def distilled(config: Config, patience: int, overwrite: bool) -> Path:
    """Trains the merge; ends where no gap closes further.

    Args:
        config: The run's.
        patience: Scorings without growth, as in `gaps.settled`.
        overwrite: Whether to start again where another run lies.

    Returns:
        The run's folder.

    Raises:
        UserError: As danceopd.training.loop.train.
    """

    def build(config: Config, ranks: Ranks = ALONE, settings: dict | None = None) -> Parts:
        parts = build_model(config, ranks, settings)
        gaps = Gaps(config, parts, PROBES)
        counts = counted(config, parts.samples.groups[0].sigmas, patience, overwrite)
        say(_time(parts, gaps, counts))
        done, every = config.training.max_steps - counts.updates, score_every(config)
        steps = count(done and done + every - done % every, every)  # the first is before any update

        def score(field: Field) -> dict[str, float]:
            shares = gaps(field)
            at = "" if config.evaluation.times else f" at step {next(steps)}"  # where all scorings are the merge's own
            tqdm.write(f"gap closed{at}: {words(shares)}", file=sys.stderr)
            return shares

        def enough(scores: Sequence[Scored]) -> bool:
            return settled(scores, patience, config)

        return replace(parts, score=score, score_every=every, enough=enough)

    run = train(with_memory_chosen(config, examine, overwrite), build, overwrite)
    newest = load_newest(run / "checkpoints")[0]
    if newest and ended_early(newest, patience, config):
        say(
            f"training has ended after {newest.step} of {config.training.max_steps} updates: the mean share of the "
            f"gaps has not grown by {100 * GROWTH:g} % in the last {patience} scorings. The same command with more "
            "--steps goes on, and with --patience 0 to the last of them"
        )
    return run


@torch.no_grad()
def _time(parts: Parts, gaps: Gaps, counts: Counts) -> str:
    """Predicts how long all that is left takes, by a forward that is timed now."""
    probe, rows = next(iter(gaps.probes.values())), gaps.rows.rows
    asked = probe.states[:rows], probe.sigma[:rows], probe.conditioning[:rows]
    field, seconds = gaps.field(parts.student), 0.0
    for _ in range(2):  # the first is the slower
        began = time.monotonic()
        float(field(*asked).float().sum())  # waits for the device
        seconds = time.monotonic() - began
    left, samples = counts.total(), many(len(asked[0]), "sample")
    if left is None:
        return f"time: {seconds:.2g} s for a forward of {samples}; this method's are not worked out"
    predicted = duration((left - counts.gaps) * seconds / len(asked[0]))
    return (
        f"time, a prediction: {predicted} for {many(counts.updates, 'update')}, {many(counts.scorings, 'scoring')} and "
        f"the comparison, by a forward of {samples} that took {seconds:.2g} s now; less where no gap closes further, "
        "and more by the making of PEFT's merges"
    )
