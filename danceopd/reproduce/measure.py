"""Measures networks as each table does, and the rows that need no training: sources and merges."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from danceopd.config.sections import Config
from danceopd.reproduce.matrix import INFERENCE_SCALES, TRAINING_SCALES
from danceopd.world.dit import DiT
from danceopd.world.edits import GLOBAL_KINDS, LOCAL_KINDS
from danceopd.world.files import load_model, resolve_weights
from danceopd.world.scoring import Sampler, as_field, make_sampler, score_gedit, score_geneval
from danceopd.world.weight_merge import COMBINATIONS, lora_merge, weight_merge

VALIDATION_SEED = 777  # of the prompts that learning rates and merges are tuned on; results are on the evaluation's

WEIGHTS = (0.3, 0.5, 0.7, 1.0)  # of each adapter in a merge

BALANCE = ((1.0, 1.0), (2.0, 1.0), (1.0, 2.0))  # of the first source against the others in a merge of full weights


def measure(setting: str, network: DiT, config: Config, seed: int | None = None) -> dict[str, float]:
    """Measures one network by a table's metrics.

    "<metric>_error" is the standard error over pictures, where there is one.
    """
    sampler, evaluation = make_sampler(config, network.config), config.evaluation
    seed = evaluation.seed if seed is None else seed
    metrics = {
        "C": [_t2i, _sketches],
        "D": [partial(_guided, scale) for scale in INFERENCE_SCALES],
        "E": [
            _t2i,
            partial(_edit, LOCAL_KINDS, name="local_average"),
            partial(_edit, GLOBAL_KINDS, name="global_average"),
            _style,
            partial(_guided, 2, name="guided_overall"),
        ],
        "F": [_t2i, partial(_edit, None), _style],
    }.get(setting, [_t2i, partial(_edit, None)])
    return _apply(metrics, network, sampler, seed, evaluation.per_task, evaluation.per_kind)


def products() -> list[int]:
    """Returns every training times inference scale of setting D."""
    return sorted({a * b for a in TRAINING_SCALES for b in INFERENCE_SCALES})


def measure_products(network: DiT, config: Config) -> dict[str, float]:
    """Measures the undistilled source under each guidance scale that setting D's products reach."""
    sampler, evaluation = make_sampler(config, network.config), config.evaluation
    metrics = [partial(_guided, scale) for scale in products()]
    return _apply(metrics, network, sampler, evaluation.seed, evaluation.per_task, evaluation.per_kind)


def _apply(metrics: list[Callable], network: DiT, sampler: Sampler, seed: int, per_task: int, per_kind: int) -> dict:
    """Returns what all metrics give; each names its own."""
    return {k: v for metric in metrics for k, v in metric(network, sampler, seed, per_task, per_kind).items()}


def _t2i(network, sampler, seed, per_task, per_kind):
    return _guided(1, network, sampler, seed, per_task, per_kind, name="geneval_overall")


def _guided(scale, network, sampler, seed, per_task, per_kind, name=None):
    row, name = score_geneval(as_field(network, scale), sampler, seed, per_task), name or f"beta{scale}"
    return {name: row["overall"], f"{name}_error": row["standard_error"]}


def _sketches(network, sampler, seed, per_task, per_kind):
    row = score_geneval(network, sampler, seed, per_task, style=1)
    overall = {"sketch_overall": row["overall"], "sketch_overall_error": row["standard_error"]}
    return {"style_share": row["style"], **overall}


def _style(network, sampler, seed, per_task, per_kind):
    return {"style_share": _sketches(network, sampler, seed, per_task, per_kind)["style_share"]}


def _edit(kinds, network, sampler, seed, per_task, per_kind, name="gedit_average"):
    row = score_gedit(network, sampler, seed, per_kind, kinds=kinds)
    return {name: row["average"], f"{name}_error": row["standard_error"]}


def untrained(setting: str, config: Config) -> Iterator[tuple[str, str, dict]]:
    """Measures the base, the sources and, in A, B and C, the merges of a setting.

    Each merge is tuned on validation prompts; "weight_merge" is the best of them there.

    Yields:
        (row, kind, metrics).
    """
    base = load_model(resolve_weights(config.student.init_from)) if setting != "F" else None
    sources = {name: load_model(resolve_weights(s.weights)) for name, s in config.sources.items() if name != "self"}
    if setting in "ABE":
        yield "base", "source", measure(setting, base, config)
    for name, network in sources.items():
        if setting == "D":
            yield "base", "source", measure_products(network, config)
        elif name != "cfg":
            yield f"source_{name}", "source", measure(setting, network, config)
    if setting in "ABC":
        yield from _merges(setting, config, base, list(sources.values()))


def _merges(setting: str, config: Config, base: DiT, networks: list[DiT]) -> Iterator[tuple[str, str, dict]]:
    n, few = len(networks), {"per_task": config.evaluation.quick, "per_kind": config.evaluation.quick}
    small = config.model_copy(update={"evaluation": config.evaluation.model_copy(update=few)})
    weighted = [[first, *[rest] * (n - 1)] for first, rest in BALANCE[1:]]
    candidates: dict[str, list[Callable[[], DiT]]] = {
        "merge_uniform": [partial(weight_merge, networks)],
        "merge_weighted": [partial(weight_merge, networks, weights) for weights in weighted],
    }
    if setting != "C":
        for kind in COMBINATIONS:
            candidates[f"merge_lora_{kind}"] = [partial(lora_merge, base, networks, kind, [w] * n) for w in WEIGHTS]
    tuned: dict[str, tuple[float, DiT]] = {}
    for name, makers in candidates.items():
        made = [maker() for maker in makers]
        scored = [(_merit(measure(setting, network, small, VALIDATION_SEED)), network) for network in made]
        tuned[name] = max(scored, key=lambda pair: pair[0])
        yield name, "merge", measure(setting, tuned[name][1], config)
    best = max(tuned, key=lambda name: tuned[name][0])
    yield "weight_merge", "merge", {**measure(setting, tuned[best][1], config), "chosen": best}


def _merit(metrics: dict[str, float]) -> float:
    """Returns one number to choose by: GenEval's overall plus a tenth of the edits' average, or plus the share of
    style.
    """
    return metrics["geneval_overall"] + metrics.get("gedit_average", 0) / 10 + metrics.get("style_share", 0)


def student(folder: Path) -> DiT:
    """Loads the averaged student of a finished run."""
    return load_model(folder / "student.safetensors")
