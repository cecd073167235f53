"""What a run takes and what it lacks, without loading a weight: `danceopd train --dry-run`.

Networks are built on the meta device from their configurations; of files only configurations, headers, prepared
rows and both ends of the encoders' files are read. What the backward keeps is seen on a forward there, through the code
that trains.
"""

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.flop_counter import FlopCounterMode

from danceopd.backbones import meta_transformer
from danceopd.backbones.dit import DiT
from danceopd.backbones.loading import check_transformer_file, check_weights, is_file_name
from danceopd.checkpoint import read_config, resolve_weights
from danceopd.conditioning import Conditioning
from danceopd.config import Config
from danceopd.eight_bit import check_eight_bit, stored, to_eight_bit
from danceopd.errors import UserError
from danceopd.fp8 import check_fp8, to_fp8
from danceopd.methods import needs
from danceopd.optimizers import Muon, adamw_class, make_optimizers
from danceopd.query import expected_depth
from danceopd.training.log import MODEL_SAMPLES, PREVIEW_SAMPLES
from danceopd.training.replica import bytes_beside, make_replica, rollout_precision
from danceopd.training.setup import find_device, load_data

GIB = 2**30
FLOAT = 4  # bytes of a trainable parameter, its gradient, its average, and of one state of AdamW
REPLICA = "replica for rollouts"
PREPARATION = ("text_encoder", "tokenizer", "processor", "image_encoder", "feature_extractor", "siglip")


@dataclass
class Plan:
    """What was found. Each part is filled in as far as the files allow; problems: "key: what is wrong".

    found: lines about files; parameters: by network; memory: bytes of one rank by term, and how they come about;
    host: bytes that wait in host memory, in the same way;
    activations: bytes that the backward keeps, without and with gradient checkpointing (None where a network has
    none); evaluations: of one optimizer step by kind, None for a method whose are not worked out; grid: of a sample
    grid, and of its sources' rows once; operations: works out the floating-point operations of a forward of one sample,
    by capability.
    """

    problems: list[str] = field(default_factory=list)
    found: list[str] = field(default_factory=list)
    parameters: dict[str, int] = field(default_factory=dict)
    memory: dict[str, tuple[float, str]] = field(default_factory=dict)
    host: dict[str, tuple[float, str]] = field(default_factory=dict)
    activations: tuple[float, float | None] | None = None
    evaluations: dict[str, float] | None = None
    grid: tuple[int, int] | None = None
    operations: Callable[[], dict[str, int]] | None = None

    def attempt(self, key: str, function: Callable, *args):
        """function(*args), or None and a problem."""
        try:
            return function(*args)
        except (ValueError, OSError) as error:
            self.problems.append(f"{key}: {error}")

    def total_memory(self) -> float:
        """Bytes of one rank, as far as they are known."""
        return sum(size for size, _ in self.memory.values())

    def text(self) -> str:
        """The whole as it is printed."""
        lines = list(self.found)
        if self.parameters:
            lines += ["", "parameters"]
            lines += [f"  {name:34s} {count:>18,d}" for name, count in self.parameters.items()]
        if self.memory:
            lines += ["", "memory of one rank, an estimate (each rank holds all of it)"]
            lines += [f"  {name:34s} {_size(size):>12s}   {how}" for name, (size, how) in self.memory.items()]
            unknown = (
                ""
                if self.activations
                else "   at least: without activations, which need prepared rows and the transformer"
            )
            lines.append(f"  {'total':34s} {_size(self.total_memory()):>12s}{unknown}")
            for name, (size, how) in self.host.items():
                lines.append(f"  {name + ', in host memory':34s} {_size(size):>12s}   {how}")
            lines.append("  (not counted: the CUDA context, kernels' workspace and fragmentation; leave 2 GiB)")
        lines += ["", "network evaluations of one optimizer step, expected (forwards of one sample; a backward is two)"]
        if self.evaluations is None:
            lines.append("  not worked out for this method")
        else:
            lines += [f"  {name:34s} {count:10.1f}" for name, count in self.evaluations.items()]
            lines.append(f"  {'total':34s} {sum(self.evaluations.values()):10.1f}")
        if self.grid:
            lines.append(f"  a sample grid: {self.grid[0]}, and {self.grid[1]} of its sources for the first")
        if self.problems:
            lines += ["", "this run cannot start:", *(f"  {problem}" for problem in self.problems)]
        return "\n".join(lines).lstrip("\n")


