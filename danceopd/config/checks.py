"""Checks a configuration across its sections, and says each mistake in words."""

from collections.abc import Iterable

from pydantic import ValidationError

from danceopd.config.methods import options
from danceopd.config.sections import Config, Section
from danceopd.core.methods import OWN_ROLLOUT, needs
from danceopd.support.hints import did_you_mean


def _section_at(location: tuple) -> dict:
    """Returns the fields of the section that a validation error lies in."""
    model = Config
    for key in location[:-1]:
        if model is None:
            continue
        annotation = model.model_fields[key].annotation if key in model.model_fields else model
        arguments = getattr(annotation, "__args__", ())
        model = next((a for a in (annotation, *arguments) if isinstance(a, type) and issubclass(a, Section)), None)
    return model.model_fields if model else {}


def _explain(error: dict, valid: Iterable[str] | None = None, prefix: str = "") -> str:
    """Says one mistake in words; valid: the keys that could stand there, if they are not a section's."""
    key = prefix + ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        valid = _section_at(error["loc"]) if valid is None else valid
        return f"{key}: unknown key{did_you_mean(error['loc'][-1], valid) if valid else '; this method has none'}"
    if error["type"] == "missing":
        return f"{key}: required, but not given"
    if error["type"] == "literal_error":
        valid = error["ctx"]["expected"].replace(" or ", ", ").replace("'", "").split(", ")
        return f"{key}: {error['input']!r} is not valid{did_you_mean(error['input'], valid)}"
    return f"{key}: {error['msg'][0].lower()}{error['msg'][1:]}, found {error['input']!r}"


def _check_model(config: Config) -> list[str]:
    """Lists what goes with a `model` only and is given without one, and what does not go with one."""
    if config.model:
        evaluation = ["evaluation.times: not with a model yet; give 0"] if config.evaluation.times else []
        return evaluation + _check_start(config)
    of_models = {f"student.{key}": getattr(config.student, key) for key in ("lora", "embedded_guidance")}
    for key in ("gradient_checkpointing", "base_precision", "offload_sources"):
        value = getattr(config.training, key)
        of_models[f"training.{key}"] = value if value and value != "fp8" else None
    if config.training.attention_backend != "auto":
        of_models["training.attention_backend"] = config.training.attention_backend
    if config.allow_distilled_base:
        of_models["allow_distilled_base"] = True
    for name, source in config.sources.items():
        of_models |= {f"sources.{name}.{key}": getattr(source, key) for key in ("lora", "embedded_guidance")}
    given = [key for key, value in of_models.items() if value not in (None, [])]
    unnamed = [name for name, source in config.sources.items() if source.weights is None]
    return [f"{key}: is for a model's; give model, or leave it out" for key in given] + [
        f"sources.{name}.weights: required, but not given" for name in unnamed
    ]


def _check_start(config: Config) -> list[str]:
    """Lists what a model's student cannot begin as."""
    start, key = config.student.init_from, "student.init_from"
    if start not in ("base", "merge", *config.sources):
        near = did_you_mean(start, ["base", "merge", *config.sources])
        return [f"{key}: no source {start!r}, nor base or merge{near}"]
    if start == "merge" and "merge" in config.sources:
        return [f"{key}: merge is the mean of all sources, but one of them has this name too; give it another"]
    if config.student.lora and start != "base":
        begun = config.sources if start == "merge" else [start]
        own = [name for name in begun if config.sources[name].weights not in (None, "base")]
        if own:
            return [
                f"{key}: {', '.join(own)} has weights of its own, which no adapter can begin as; leave student.lora "
                "out to train all weights, or begin as base and distil"
            ]
    return []


def _check_rollout(config: Config) -> list[str]:
    """Lists what goes against training.rollout_precision."""
    training, key = config.training, "training.rollout_precision"
    wanted, base = training.rollout_precision, training.base_precision
    if wanted is None:
        return []
    problems = []
    if config.method in OWN_ROLLOUT:
        problems.append(f"{key}: {wanted}, but {config.method} {OWN_ROLLOUT[config.method]}; leave it out")
    if training.rollout_on == "shards":
        problems.append(
            f"{key}: {wanted}, but training.rollout_on: shards asks the student itself; leave one of them out"
        )
    if config.student.lora and wanted == "bf16" and (training.precision != "bf16" or base == "fp8"):
        problems.append(
            f"{key}: bf16, but an adapter runs as its base does, which is in {base or training.precision}; leave it "
            "out, or give training.precision bf16 without base_precision fp8"
        )
    if config.student.lora and wanted == "fp8" and base == "int8":
        problems.append(
            f"{key}: fp8, but the adapter's base is in int8; give training.base_precision fp8, or leave it out"
        )
    return problems


