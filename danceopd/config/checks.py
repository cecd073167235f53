"""Checks a configuration across its sections, and says each mistake in words."""

from collections.abc import Iterable

from pydantic import ValidationError

from danceopd.config.expressions import outline, parts
from danceopd.config.methods import options
from danceopd.config.sections import OPERATORS, Config, Section, Source
from danceopd.core.methods import OWN_ROLLOUT, needs
from danceopd.support.hints import did_you_mean
from danceopd.support.paths import draws_miniature
from danceopd.support.texts import PROMPT

EXTENDS = "extends"  # the key of a file that names another one


def _section_at(location: tuple) -> dict:
    """Returns the fields of the section that a validation error lies in."""
    model, named = Config, False  # named: the next key is a name of the user's, such as a source's
    for key in location[:-1]:
        if model is None or named:
            named = False
            continue
        annotation = model.model_fields[key].annotation if key in model.model_fields else model
        arguments = getattr(annotation, "__args__", ())
        named = getattr(annotation, "__origin__", None) is dict
        model = next((a for a in (annotation, *arguments) if isinstance(a, type) and issubclass(a, Section)), None)
    return model.model_fields if model else {}


def mistakes(error: ValidationError) -> list[str]:
    """Says each mistake of a configuration in words; one for a value that could be a word or something else."""
    found, errors = {}, error.errors()
    either = {one["loc"][:-1] for one in errors if str(one["loc"][-1]).startswith("literal[")}  # pydantic's own part
    for one in errors:
        key = next((place for place in either if place == one["loc"][: len(place)]), one["loc"])
        found.setdefault(key, []).append(one)
    return [_explain(same[0]) if key not in either else _neither(key, *same) for key, same in found.items()]


def _neither(key: tuple, literal: dict, other: dict, *_) -> str:
    """Says that a value is neither one of some words nor what else could stand there."""
    value, words = literal["input"], _words(literal)
    near = did_you_mean(value, words, "") if isinstance(value, str) else ""
    rest = _wanted(other).removeprefix("must be ")
    rest = f"a number {rest}" if other["type"].startswith(("greater", "less")) else rest
    give = f"; give {', '.join(words)}, or {rest}"
    return f"{'.'.join(map(str, key))}: {value!r} is not valid{near or give}"


def _words(error: dict) -> list[str]:
    return error["ctx"]["expected"].replace(" or ", ", ").replace("'", "").split(", ")


def _explain(error: dict, valid: Iterable[str] | None = None, prefix: str = "") -> str:
    """Says one mistake in words; valid: the keys that could stand there, if they are not a section's."""
    key = prefix + ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        if valid is None:
            valid = [*_section_at(error["loc"]), *([EXTENDS] if len(error["loc"]) == 1 else [])]
            within = [f"{name}.{key}" for name in valid if key in _section_at((name, key))]
            if len(error["loc"]) == 1 and within:
                return f"{key}: unknown key; did you mean {' or '.join(map(repr, within))}?"
        return f"{key}: unknown key{did_you_mean(error['loc'][-1], valid) if valid else '; this method has none'}"
    if error["type"] == "missing":
        return f"{key}: required, but not given"
    if error["type"] == "literal_error":
        return f"{key}: {error['input']!r} is not valid{did_you_mean(error['input'], _words(error))}"
    if error["type"] == "value_error":  # in this program's words, which name what is wrong
        return f"{key}: {error['ctx']['error']}"
    return f"{key}: {_wanted(error)}, found {error['input']!r}"