def dry_run(config: Config) -> Plan:
    """Find out all that a run takes and all that it lacks; nothing is written."""
    plan = Plan()
    device = plan.attempt("training.device", find_device, config.training.device)
    if config.training.base_precision == "fp8":
        plan.attempt("training.base_precision", check_fp8, device)
    if config.training.rollout_precision == "fp8":
        plan.attempt("training.rollout_precision", check_fp8, device)
    plan.attempt("training.output_dir", _check_folder, config.training.output_dir)
    plan.attempt("training.optimizer", adamw_class, config.training.optimizer)
    if config.model:
        _model(config, plan, device)
    else:
        _embedded(config, plan)
    plan.evaluations = evaluations_per_step(config)
    plan.grid = grid_evaluations(config) if config.training.sample_every else None
    return plan


# --------------------------------------------------------------------------------------------- evaluations


def evaluations_per_step(config: Config) -> dict[str, float] | None:
    """Expected forwards of one sample in an optimizer step, by kind; a backward counts as two.

    The mean over a run of DanceOPD, whose warm start rolls nothing out, with the capabilities' weights; None for other
    methods.
    """
    options = config.method_options()
    if config.method not in ("danceopd", "danceopd_fast"):
        return None
    capabilities, k = list(config.capabilities.values()), config.query.k
    weights = [1.0 if config.route == "round_robin" else c.weight for c in capabilities]
    shares = [weight / sum(weights) for weight in weights]
    # Guidance asks the network twice: with the prompt, and with the empty one.
    own = sum(s * (1 + (c.student_guidance_scale != 1)) for s, c in zip(shares, capabilities, strict=True))
    asked = [1 + (config.sources[c.source].guidance_scale != 1) for c in capabilities]
    routed = sum(s * n for s, n in zip(shares, asked, strict=True))
    source = sum(asked) if options.get("routing") == "soft" else routed
    steps = expected_depth(config.rollout.num_inference_steps, bias=config.query.bias, k=k)
    if config.rollout.solver == "heun":
        steps *= 2
    warm = options["warm_start"]
    queries = warm + (1 - warm) * k
    counts = {
        "rollout to the deepest state asked": (1 - warm) * steps * own,
        "source": warm * routed + (1 - warm) * k * source,
        "student, forward": queries * own,
        "student, backward": 2 * queries * own,
    }
    if config.training.gradient_checkpointing:
        counts["student, forward again"] = queries * own
    return {name: config.training.batch_size * count for name, count in counts.items()}


def grid_evaluations(config: Config) -> tuple[int, int]:
    """(of every sample grid, of the sources' rows once in a run): forwards of one sample."""
    count = (MODEL_SAMPLES if config.model else PREVIEW_SAMPLES) * config.evaluation.num_inference_steps
    if config.evaluation.solver == "heun":
        count = 2 * count - count // config.evaluation.num_inference_steps  # its last step is Euler's
    own = sum(1 + (c.student_guidance_scale != 1) for c in config.capabilities.values())
    sources = sum(1 + (config.sources[c.source].guidance_scale != 1) for c in config.capabilities.values())
    return count * own, count * sources


# -------------------------------------------------------------------------------------------- a model's run


