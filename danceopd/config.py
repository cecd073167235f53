"""The configuration: one YAML file, checked whole before anything is computed."""

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from danceopd.errors import UserError
from danceopd.methods import METHODS, OWN_ROLLOUT, options
from danceopd.optimizers import OPTIMIZERS
from danceopd.query import QUERIES
from danceopd.rollout import SOLVERS
from danceopd.routing import ROUTES

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Scale = Annotated[float, Field(allow_inf_nan=False)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class NewLora(Section):
    """A student's adapter: alpha / rank times B A beside each target layer; alpha is the rank if not given.

    targets: ends of the layers' names; those of the model's family if not given.
    """

    rank: Positive = 128
    alpha: PositiveFloat | None = None
    targets: list[str] | None = None


class Student(Section):
    """init_from: the name of an embedded network, or a .safetensors file; with a `model`, "base", its transformer,
    the name of a source, or "merge", the mean of all sources (of networks: guidance is no part of either).

    lora: train an adapter of a `model`'s transformer; all its weights if not given. embedded_guidance: the number that
    a guidance-distilled `model` takes as an input (FLUX.1 dev and Kontext 3.5, FLUX.2 dev 4), at which the student is
    trained and then drawn with.
    """

    init_from: str = "base"
    lora: NewLora | None = None
    embedded_guidance: Scale | None = None


class LoraFile(Section):
    """A LoRA in any layout that diffusers converts; scale: of what it changes."""

    path: Path
    scale: Scale = 1.0


class Source(Section):
    """A frozen teacher. guidance_scale 1 asks its conditional field; any other makes guidance part of the field.

    weights: as a student's init_from; with a `model`, "base" (also if not given), a transformer's or a pipeline's
    folder, or a transformer in one .safetensors file, under diffusers' names or in a layout that diffusers converts.
    lora: adapters on its transformer, summed.
    embedded_guidance: as a student's, the number that this source is asked with. Pipelines of Z-Image count their
    guidance from 0: their g is the guidance_scale 1 + g.
    """

    weights: str | None = None
    lora: list[LoraFile] = []
    guidance_scale: Scale = 1.0
    embedded_guidance: Scale | None = None


class Data(Section):
    """Exactly one of `world` (pictures drawn from `seed`, `size` of them) and `manifest` (a user's own file).

    With a `model`: prepared, the rows that `danceopd data prepare` wrote.
    """

    world: Literal["t2i", "style", "edit", "local", "global"] | None = None
    size: Positive = 20000
    seed: Count = 1
    manifest: Path | None = None
    prepared: Path | None = None
    root: Path | None = None


class Capability(Section):
    """One route: `source` supervises the samples of `data`, drawn with probability `weight` / sum of weights.

    task: edit where every sample has a source picture, t2i where none has. capability: the name in the
    manifest, if it differs from the key here. student_guidance_scale: the student's own scale for these samples.
    prompt_dropout: the share of prompts left empty, so that guidance can be used on the student.
    """

    source: str
    task: Literal["t2i", "edit"]
    data: Data
    capability: str | None = None
    weight: Weight = 1.0
    student_guidance_scale: Scale = 1.0
    prompt_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0


class Rollout(Section):
    """shift: of the noise levels; a `model`'s are those of its scheduler, and shift is not looked at."""

    num_inference_steps: Positive = 16
    shift: PositiveFloat = 5.0
    solver: Literal[*SOLVERS] = "euler"


class Query(Section):
    bias: Literal[*QUERIES] = "low_t"
    k: Positive = 1


class Training(Section):
    """batch_size samples make one update, in micro-batches of batch_size / gradient_accumulation_steps.

    max_network_evaluations ends a run before max_steps: forwards of one sample by any network, a backward counted
    as two. gradient_checkpointing: with a `model`, the backward computes each block again instead of keeping it.
    base_precision: of the frozen linear weights in a `model`'s blocks, those of sources too; adapters stay as they
    are. With fp8 a token's input is rounded too where the device multiplies FP8; the embedded network's sources can
    have it as well. offload_sources: with a `model`, sources with weights of their own wait in host memory, and a
    forward brings their blocks to the device one after another, the next while one computes; without effect on a CPU.

    rollout_precision: of a copy of the student that rollouts ask, filled after each update; fp8 as in base_precision.
    If not given they ask the student itself, or with ZeRO-3 a replica in its own precision. An adapter's base in FP8
    is the one that sources share where base_precision is fp8 too, else a copy.

    With DeepSpeed: rollout_on: ZeRO-3's rollouts ask a replica of the student that is gathered once an update, or its
    shards, which every forward gathers. shard_sources: sources with weights of their own lie on all ranks in shards, or
    on each of them whole. auto looks at the memory that is free.

    cuda_graphs: rollouts take static steps (danceopd.graphs), on CUDA as captured graphs; auto does on CUDA alone.
    compile: torch.compile of each block of the network that rollouts ask. attention_backend: with a `model`, by
    diffusers' name of it, or auto (danceopd.attention). profile_steps: updates, from the second on, of which torch's
    profiler writes a trace into the run's folder `profile`.
    """

    output_dir: Path
    seed: Count = 0
    max_steps: Positive = 1000
    max_network_evaluations: Positive | None = None
    batch_size: Positive = 64
    gradient_accumulation_steps: Positive = 1
    optimizer: Literal[*OPTIMIZERS] = "adamw"
    learning_rate: PositiveFloat = 5e-4
    warmup_steps: Count = 20
    lr_schedule: Literal["constant", "cosine"] = "constant"
    weight_decay: Weight = 0.0
    max_grad_norm: PositiveFloat = 1.0
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    precision: Literal["fp32", "bf16"] = "fp32"
    rollout_precision: Literal["bf16", "fp8"] | None = None
    gradient_checkpointing: bool = False
    base_precision: Literal["int8", "fp8"] | None = None
    offload_sources: bool = False
    rollout_on: Literal["auto", "replica", "shards"] = "auto"
    shard_sources: Literal["auto"] | bool = "auto"
    cuda_graphs: Literal["auto"] | bool = "auto"
    compile: bool = False
    attention_backend: str = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    log_every: Positive = 5
    save_every: Positive = 100
    keep_checkpoints: Positive = 2
    sample_every: Count = 200
    max_nonfinite_steps: Positive = 10
    profile_steps: Count = 0


class Evaluation(Section):
    """Pictures per GenEval task and per edit kind; during the run, `times` evenly spread, one of `quick` each.

    Pictures are drawn in num_inference_steps of `solver`, with the rollout's shift.
    """

    seed: Count = 1234
    per_task: Positive = 100
    per_kind: Positive = 100
    batch_size: Positive = 128
    times: Count = 0
    quick: Positive = 30
    num_inference_steps: Positive = 16
    solver: Literal[*SOLVERS] = "euler"


class Config(Section):
    """options: those of the method. route: drawn with the capabilities' weights, in turn, or by weight and gap.

    model: the folder of a diffusers pipeline whose transformer is distilled; the embedded network if not given.
    """

    model: Path | None = None
    method: Literal[*METHODS] = "danceopd"
    options: dict[str, Any] = {}
    route: Literal[*ROUTES] = "random"
    student: Student = Student()
    sources: dict[str, Source] = Field(min_length=1)
    capabilities: dict[str, Capability] = Field(min_length=1)
    rollout: Rollout = Rollout()
    query: Query = Query()
    training: Training
    evaluation: Evaluation = Evaluation()

    def to_dict(self) -> dict:
        """Plain values, as YAML or JSON take them."""
        return self.model_dump(mode="json")

    def method_options(self) -> dict:
        """The method's options by keyword, defaults and all."""
        return options(self.method)(**self.options).model_dump()


def load_config(path: Path | str, overrides: list[str] = ()) -> Config:
    """Read a YAML file, apply `key.sub=value` overrides, and check everything that needs no file.

    Raises UserError that lists every mistake with its key, and for an unknown key the nearest valid one.
    """
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = difflib.get_close_matches(str(path), [str(p) for p in path.parent.glob("*.y*ml")], n=1)
        raise UserError(f"no configuration at {path}" + (f"; did you mean {near[0]}?" if near else "")) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    return parse_config(raw, overrides, str(path))


def parse_config(raw: dict, overrides: list[str] = (), name: str = "configuration") -> Config:
    """Check a configuration given as plain values. Raises UserError as load_config does."""
    if not isinstance(raw, dict):
        raise UserError(f"{name} must be a mapping of keys to values, found {type(raw).__name__}")
    for override in overrides:
        _override(raw, override)
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        raise UserError(_list(name, [_explain(item) for item in error.errors()])) from None
    problems = _cross_check(config)
    if problems:
        raise UserError(_list(name, problems))
    return config


def _list(name: str, problems: list[str]) -> str:
    count = f"{len(problems)} mistakes" if len(problems) > 1 else "a mistake"
    return "\n  ".join([f"{name} has {count}:", *problems])


def _override(raw: dict, override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"override {override!r} is not of the form key.sub=value")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"the value of override {override!r} is not YAML: {error}") from None
    if isinstance(parsed, str):  # YAML 1.1 reads 5e-4 as text
        try:
            parsed = float(parsed)
        except ValueError:
            pass
    *parents, last = key.strip().split(".")
    node = raw
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise UserError(f"override {override!r}: {parent} holds a value, not keys")
    node[last] = parsed