# What of the configuration a method reads, by the keyword that it takes it by.
READ_AS = {
    ("rollout", "num_inference_steps"): "sigmas",
    ("rollout", "solver"): "solver",
    ("query", "bias"): "bias",
    ("query", "k"): "k",
}
ONLY_WORLD = ("per_task", "per_kind", "batch_size", "quick")  # of the evaluation, whose pictures a model does not draw


def _changed(section: Section, key: str) -> bool:
    """Whether a configuration gives a key another value than its default."""
    return getattr(section, key) != type(section).model_fields[key].default


def _check_unread(config: Config) -> list[str]:
    """Lists what the run would not read: an option that changes nothing is a mistake."""
    reads, problems = needs(config.method), []
    for (section, key), keyword in READ_AS.items():
        part = getattr(config, section)
        if keyword not in reads and _changed(part, key):
            problems.append(
                f"{section}.{key}: {getattr(part, key)!r}, but {config.method} does not read it; leave it out"
            )
    if config.query.bias == "gap" and "bias" in reads and "gap" not in reads:
        problems.append(f"query.bias: 'gap', but {config.method} does not follow the gap; use another bias")
    if config.model:
        if _changed(config.rollout, "shift") and "shift" not in reads:
            problems.append("rollout.shift: the noise levels of a model are those of its scheduler; leave it out")
        for key in ONLY_WORLD:
            if _changed(config.evaluation, key):
                problems.append(f"evaluation.{key}: is for the picture world; leave it out with a model")
    for name, capability in config.capabilities.items():
        for key in ("size", "seed"):
            if capability.data.world is None and _changed(capability.data, key):
                problems.append(f"capabilities.{name}.data.{key}: is for world's pictures; leave it out")
        if capability.data.root and not capability.data.manifest:
            problems.append(f"capabilities.{name}.data.root: is for a manifest's pictures; leave it out")
    group = config.method_options().get("group_size")
    if group and config.training.batch_size % group:
        problems.append(f"options.group_size: {group} does not divide training.batch_size {config.training.batch_size}")
    return problems


def _cross_check(config: Config) -> list[str]:
    problems = []
    try:
        config.method_options()
    except ValidationError as error:
        problems += [_explain(e, options(config.method).model_fields, "options.") for e in error.errors()]
    else:
        problems += _check_unread(config)
    for name, capability in config.capabilities.items():
        if capability.source not in config.sources:
            near = did_you_mean(capability.source, config.sources)
            problems.append(f"capabilities.{name}.source: no source {capability.source!r}{near}")
        data = capability.data
        given = [key for key in ("world", "manifest", "prepared") if getattr(data, key) is not None]
        if config.model and given != ["prepared"]:
            problems.append(f"capabilities.{name}.data: a model trains on prepared rows; give prepared alone")
        elif not config.model and given not in (["world"], ["manifest"]):
            problems.append(f"capabilities.{name}.data: give either world or manifest")
        elif data.world and (capability.task == "t2i") != (data.world in ("t2i", "style")):
            has = "no source pictures" if data.world in ("t2i", "style") else "source pictures"
            problems.append(f"capabilities.{name}.task: {capability.task!r}, but world {data.world!r} has {has}")
    problems += _check_model(config) + _check_rollout(config)
    if sum(c.weight for c in config.capabilities.values()) == 0:
        problems.append("capabilities: all weights are zero, so no sample would be drawn")
    training = config.training
    if training.batch_size % training.gradient_accumulation_steps:
        problems.append(
            f"training.gradient_accumulation_steps: {training.gradient_accumulation_steps} does not divide "
            f"batch_size {training.batch_size}"
        )
    return problems