def _model(config: Config, plan: Plan, device: torch.device | None) -> None:
    from danceopd.attention import attention_backend
    from danceopd.backbones import backbone_of, pipeline_class_of  # these import diffusers, which takes its time
    from danceopd.lora import lora_parameters
    from danceopd.training.models import PRECISIONS, check_decoder, model_samples, needs_base, sources_on_base

    attempt, dtype = plan.attempt, PRECISIONS[config.training.precision]
    narrow = {None: None, "fp8": to_fp8}.get(config.training.base_precision, to_eight_bit)
    if narrow is to_eight_bit and not attempt("training.base_precision", check_eight_bit):
        narrow = None
    backbone = attempt("model", backbone_of, config.model)
    samples = model_samples(config, backbone, attempt) if backbone else _rows_alone(config, plan)
    if backbone is None:
        return
    plan.found.append(_parts(config.model))
    if device:
        attends = attempt("training.attention_backend", attention_backend, config, backbone, device)
        plan.found += [f"attention backend: {attends}"] if attends else []
    for m, (name, capability) in enumerate(config.capabilities.items()) if samples else ():
        rows = sum(map(len, {id(group.data[m]): group.data[m] for group in samples.groups}.values()))
        plan.found.append(f"{name}: {rows} rows in {capability.data.prepared}")
    plan.found += samples.never_drawn if samples else ()
    transformer = attempt("model", meta_transformer, config.model, backbone, dtype)
    if needs_base(config) or config.student.init_from == "base":
        attempt("model", check_weights, config.model)
    attempt("training.sample_every", check_decoder, config)
    sources, networks = {}, {}
    for name, source in config.sources.items():
        carrier = transformer  # of the source's adapters
        if name not in sources_on_base(config):
            carrier = networks[name] = _own_transformer(config, name, backbone, transformer, attempt)
        files = [
            carrier
            and attempt(f"sources.{name}.lora", lora_parameters, lora.path, carrier, pipeline_class_of(config.model))
            for lora in source.lora
        ]
        if name in networks:
            sources[name] = carrier and count(carrier)  # adapters are merged into it
        else:
            sources[name] = None if None in files else sum(parameters for parameters, _ in files)
        for lora, result in zip(source.lora, files, strict=True):
            if result:
                checked = "all keys fit" if result[1] else "keys are checked when it is loaded: its layout needs values"
                plan.found.append(f"{name}: {lora.path}, {checked}")
    if transformer is None:
        return
    if needs_base(config):
        plan.parameters["base"] = count(transformer)
    plan.parameters |= {f"source {name}, beside the base": n for name, n in sources.items() if n is not None}
    size, name = dtype.itemsize, str(dtype).removeprefix("torch.")
    how = f"{size} bytes, {name}"
    if narrow:
        how = f"1 byte in the blocks' linear layers, {size} elsewhere"
        for network in filter(None, (transformer, *networks.values())):
            narrow(network)
    if needs_base(config):
        plan.memory["base weights"] = nbytes(transformer), f"{count(transformer):,} x {how}, shared"
    total = sum(n for source, n in sources.items() if n and source not in networks)
    plan.memory["sources beside the base"] = total * size, f"{total:,} x {size} bytes, {name}"
    _add_networks(config, plan, [network for network in networks.values() if network], how)
    student = _model_student(config, plan, backbone, transformer)
    if student is None:
        return
    _trained(config, plan, student)
    autocast, trained = None, transformer
    if not config.student.lora:
        trained = student.transformer
        if dtype != torch.float32:
            autocast, n = dtype, count(trained)
            plan.memory[f"student in {name}"] = n * size, f"{n:,} x {size} bytes, of a forward by autocast"
    if samples is None:
        return
    micro = micro_batch(config)
    group = max(samples.groups, key=lambda g: sum(map(math.prod, (g.shape, *g.source_shapes))))
    seen, conditionings = [], {}
    for name, rows in zip(config.capabilities, group.data, strict=True):
        conditioning = conditionings[name] = attempt(f"capabilities.{name}.data", samples.condition, rows, [0], [False])
        if conditioning is None:
            return
        seen.append(
            (*kept_for_backward(student, trained, group.shape, conditioning, autocast), _bytes_of(conditioning))
        )
    plain, checkpointed = (max(values) for values in list(zip(*seen, strict=True))[:2])
    _add_activations(config, plan, plain, checkpointed)
    latents = FLOAT * math.prod(group.shape)
    _add_states(config, plan, latents)
    inputs = micro * (latents + max(size for *_, size in seen))
    plan.operations = lambda: {name: operations(student, group.shape, c) for name, c in conditionings.items()}
    plan.memory["latents, prompts, sources"] = inputs, f"{micro} samples of the largest picture size, as prepared"