# What pydantic wants of a value, by the beginning of its name for the mistake; {} is the number that is the limit.
WANTED = {
    "int_": "must be a whole number",
    "float_": "must be a number",
    "finite_number": "must be a number, and neither infinite nor nan",
    "bool_": "must be true or false",
    "string_": "must be text; put it in quotes",
    "path_": "must be a path",
    "list_": "must be a list, as in [a, b]",
    "tuple_": "must be a list, as in [a, b]",
    "dict_": "must hold keys with values of their own",
    "model_": "must hold keys with values of their own",
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be above {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be below {lt}",
    "too_short": "needs at least {min_length}",
    "too_long": "takes at most {max_length}",
}


def _wanted(error: dict) -> str:
    """Says in words what a value must be."""
    limits = error.get("ctx", {})
    limits = {key: int(one) if isinstance(one, float) and one.is_integer() else one for key, one in limits.items()}
    for begins, words in WANTED.items():
        if error["type"].startswith(begins):
            return words.format_map(limits)
    return error["msg"][0].lower() + error["msg"][1:]


def _check_model(config: Config) -> list[str]:
    """Lists what goes with a `model` only and is given without one, and what does not go with one."""
    if config.model:
        scored = not config.evaluation.times or draws_miniature(config.model)
        evaluation = [] if scored else ["evaluation.times: of models the miniature alone is scored; give 0"]
        return evaluation + _check_start(config)
    of_models = {f"student.{key}": getattr(config.student, key) for key in ("lora", "embedded_guidance")}
    for key in ("gradient_checkpointing", "base_precision", "offload_sources", "swap_blocks"):
        value = getattr(config.training, key)
        of_models[f"training.{key}"] = value if value and value != "fp8" else None
    if config.training.attention_backend != "auto":
        of_models["training.attention_backend"] = config.training.attention_backend
    if config.allow_distilled_base:
        of_models["allow_distilled_base"] = True
    for name, source in config.networks().items():
        of_models |= {f"sources.{name}.{key}": getattr(source, key) for key in ("lora", "embedded_guidance")}
    given = [key for key, value in of_models.items() if value not in (None, [])]
    unnamed = [name for name, source in config.networks().items() if source.weights is None]
    no_mean = [NO_MEAN] if config.student.init_from == "merge" and not config.networks() else []
    of_a_model = [f"{key}: is for a model's; give model, or leave it out" for key in given]
    return no_mean + of_a_model + [f"sources.{name}.weights: required, but not given" for name in unnamed]


NO_MEAN = "student.init_from: merge is the mean of the sources that are networks, and there is none; begin as base"


def _check_start(config: Config) -> list[str]:
    """Lists what a model's student cannot begin as."""
    start, key = config.student.init_from, "student.init_from"
    if start not in ("base", "merge", *config.sources):
        near = did_you_mean(start, ["base", "merge", *config.sources])
        return [f"{key}: no source {start!r}, nor base or merge{near}"]
    if start in config.sources and (kind := config.sources[start].operator()):
        return [f"{key}: {start} is {kind} of other sources and has no weights; begin as base, or as one of them"]
    if start == "merge" and not config.networks():
        return [NO_MEAN]
    if start == "merge" and "merge" in config.sources:
        return [f"{key}: merge is the mean of all sources, but one of them has this name too; give it another"]
    if config.student.lora and start != "base":
        begun = config.networks() if start == "merge" else [start]
        own = [name for name in begun if config.sources[name].weights not in (None, "base")]
        if own:
            return [
                f"{key}: {', '.join(own)} has weights of its own, which no adapter can begin as; leave student.lora "
                "out to train all weights, or begin as base and distil"
            ]
    return []


OF_NETWORKS = ("weights", "lora", "guidance_scale", "embedded_guidance")


def _check_sources(config: Config) -> list[str]:
    """Lists what is wrong with sources that are made of others."""
    problems = []
    for name, source in config.sources.items():
        key, given = f"sources.{name}", [kind for kind in OPERATORS if getattr(source, kind) is not None]
        if len(given) > 1:
            problems.append(
                f"{key}: {' and '.join(given)}; a source is one operator, of others that may be operators too"
            )
            continue
        own = [field for field in OF_NETWORKS if _changed(source, field)] if given else []
        if own:
            problems.append(f"{key}.{own[0]}: is for a network, but this is {given[0]} of others; give it to these")
        for part, named in parts(config, name):
            if named not in config.sources:
                problems.append(f"{key}.{part}: no source {named!r}{did_you_mean(named, config.sources)}")
        problems += [f"{key}.{given[0]}{problem}" for problem in _without_effect(source)] if given else []
    if problems:
        return problems
    if circle := _circle(config):
        return [f"sources.{circle[0]}: {' -> '.join(circle)} goes in a circle; a source cannot be made of itself"]
    for name, source in config.sources.items():
        if source.compose or source.difference:
            problems += _check_bases(config, name)
        if source.guided and source.guided.skip_layers and config.sources[source.guided.source].operator():
            of = f"{source.guided.source} is {config.sources[source.guided.source].operator()} of others"
            problems.append(f"sources.{name}.guided.skip_layers: blocks are of a network, but {of}; guide a network")
        elif source.guided and source.guided.skip_layers and config.training.offload_sources and _own(config, source):
            problems.append(
                f"sources.{name}.guided.skip_layers: not with training.offload_sources, which brings the blocks of "
                f"{source.guided.source} in their order; leave one of them out"
            )
        elif source.operator():
            try:
                outline(config, name)
            except ValueError as error:
                problems.append(f"sources.{name}.{source.operator()}: {error}")
            else:
                problems += _unheard(config, name)
    return problems


def _unheard(config: Config, name: str) -> list[str]:
    """Lists guidance away from what its source is asked with anyway."""
    guided = config.sources[name].guided
    if guided is None or guided.scale == 1:
        return []
    heard = {
        term.text.name if term.text else PROMPT
        for term in outline(config, guided.source).every_term()
        if not term.fixed
    }
    if heard != {guided.negative}:
        return []
    return [
        f"sources.{name}.guided.negative: {guided.negative!r} is what {guided.source} is asked with anyway, and "
        "guidance away from that leaves it as it is; give another text"
    ]


def _own(config: Config, source: Source) -> bool:
    """Whether what a source guides has weights of its own."""
    return config.sources[source.guided.source].weights not in (None, "base")


def _circle(config: Config) -> list[str] | None:
    """Returns the names of a circle of sources, the first again at its end."""
    done: set[str] = set()

    def search(name: str, way: list[str]) -> list[str] | None:
        if name in way:
            return [*way[way.index(name) :], name]
        if name not in done:
            for _, part in parts(config, name):
                if found := search(part, [*way, name]):
                    return found
            done.add(name)
        return None

    return next(filter(None, (search(name, []) for name in config.sources)), None)


def _networks_of(config: Config, name: str) -> dict[str, Source]:
    """Returns the networks that a source is made of."""
    named = [part for _, part in parts(config, name)]
    if not named:
        return {name: config.sources[name]}
    return {key: value for part in named for key, value in _networks_of(config, part).items()}


def _check_bases(config: Config, name: str) -> list[str]:
    """Lists where a difference would be of more than what its source changes: of two bases or embedded guidances.

    A source without adapters has weights of its own, which are the change.
    """
    kind = config.sources[name].operator()
    base, problems = getattr(config.sources[name], kind).base, []
    bases = _networks_of(config, base)
    weights = {network.weights or "base" for network in bases.values()}
    numbers = {network.embedded_guidance for network in bases.values()}
    for part, network in _networks_of(config, name).items():
        if part in bases:
            continue
        own = network.weights or "base"
        if network.lora and own not in weights:
            problems.append(
                f"sources.{name}.{kind}: {part} is a LoRA on {own}, but the base {base} is "
                f"{' and '.join(sorted(weights))}; give a base of the same weights"
            )
        if network.embedded_guidance not in numbers:
            problems.append(
                f"sources.{name}.{kind}: {part} is asked at embedded_guidance {network.embedded_guidance}, but the "
                f"base {base} is not; give both the same"
            )
    return problems


# Long: each operator has its own ways to change nothing.
def _without_effect(source: Source) -> list[str]:
    """Lists what of an operator would change nothing, each as ".key: message"."""
    guided, weak, compose, slider = source.guided, source.autoguided, source.compose, source.slider
    skip = guided.skip_layers if guided else None
    for key, own in (("interval", guided or weak), ("skip_layers.interval", skip)):
        if own and own.interval[1] == 0:
            return [f".{key}: ends at noise level 0, at which nothing is asked; give a higher end"]
    if guided:
        if skip and skip.scale == 0:
            return [".skip_layers.scale: 0 adds nothing; give another scale, or leave skip_layers out"]
        own = ("negative", "zero_star", "apg", "interval", *(() if skip else ("rescale",)))
        options = [key for key in own if _changed(guided, key)]
        if guided.scale == 1 and (options or not skip):
            what = f"{' and '.join(options)} without effect" if options else f"the same as {guided.source}"
            return [f".scale: 1 is no guidance, which leaves {what}; give another scale"]
        if guided.zero_star and guided.apg:
            return [".apg: is one rule of guidance and zero_star another; give one of them"]
        if guided.apg and guided.apg.eta == 1 and guided.apg.norm == 0:
            return [".apg: eta 1 without a norm is plain guidance; leave it out"]
    if weak and (weak.source == weak.weak or weak.scale == 1):
        return [f": leaves {weak.source} as it is; give a weaker source, and a scale other than 1"]
    if weak and weak.scale == 0:
        return [f".scale: 0 is {weak.weak} itself; name that, or give another scale"]
    if source.difference and (source.difference.base == source.difference.source or source.difference.weight == 0):
        return [": leaves the base as it is; give another source, and a weight other than 0"]
    if source.difference and source.difference.weight == 1:
        return [f".weight: 1 is {source.difference.source} itself; name that, or give another weight"]
    if compose:
        none = [part for part, weight in compose.sources.items() if part == compose.base or weight == 0]
        if not none and list(compose.sources.values()) == [1]:
            return [f".sources: weight 1 of one alone is {next(iter(compose.sources))} itself; name that"]
        return [f".sources.{part}: adds nothing to {compose.base}; leave it out" for part in none]
    if slider and (slider.positive == slider.negative or slider.eta == 0):
        return [f": leaves {slider.source} as it is; give two texts, and an eta other than 0"]
    if source.mean and len(set(source.mean)) < len(source.mean):
        return [": names a source twice; name each once"]
    if source.by_sigma and source.by_sigma.above == source.by_sigma.below:
        return [": is one source above and below; give two"]
    if source.teacher_at and source.teacher_at.prompt == PROMPT:
        return [f".prompt: {PROMPT!r} is what {source.teacher_at.source} is asked with anyway; give another text"]
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
    if config.student.lora and base == "auto":
        problems.append(
            f"{key}: {wanted}, but an adapter's rollouts run as its base does, which training.base_precision: auto "
            "has yet to choose; give it fp8, or leave one of them out"
        )
    if config.student.lora and wanted == "fp8" and base in ("int8", "nf4"):
        problems.append(
            f"{key}: fp8, but the adapter's base is in {base}; give training.base_precision fp8, or leave it out"
        )
    return problems


def _check_swap(config: Config) -> list[str]:
    """Lists what goes against training.swap_blocks."""
    training, key = config.training, "training.swap_blocks"
    if training.swap_blocks is None or not config.model:
        return []
    problems = []
    if not config.student.lora:
        problems.append(f"{key}: is for the transformer that adapters share; give student.lora, or leave it out")
    elif not training.gradient_checkpointing:
        problems.append(
            f"{key}: needs training.gradient_checkpointing: true, since a backward that computes no block again keeps "
            "every block on the card"
        )
    if training.rollout_precision:
        problems.append(
            f"{key}: not with training.rollout_precision, a second copy of the blocks; give training.base_precision: "
            "fp8, int8 or nf4 instead"
        )
    problems += [
        f"{key}: not with training.{name}, which needs the blocks where they are; leave one of them out"
        for name, value in (("cuda_graphs", training.cuda_graphs), ("compile", training.compile))
        if value is True
    ]
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
        for key in () if draws_miniature(config.model) else ONLY_WORLD:
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
    problems = _check_sources(config)
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
    problems += _check_model(config) + _check_rollout(config) + _check_swap(config)
    if sum(c.weight for c in config.capabilities.values()) == 0:
        problems.append("capabilities: all weights are zero, so no sample would be drawn")
    training = config.training
    if training.batch_size % training.gradient_accumulation_steps:
        problems.append(
            f"training.gradient_accumulation_steps: {training.gradient_accumulation_steps} does not divide "
            f"batch_size {training.batch_size}"
        )
    return problems
