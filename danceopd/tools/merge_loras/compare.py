"""Compares a merge with its base, its LoRAs, their average and the best of PEFT's merges, and says what came of it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import mean

import torch

from danceopd.config.sections import Config
from danceopd.core.distance import velocity_error
from danceopd.core.operators import teacher_at
from danceopd.core.rollout import sample
from danceopd.models.lora_algebra import Lora, average
from danceopd.models.lora_merges import COMBINATIONS, WEIGHTS, combined
from danceopd.models.students import LoraStudent
from danceopd.support.bars import bar
from danceopd.support.pictures import to_uint8
from danceopd.tools.merge_loras.configuration import HEARD, heard_otherwise
from danceopd.tools.merge_loras.counts import SHOWN, samples_of
from danceopd.tools.merge_loras.gaps import Gaps, empty, mean_share, weights_of
from danceopd.tools.merge_loras.given import PLAIN_MERGE, Given
from danceopd.tools.merge_loras.prompts import Route
from danceopd.tools.model_report import HELD_OUT, held_out
from danceopd.tools.model_report import SAMPLES as HELD
from danceopd.training.assembly.build import build_model
from danceopd.training.assembly.parts import Parts
from danceopd.training.assembly.starts import begin

BASE, AVERAGE, MERGED = "base", "plain average", "this merge"

TIE = 0.01  # of the mean share, within which two are as good

FAR = 0.1  # of the mean share, by which a training that went well is not below a plain merge


@dataclass(frozen=True)
class Drawn:
    """The same prompt and noise, drawn by several.

    Attributes:
        route: Whose prompt it is.
        prompt: The prompt.
        pictures: uint8 [3, H, W] by who drew it.
    """

    route: str
    prompt: str
    pictures: dict[str, torch.Tensor]


@dataclass
class Results:
    """What came of a comparison.

    Attributes:
        routes: Their names.
        errors: {who: {route: mean squared velocity error to the route's source, along who's own trajectories}}.
        shares: {who: {route: share of the gap between the base and the source that is closed}}; of prompts that keep
            the base the gap is what the LoRAs change there.
        best: The best of PEFT's merges, as a row of `shares`.
        weights: The routes' shares of the samples, to scale; means are by them.
        samples: Of each route.
        merge: What the best of PEFT's merges adds.
        better: Whether the merge is at least as good as the base and the plain average, in the mean of the
            shares, and not far below the best of PEFT's merges.
        enough: Whether the best of PEFT's merges is as good as the merge, and at least as good as the base.
        verdict: A sentence or two.
        advice: What to do, where it is not.
    """

    routes: list[str]
    errors: dict[str, dict[str, float]]
    shares: dict[str, dict[str, float]]
    best: str
    weights: dict[str, float]
    samples: dict[str, int]
    merge: Lora = field(default_factory=dict)
    better: bool = True
    enough: bool = False
    verdict: str = ""
    advice: str = ""
    drawn: list[Drawn] = field(default_factory=list)

    @property
    def headline(self) -> str:
        """What the verdict says the merge is, without its figures: "better than any plain merge that was tried"."""
        said = self.verdict.partition(":")[0]
        return said if said[1:2].isupper() else said[:1].lower() + said[1:]

    def plain(self) -> dict:
        """Returns all but the pictures and the plain merge, as JSON takes it."""
        return asdict(replace(self, drawn=[], merge={}))

    def table(self) -> list[list[str]]:
        """Returns the shares as text: a head, and a row for each of those that are compared, its mean first."""
        lines = [["", "mean", *self.routes]]  # of a narrow screen the right edge is out of sight
        for who, shares in self.shares.items():
            lines.append(
                [who, percent(mean_share(shares, self.weights)), *(percent(shares[route]) for route in self.routes)]
            )
        return lines


def percent(share: float) -> str:
    """Writes a share in whole percent."""
    return f"{100 * share:.0f} %"


def compare(config: Config, given: Given, routes: Sequence[Route], merged: Lora) -> Results:
    """Measures and draws with the base, each LoRA, their average, PEFT's best merge and the result.

    PEFT's merges are looked for at states of the sources' own trajectories, where they cost a forward each; the rest is
    measured along the trajectories of the one compared.

    Args:
        config: The run's.
        given: What was merged.
        routes: What is asked of whom.
        merged: The result.

    Returns:
        The comparison.
    """
    loras = list(given.loras.values())
    layers = dict.fromkeys(name for lora in (*loras, merged) for name in lora)
    room = max(len(merged[n][0]) if n in merged else 0 for n in layers)
    room = max(room, *(sum(len(lora[n][0]) for lora in loras if n in lora) for n in layers))
    adapter = config.student.lora.model_copy(update={"rank": room, "alpha": None})
    student = config.student.model_copy(update={"lora": adapter, "init_from": "base"})
    config = config.model_copy(update={"student": student})
    parts = build_model(config)
    slot, names = parts.student.eval(), [route.name for route in routes]
    samples = samples_of(config)
    gaps = Gaps(config, parts, 1)
    best, found = best_merge(gaps, slot, loras)
    candidates = {BASE: {}, **given.loras, AVERAGE: average(loras), best: found, MERGED: merged}
    batches = [held_out(config, parts, m)[: samples[name]] for m, name in enumerate(names)]
    errors: dict[str, dict[str, float]] = {}
    drawn: dict[tuple[int, int], dict[str, torch.Tensor]] = {}
    shown = [(m, i) for m, name in enumerate(names) for i in range(min(samples[name], SHOWN))]
    for who, lora in bar(list(candidates.items()), "comparing", unit="merge"):
        place(slot, lora)
        own = gaps.field(slot)
        if who in given.loras and heard_otherwise(routes):  # as when it is a source
            own = teacher_at(own, HEARD)
        errors[who] = {
            name: velocity_error(own, source, batch.noise, batch.conditioning, batch.sigmas)
            for name, source, batch in zip(names, gaps.sources, batches, strict=True)
        }
        for m, i in shown if who in (BASE, best, MERGED) else ():
            drawn.setdefault((m, i), {})[who] = _sampled(own, batches[m][i : i + 1], config)
    for m, i in shown:
        drawn[m, i]["source"] = _sampled(gaps.sources[m], batches[m][i : i + 1], config)
    prompts = [_prompts_of(config, parts, m, route) for m, route in enumerate(routes)]
    load_decoder = parts.load_decoder
    del parts, slot, gaps, own, batches  # the decoder gets their room
    decode = load_decoder()
    pictures = [
        Drawn(names[m], prompts[m][i], {who: to_uint8(decode(latents)[0]) for who, latents in own.items()})
        for (m, i), own in drawn.items()
    ]
    results = Results(
        names, errors, shares_of(errors, routes), best, weights_of(config), samples, found, drawn=pictures
    )
    judge(results)
    return results


def best_merge(gaps: Gaps, slot: LoraStudent, loras: Sequence[Lora]) -> tuple[str, Lora]:
    """Finds the best of PEFT's merges and weights, by the mean share of the gaps that it closes.

    Args:
        gaps: Measures.
        slot: An adapter whose rank holds any of them.
        loras: What is merged.

    Returns:
        Its name, and the merge.
    """
    found: dict[str, float] = {}
    kinds = {f"PEFT's {kind} at {weight:g}": (kind, weight) for kind in COMBINATIONS for weight in WEIGHTS}
    for name, (kind, weight) in bar(list(kinds.items()), "looking for PEFT's best merge", unit="merge"):
        place(slot, combined(loras, kind, [weight] * len(loras)))
        found[name] = mean_share(gaps(slot), gaps.weights)
    best = max(found, key=found.get)
    kind, weight = kinds[best]
    return best, combined(loras, kind, [weight] * len(loras))


def place(slot: LoraStudent, lora: Lora) -> None:
    """Makes an adapter add what a LoRA adds, and nothing else."""
    empty(slot)
    begin(slot, lora)


def _sampled(own, one, config: Config) -> torch.Tensor:
    return sample(own, one.noise, one.conditioning, one.sigmas, config.rollout.solver).cpu()


def _prompts_of(config: Config, parts: Parts, m: int, route: Route) -> list[str]:
    """Lists the prompts of the samples that model_report.held_out draws of route number m."""
    data, seed = parts.samples.groups[0].data[m], config.evaluation.seed
    at = parts.samples.rows_at(torch.arange(HELD), len(data), seed, HELD_OUT, m)
    return [route.rows[int(data.rows[i]["id"].rpartition(" ")[2])][0] for i in at]


def shares_of(errors: dict[str, dict[str, float]], routes: Sequence[Route]) -> dict[str, dict[str, float]]:
    """Works out the share of each route's gap that each of those compared has closed.

    Args:
        errors: {who: {route: error}}.
        routes: The routes; of those of the base alone the gap is the mean error of the LoRAs there.

    Returns:
        {who: {route: 1 - error / gap}}.
    """
    alone = [who for who in errors if who in {name for route in routes for name in route.loras}]
    gaps = {
        route.name: errors[BASE][route.name] if route.loras else mean(errors[who][route.name] for who in alone)
        for route in routes
    }
    return {
        who: {name: 1 - error / max(gaps[name], 1e-30) for name, error in own.items()} for who, own in errors.items()
    }


def judge(results: Results) -> None:
    """Says whether the merge is better than base, plain average and PEFT's best, and what to do where it is not."""
    means = {who: mean_share(shares, results.weights) for who, shares in results.shares.items()}
    ours, best = means[MERGED], means[results.best]
    own, others = results.shares[MERGED], results.shares[AVERAGE]
    nearer = [route for route in results.routes if own[route] < others[route] - TIE]
    worse = [f"the {who}" for who in (AVERAGE, BASE) if not ours >= means[who]]  # also where it is not a number
    results.better = not worse and ours >= best - FAR
    results.enough = best >= means[BASE] and not ours > best + TIE
    beside = f"It lies beside the result, as the file that ends in {PLAIN_MERGE}."
    closed = (
        f"this merge closes {percent(ours)} of the gaps ({results.best}: {percent(best)}, the plain average: "
        f"{percent(means[AVERAGE])}, the base: {percent(means[BASE])})."
    )
    if results.better and results.enough:
        enough = f"No better than {results.best}, which needs no training: a plain merge is enough. {beside}"
        results.verdict = f"{enough} T{closed[1:]}"
    elif results.better:
        results.verdict = f"Better than any plain merge that was tried: {closed}"
    else:
        below = f"FAR BELOW {results.best}, which needs no training"
        results.verdict = f"{'WORSE than ' + ' and '.join(worse) if worse else below}: {closed}"
        results.advice = (
            "Do not use it as it is. Train longer (--steps, --patience 0), with a lower rate "
            "(training.learning_rate=1e-4) or larger batches (training.batch_size=8); give it more room (--rank auto, "
            "or a number); or ask prompts nearer to what the LoRAs are for (--prompts)."
        )
        if results.enough:
            results.advice += f" Or take {results.best}. {beside}"
    if results.better and nearer:
        results.verdict += f" On {', '.join(nearer)} the plain average is nearer; train longer if that matters."