def _model_student(config: Config, plan: Plan, backbone, transformer: nn.Module) -> nn.Module | None:
    """The student on the meta device, or None where a problem is in its way."""
    from danceopd.lora import LoraStudent, SharedBase
    from danceopd.training.models import student_layers
    from danceopd.training.students import FullStudent

    def velocity(transformer, latents, sigma, prompt, sources=(), *_, **__):
        return backbone.velocity(transformer, latents, sigma, prompt, sources, 1.0)

    lora = config.student.lora
    if lora is None:
        start = plan.attempt("student.init_from", _meta_start, config, backbone)
        return start and FullStudent(start, velocity)
    layers = plan.attempt("student.lora.targets", student_layers, config, backbone, transformer)
    if layers is None:
        return None
    cut = plan.attempt("student.init_from", _cut_layers, config, transformer, layers)
    if cut:
        plan.found.append(f"student: begins as {config.student.init_from}, cut to rank {lora.rank} in {cut} layers")
    with torch.device("meta"):
        return LoraStudent(SharedBase(transformer, [], velocity, layers), layers, lora.rank, lora.alpha or lora.rank)


def _meta_start(config: Config, backbone) -> nn.Module:
    """The transformer that a full student begins as. Raises UserError for a merge of transformers that differ."""
    from danceopd.training.models import source_folder, sources_on_base, start_folder
    from danceopd.training.students import check_alike
    from danceopd.weights import shapes_of

    parts = {"model": start_folder(config)}
    if config.student.init_from == "merge":
        on_base = sources_on_base(config)
        own = {f"source {name}": source_folder(config, s) for name, s in config.sources.items() if name not in on_base}
        parts = (parts if on_base else {}) | own
    networks = {name: meta_transformer(folder, backbone, torch.float32) for name, folder in parts.items()}
    (first, start), *others = networks.items()
    for name, network in others:
        check_alike(first, shapes_of(start), name, shapes_of(network))
    return start


def _cut_layers(config: Config, transformer: nn.Module, layers: list[str]) -> int:
    """In how many layers what a LoRA student begins as has a larger rank. Raises UserError as start_lora does.

    Files whose conversion depends on values say nothing here.
    """
    from danceopd.backbones import pipeline_class_of
    from danceopd.lora import combine, load_lora
    from danceopd.training.students import start_lora

    pipeline_class, loras = pipeline_class_of(config.model), {}
    for name, source in config.sources.items():
        if config.student.init_from not in (name, "merge"):
            continue
        try:
            loras[name] = combine([load_lora(x.path, transformer, pipeline_class, 1.0, True) for x in source.lora])
        except (UserError, RuntimeError):  # said of the source, where it is a problem
            return 0
    return sum(len(a) > config.student.lora.rank for a, _, _ in start_lora(config, loras, layers).values())


def _rows_alone(config: Config, plan: Plan) -> None:
    """Without a model nothing can be made of prepared rows, but what is wrong with them is said too."""
    from danceopd.training.models import rows_of

    for name, capability in config.capabilities.items():
        plan.attempt(
            f"capabilities.{name}.data.prepared",
            rows_of,
            capability.data.prepared,
            name,
            capability,
            "clean" in needs(config.method),
        )
    for name, source in config.sources.items():
        for lora in source.lora:
            if not lora.path.exists():
                plan.problems.append(f"sources.{name}.lora: {lora.path}: no LoRA there")
        if source.weights not in (None, "base") and not Path(source.weights).exists():
            plan.problems.append(f"sources.{name}.weights: nothing at {source.weights}")


def _parts(folder: Path) -> str:
    """Which of a pipeline's parts are there; training itself reads no encoder."""
    index = json.loads((Path(folder) / "model_index.json").read_text(encoding="utf-8"))
    named = [key for key, value in index.items() if isinstance(value, list) and value and value[0]]
    there = [part for part in named if (Path(folder) / part).is_dir()]
    missing = [part for part in named if part not in there]
    needed = [part for part in missing if not part.startswith(PREPARATION)]
    line = f"model: {folder}, a {index['_class_name']} with {', '.join(there)}"
    if needed:
        line += f"; missing: {', '.join(needed)}"
    spare = [part for part in missing if part not in needed]
    return line + (f"; not there, and needed by `danceopd data prepare` alone: {', '.join(spare)}" if spare else "")


def _own_transformer(config: Config, name: str, backbone, transformer: nn.Module | None, attempt) -> nn.Module | None:
    """A source's own transformer without values; None, and a problem, where its weights cannot be used."""
    from danceopd.training.models import PRECISIONS

    key, weights, dtype = f"sources.{name}.weights", config.sources[name].weights, PRECISIONS[config.training.precision]
    if not is_file_name(weights):
        attempt(key, check_weights, weights)
        return attempt(key, meta_transformer, weights, backbone, dtype)
    if transformer is not None:
        attempt(key, check_transformer_file, weights, transformer)
        return meta_transformer(config.model, backbone, dtype)