def nearest(word: str, valid) -> str:
    """ "; did you mean x?", or the valid words where none is near."""
    valid = sorted(str(v) for v in valid)
    near = difflib.get_close_matches(str(word), valid, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; valid are {', '.join(valid)}"


def _section_at(location: tuple) -> dict:
    """The fields of the section that a validation error lies in."""
    model = Config
    for key in location[:-1]:
        if model is None:
            continue
        annotation = model.model_fields[key].annotation if key in model.model_fields else model
        arguments = getattr(annotation, "__args__", ())
        model = next((a for a in (annotation, *arguments) if isinstance(a, type) and issubclass(a, Section)), None)
    return model.model_fields if model else {}


def _explain(error: dict, valid: Iterable[str] | None = None, prefix: str = "") -> str:
    """One mistake in words; valid: the keys that could stand there, if they are not a section's."""
    key = prefix + ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        valid = _section_at(error["loc"]) if valid is None else valid
        return f"{key}: unknown key{nearest(error['loc'][-1], valid) if valid else '; this method has none'}"
    if error["type"] == "missing":
        return f"{key}: required, but not given"
    if error["type"] == "literal_error":
        valid = error["ctx"]["expected"].replace(" or ", ", ").replace("'", "").split(", ")
        return f"{key}: {error['input']!r} is not valid{nearest(error['input'], valid)}"
    return f"{key}: {error['msg'][0].lower()}{error['msg'][1:]}, found {error['input']!r}"


def _check_model(config: Config) -> list[str]:
    """What goes with a `model` only, and what does not go with one."""
    if config.model:
        evaluation = ["evaluation.times: not with a model yet; give 0"] if config.evaluation.times else []
        return evaluation + _check_start(config)
    of_models = {f"student.{key}": getattr(config.student, key) for key in ("lora", "embedded_guidance")}
    for key in ("gradient_checkpointing", "base_precision", "offload_sources"):
        value = getattr(config.training, key)
        of_models[f"training.{key}"] = value if value and value != "fp8" else None
    if config.training.attention_backend != "auto":
        of_models["training.attention_backend"] = config.training.attention_backend
    for name, source in config.sources.items():
        of_models |= {f"sources.{name}.{key}": getattr(source, key) for key in ("lora", "embedded_guidance")}
    given = [key for key, value in of_models.items() if value not in (None, [])]
    unnamed = [name for name, source in config.sources.items() if source.weights is None]
    return [f"{key}: is for a model's; give model, or leave it out" for key in given] + [
        f"sources.{name}.weights: required, but not given" for name in unnamed
    ]


def _check_start(config: Config) -> list[str]:
    """What a model's student cannot begin as."""
    start, key = config.student.init_from, "student.init_from"
    if start not in ("base", "merge", *config.sources):
        return [f"{key}: no source {start!r}, nor base or merge{nearest(start, ['base', 'merge', *config.sources])}"]
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
    """What goes against training.rollout_precision."""
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


def _cross_check(config: Config) -> list[str]:
    problems = []
    try:
        config.method_options()
    except ValidationError as error:
        problems += [_explain(e, options(config.method).model_fields, "options.") for e in error.errors()]
    for name, capability in config.capabilities.items():
        if capability.source not in config.sources:
            near = nearest(capability.source, config.sources)
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