def _add_networks(config: Config, plan: Plan, networks: list[nn.Module], how: str) -> None:
    """Sources with weights of their own: on the device, or in host memory but for two blocks of one of them."""
    if not networks:
        return
    total, parameters = sum(map(nbytes, networks)), sum(map(count, networks))
    text = f"{parameters:,} x {how}"
    if not config.training.offload_sources:
        plan.memory["sources of their own weights"] = total, text
        return
    plan.host["sources of their own weights"] = total, text
    plan.memory["sources, streamed"] = max(map(_streamed, networks)), "two blocks of one, and what lies outside blocks"


def _streamed(network: nn.Module) -> int:
    """Bytes on the device while a network's blocks are streamed to it: the two largest, and all that is no block."""
    lists = [child for child in network.children() if isinstance(child, nn.ModuleList | nn.Sequential)]
    blocks = sorted((nbytes(block) for child in lists for block in child), reverse=True)
    return nbytes(network) - sum(blocks[2:])


# ------------------------------------------------------------------------------------ the embedded network's


def _embedded(config: Config, plan: Plan) -> None:
    attempt = plan.attempt

    def network(weights: str) -> DiT:
        with torch.device("meta"):
            return DiT(read_config(resolve_weights(weights)))

    student = attempt("student.init_from", network, config.student.init_from)
    sources = {name: attempt(f"sources.{name}.weights", network, s.weights) for name, s in config.sources.items()}
    for name, source in sources.items():
        if source and student and source.config != student.config:
            plan.problems.append(f"sources.{name}.weights: its network {source.config} is not the student's")
    size = student.config.image_size if student else 32
    for name, capability in config.capabilities.items():
        rows = attempt(f"capabilities.{name}.data", load_data, name, capability, size, "clean" in needs(config.method))
        if rows is not None:
            plan.found.append(f"{name}: {len(rows)} rows")
    plan.parameters |= {f"source {name}": count(source) for name, source in sources.items() if source}
    total, how = sum(count(source) for source in sources.values() if source), "4 bytes, float32"
    size_of_sources = FLOAT * total
    if config.training.base_precision == "fp8":
        how = "1 byte in the blocks' linear layers, 4 elsewhere"
        size_of_sources = sum(nbytes(to_fp8(source)) for source in sources.values() if source)
    plan.memory["source weights"] = size_of_sources, f"{total:,} x {how}"
    if student is None:
        return
    _trained(config, plan, student)
    tokens = torch.zeros(1, student.config.text_length, dtype=torch.int64)
    edits = any(capability.task == "edit" for capability in config.capabilities.values())
    shape = (3, size, size)
    source = torch.zeros(1, *shape)
    conditioning = Conditioning(tokens, source if edits else None, torch.tensor([edits]))
    plan.operations = lambda: {
        name: operations(student, shape, Conditioning(tokens, source, torch.tensor([c.task == "edit"])))
        for name, c in config.capabilities.items()
    }
    _add_activations(config, plan, *kept_for_backward(student, None, shape, conditioning))
    _add_states(config, plan, FLOAT * math.prod(shape))


# --------------------------------------------------------------------------------------------------- memory


def count(network: nn.Module) -> int:
    """Its parameters."""
    return sum(parameter.numel() for parameter in network.parameters())


def nbytes(network: nn.Module) -> int:
    """Bytes of its parameters and buffers."""
    return sum(part.nbytes for tensor in (*network.parameters(), *network.buffers()) for part in stored(tensor))


def _size(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / 2**20:.2f} MiB"


def micro_batch(config: Config) -> int:
    return config.training.batch_size // config.training.gradient_accumulation_steps


def _trained(config: Config, plan: Plan, student: nn.Module) -> None:
    """The student's parameters and what training keeps of each, all in float32 unless said."""
    n, optimizer = count(student), config.training.optimizer
    plan.parameters["student, trainable"] = n
    plan.memory["student"] = FLOAT * n, f"{n:,} trainable x 4 bytes, float32"
    plan.memory["gradient"] = FLOAT * n, "as many"
    if optimizer == "adamw_8bit":
        plan.memory["optimizer state"] = 2 * n, "AdamW: 2 of 1 byte each"
    else:
        made = make_optimizers(student, optimizer, config.training.learning_rate, config.training.weight_decay)
        groups = [(o, sum(p.numel() for group in o.param_groups for p in group["params"])) for o in made]
        state = FLOAT * sum(number * (1 if isinstance(o, Muon) else 2) for o, number in groups)
        plan.memory["optimizer state"] = state, f"{optimizer}: {state / n:.2g} bytes a parameter"
    plan.memory["average (EMA)"] = FLOAT * n, "as many as the student's"
    if precision := rollout_precision(config):
        replica = make_replica(student, torch.device("meta"), config)
        plan.memory[REPLICA] = bytes_beside(replica, student), f"of the student, in {precision}"
    if "anchor" in needs(config.method):
        plan.memory["anchor"] = FLOAT * n, "the student as it was, for this method"


def _add_activations(config: Config, plan: Plan, plain: float, checkpointed: float | None) -> None:
    guided = any(c.student_guidance_scale != 1 for c in config.capabilities.values())
    rows = micro_batch(config) * config.query.k * (2 if guided else 1)
    plan.activations = plain * rows, None if checkpointed is None else checkpointed * rows
    size, other = plan.activations
    text = "" if other is None else f"; {_size(other)} with gradient checkpointing"
    if config.training.gradient_checkpointing:
        size, text = other, f", gradient checkpointing; {_size(size)} without it"
    plan.memory["activations for the backward"] = size, f"{rows} samples in a forward{text}"


def _add_states(config: Config, plan: Plan, latents: int) -> None:
    """latents: bytes of one sample's in float32."""
    micro, k = micro_batch(config), config.query.k
    states = micro * latents * (k + 3)
    plan.memory["rollout states"] = states, f"{micro} samples x ({k} asked + state, velocity, step) in float32"


class _Attention(torch.autograd.Function):
    """Attention without values, which keeps what a fused one keeps: its inputs and its output."""

    @staticmethod
    def forward(ctx, query, key, value):
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out)
        return out


class _AsOnDevice(TorchFunctionMode):
    """On the meta device torch's own attention would keep the whole matrix of scores, and autocast does nothing.

    autocast: the dtype that it would run products in on a GPU, norms in float32; casts: of the parameters, each made
    once in a forward, whatever the number of samples.
    """

    def __init__(self, autocast: torch.dtype | None = None):
        super().__init__()
        self.autocast = autocast
        self.casts: dict[int, torch.Tensor] = {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.autocast and function in (F.linear, F.conv2d, F.scaled_dot_product_attention):
            args, kwargs = tree_map(self._cast, (args, kwargs))
        elif self.autocast and function in (F.layer_norm, F.rms_norm):
            args, kwargs = tree_map(lambda x: x.float() if isinstance(x, torch.Tensor) else x, (args, kwargs))
        if function is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        return function(*args, **kwargs)

    def _cast(self, value):
        if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
            return value
        if not isinstance(value, nn.Parameter):
            return value.to(self.autocast)
        if id(value) not in self.casts:
            self.casts[id(value)] = value.to(self.autocast)
        return self.casts[id(value)]

    @staticmethod
    def _attend(query, key, value, *_, **__):
        return _Attention.apply(query, key, value)


class _Adapted(torch.autograd.Function):
    """A linear layer with an adapter, which keeps what the kernel keeps: its input, that times A, and the weight."""

    @staticmethod
    def forward(ctx, x, weight, a, b):
        ctx.save_for_backward(x, x.new_empty(*x.shape[:-1], len(a)), weight)
        return x.new_empty(*x.shape[:-1], len(weight))


class _Kept:
    """The storages that a forward keeps for its backward."""

    def __init__(self):
        self.storages: dict[int, torch.UntypedStorage] = {}  # they stay alive, so that no number comes twice

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        self.storages[storage._cdata] = storage
        return tensor

    def hooks(self):
        return torch.autograd.graph.saved_tensors_hooks(self.add, lambda tensor: tensor)

    def bytes_without(self, *others: "_Kept") -> int:
        seen = {key for other in others for key in other.storages}
        return sum(storage.nbytes() for key, storage in self.storages.items() if key not in seen)


def kept_for_backward(
    student: nn.Module,
    transformer: nn.Module | None,
    shape: tuple[int, ...],
    conditioning: Conditioning,
    autocast: torch.dtype | None = None,
) -> tuple[int, int | None]:
    """Bytes that a forward of one sample keeps for its backward, without and with gradient checkpointing.

    student: on the meta device; transformer: the one under its adapter, or its own, whose blocks a checkpointed run
    computes again, one at a time; None where nothing can be. conditioning: of one sample. autocast: the dtype of
    products; copies of the parameters in it are not counted.
    """
    fixed, outside, inputs, blocks = _Kept(), _Kept(), _Kept(), []
    for network in filter(None, (student, transformer)):
        for tensor in (*network.parameters(), *network.buffers()):
            for part in stored(tensor):
                fixed.add(part)

    def block(module, *args):
        inside = _Kept()
        for value in tree_flatten(args)[0]:
            if isinstance(value, torch.Tensor):
                inputs.add(value)
        with inside.hooks():
            result = module(*args)
        blocks.append(inside)
        return result

    if transformer is not None:
        transformer.enable_gradient_checkpointing(block)
    adapter = hasattr(student, "layer")
    if adapter:
        student.layer = lambda name, x, weight, *_: _adapted(student, name, x, weight)
    # Some families read lengths and masks on the host, others want them where the rest is.
    for place in ("meta", "cpu"):
        try:
            with _AsOnDevice(autocast) as device, outside.hooks():
                _forward(student, shape, conditioning, place)
            break
        except RuntimeError:
            if place == "cpu":
                raise
            outside, inputs, blocks = _Kept(), _Kept(), []
    if transformer is not None:
        transformer.disable_gradient_checkpointing()
    if adapter:
        del student.layer
    for cast in device.casts.values():
        fixed.add(cast)
    everything = _Kept()
    for part in (outside, *blocks):
        everything.storages |= part.storages
    plain = everything.bytes_without(fixed)
    if transformer is None:
        return plain, None
    kept = _Kept()
    kept.storages = outside.storages | inputs.storages
    return plain, kept.bytes_without(fixed) + max((b.bytes_without(fixed, kept) for b in blocks), default=0)


@torch.no_grad()
def operations(student: nn.Module, shape: tuple[int, ...], conditioning: Conditioning) -> int:
    """Floating-point operations of a forward of one sample; a multiplication and its addition are two.

    student: on the meta device; conditioning: of one sample.
    """
    adapter = hasattr(student, "layer")
    if adapter:
        student.layer = lambda name, x, weight, *_: _plain_adapted(student, name, x, weight)
    try:
        for place in ("meta", "cpu"):  # as for kept_for_backward
            with FlopCounterMode(display=False) as counter:
                try:
                    _forward(student, shape, conditioning, place)
                    return counter.get_total_flops()
                except RuntimeError:
                    if place == "cpu":
                        raise
    finally:
        if adapter:
            del student.layer


def _plain_adapted(student: nn.Module, name: str, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    a, b = student.factors_of(name)
    base = x.new_empty(weight.shape)  # whatever a weight of 8 bits is
    return F.linear(x, base) + F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))


def _forward(student: nn.Module, shape, conditioning: Conditioning, place: str) -> torch.Tensor:
    def move(value: torch.Tensor) -> torch.Tensor:
        return value.to("meta" if value.is_floating_point() else place)

    prompt = tree_map(move, conditioning.prompt)
    source = None if conditioning.source is None else tree_map(move, conditioning.source)
    latents, sigma = torch.empty(1, *shape, device="meta"), torch.empty(1, device="meta")
    return student(latents, sigma, Conditioning(prompt, source, conditioning.has_source))


def _adapted(student: nn.Module, name: str, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return _Adapted.apply(x, weight, *student.factors_of(name))


def _bytes_of(conditioning: Conditioning) -> int:
    return sum(tensor.nbytes for tensor in tree_flatten((conditioning.prompt, conditioning.source))[0]
               if isinstance(tensor, torch.Tensor))  # fmt: skip


def _check_folder(folder: Path) -> None:
    """The nearest folder that is there can be written; nothing is made."""
    folder = folder.absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"cannot write to {there}; choose another output_dir")
