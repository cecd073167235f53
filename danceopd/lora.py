"""LoRA files as teachers: read in any layout that diffusers converts, merged, or many on one frozen transformer."""

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from danceopd_kernels import pack_adapters, routed_lora_linear
from danceopd_kernels.lora import Adapters, frozen_linear
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils.checkpoint import checkpoint

from danceopd.conditioning import Conditioning
from danceopd.eight_bit import as_multiplied
from danceopd.errors import UserError
from danceopd.fields import Field, by_sources
from danceopd.fp8 import Fp8Linear, fp8_layers, numbers

Lora = dict[str, tuple[torch.Tensor, torch.Tensor, float]]  # by module: A [rank, in], B [out, rank], scale

FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")  # of PEFT and of diffusers
FACTOR = re.compile(r"(.+?)\.(?:lora_(A|B|down|up)|lora\.(down|up))(?:\.default)?\.weight")
# Their initialisation changes the base, so that the file alone does not say what was trained.
CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga")


# ------------------------------------------------------------------------------------------------- reading


@torch.inference_mode(False)  # reading asks for gradients
def load_lora(
    path: str | Path, transformer: nn.Module, pipeline_class: type, scale: float = 1.0, header_only: bool = False
) -> Lora:
    """A LoRA by module of the transformer, in float32, its scale alpha / rank times `scale`.

    path: a PEFT folder, or a safetensors file (or the folder of one) in any layout that the pipeline class converts
    by its lora_state_dict: diffusers', kohya's, ComfyUI's, ai-toolkit's. header_only: the factors on the meta device
    and no tensor read, with scales that say nothing. Raises UserError for files that are missing or corrupt, for a
    layout the class cannot convert, and for every key that is no factor of a linear layer of the transformer: nothing
    in a file is left out. With header_only it raises RuntimeError where the conversion depends on values.
    """
    file = _find(Path(path))
    raw, config = _read(file, header_only)
    raw = _fold_alphas(file, raw, config)
    if any(_module(key, transformer) is None for key in raw):
        raw = _convert(file, raw, pipeline_class)
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in raw.items():
        if not key.endswith(".alpha"):  # folded in
            name, side = _module(key, transformer) or (None, None)
            if name is None:
                unknown = [k for k in raw if not k.endswith(".alpha") and _module(k, transformer) is None]
                raise _unknown(file, unknown, type(transformer).__name__)
            pairs.setdefault(name, {})[side] = value
    lora = {}
    for name, pair in pairs.items():
        if len(pair) != 2:
            raise UserError(f"{file}: {name} has only one of its two factors; the file is incomplete")
        a, b = pair["A"], pair["B"]
        out, width = transformer.get_submodule(name).weight.shape
        if a.dim() != 2 or b.dim() != 2 or len(a) != b.shape[1] or a.shape[1] != width or len(b) != out:
            raise UserError(
                f"{file}: {name} is {width} -> {out} in {type(transformer).__name__}, the LoRA's factors are "
                f"{list(a.shape)} and {list(b.shape)}; it was trained for another model"
            )
        lora[name] = (a, b, scale * _configured_scale(file, config, name, len(a)))
    return lora


def lora_parameters(path: str | Path, transformer: nn.Module, pipeline_class: type) -> tuple[int, bool]:
    """(parameters of a LoRA, whether its keys were checked), by its file's header alone.

    Unchecked is a layout whose conversion depends on values: the count is the file's. Raises UserError as load_lora.
    """
    try:
        lora = load_lora(path, transformer, pipeline_class, header_only=True)
    except RuntimeError:
        raw, _ = _read(_find(Path(path)), header_only=True)
        return sum(value.numel() for key, value in raw.items() if not key.endswith(".alpha")), False
    return sum(a.numel() + b.numel() for a, b, _ in lora.values()), True


def combine(loras: Sequence[Lora]) -> Lora:
    """Several LoRAs as one, their exact sum: ranks add up, the scales are folded into B where modules are shared."""
    result = {}
    for name in dict.fromkeys(name for lora in loras for name in lora):
        parts = [lora[name] for lora in loras if name in lora]
        if len(parts) == 1:
            result[name] = parts[0]
        else:
            b = torch.cat([b.float() * scale for _, b, scale in parts], dim=1)
            result[name] = (torch.cat([a.float() for a, _, _ in parts]), b, 1.0)
    return result


def average(loras: Sequence[Lora]) -> Lora:
    """The plain mean of what the LoRAs add, exactly: of the sum of their ranks."""
    return combine([{name: (a, b, scale / len(loras)) for name, (a, b, scale) in lora.items()} for lora in loras])


def _find(path: Path) -> Path:
    """The safetensors file that path is or holds."""
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UserError(f"{path}: a LoRA must be a safetensors file; files of other kinds may run code when read")
        return path
    if not path.is_dir():
        raise UserError(f"{path}: no LoRA there, neither a safetensors file nor a folder with one")
    files = sorted(path.glob("*.safetensors"))
    files = [f for f in files if f.name in FILES] or files
    if len(files) != 1:
        found = ", ".join(f.name for f in files) or "none"
        raise UserError(f"{path}: a LoRA folder holds one safetensors file, found {found}; name the file itself")
    return files[0]


def _read(file: Path, header_only: bool) -> tuple[dict[str, torch.Tensor], dict | None]:
    """(tensors in float32, PEFT's configuration by its own names or None)."""
    try:
        with safe_open(file, framework="pt") as opened:
            read = partial(_described, opened) if header_only else opened.get_tensor
            raw = {key: read(key) for key in opened.keys()}  # noqa: SIM118
            config = (opened.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: cannot be read as safetensors, copy it again: {error}") from error
    if not raw:
        raise UserError(f"{file}: holds no tensors")
    beside = file.with_name("adapter_config.json")
    try:
        if file.name == FILES[0]:
            config = beside.read_text()
        config = json.loads(config) if config else None
    except FileNotFoundError:
        raise UserError(f"{file.parent}: no adapter_config.json beside {file.name}; it holds the scale") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: its configuration cannot be read as JSON: {error}") from error
    if config is not None and any(key.startswith("transformer.") for key in config):
        config = {k.removeprefix("transformer."): v for k, v in config.items() if k.startswith("transformer.")}
    if config is not None and config.get("peft_type", "LORA") != "LORA":
        raise UserError(f"{file}: its kind is {config['peft_type']}; only LORA is taken")
    if config is not None and str(config.get("init_lora_weights")).startswith(CHANGES_BASE):
        raise UserError(
            f"{file}: trained with init_lora_weights={config['init_lora_weights']}, which changes the base model; "
            "convert it into a plain LoRA with PEFT (path_initial_model_for_weight_conversion)"
        )
    quantized = [key for key, value in raw.items() if not (value.is_floating_point() or key.endswith(".alpha"))]
    if quantized:
        raise UserError(f"{file}: {_first(quantized)}: not floating point; only LoRAs that are not quantized are taken")
    return {key: value.float() for key, value in raw.items()}, config


def _described(opened, key: str) -> torch.Tensor:
    """A tensor of the shape that a file's header gives; an alpha, whose value nothing depends on, is 1."""
    entry = opened.get_slice(key)
    if key.endswith(".alpha"):
        return torch.ones(entry.get_shape())
    dtype = torch.float32 if entry.get_dtype().startswith(("F", "BF")) else torch.uint8
    return torch.empty(entry.get_shape(), dtype=dtype, device="meta")


def _fold_alphas(file: Path, raw: dict[str, torch.Tensor], config: dict | None) -> dict[str, torch.Tensor]:
    """Multiply every A by its alpha / rank; the alphas stay as the rank, since some converters want them.

    Converters do the same for most alphas, but not for all.
    """
    result, downs = dict(raw), {}
    for key in raw:
        match = FACTOR.fullmatch(key)
        if match and (match[2] or match[3]) in ("A", "down"):
            downs[match[1]] = key
    alphas = [key for key in raw if key.endswith(".alpha")]
    alone = [key for key in alphas if key.removesuffix(".alpha") not in downs or raw[key].numel() != 1]
    if alone:
        raise UserError(f"{file}: {_first(alone)}: no number beside a pair of LoRA factors; the file is incomplete")
    if alphas and config is not None:
        raise UserError(f"{file}: has alphas ({_first(alphas)}) and a PEFT configuration too; remove one of them")
    for key in alphas:
        down = downs[key.removesuffix(".alpha")]
        rank = len(raw[down])
        result[down] = raw[down] * (raw[key].item() / rank)
        result[key] = torch.tensor(float(rank))
    return result


def _convert(file: Path, raw: dict[str, torch.Tensor], pipeline_class: type) -> dict[str, torch.Tensor]:
    """Diffusers' conversion; a UserError for what it leaves out, found by the gradient that does not come back."""
    with torch.enable_grad():
        leaves = {key: value.detach().requires_grad_() for key, value in raw.items() if not key.endswith(".alpha")}
        # Copies, since some converters multiply in place.
        copies = {key: leaves[key].clone() if key in leaves else value for key, value in raw.items()}
        try:
            converted = pipeline_class.lora_state_dict(copies)
        except Exception as error:  # of any kind: the converters assume what they expect
            if "meta tensor" in str(error):  # read by its header alone, and the converter asks for values
                raise
            raise UserError(
                f"{file}: diffusers cannot convert this LoRA for {pipeline_class.__name__}: "
                f"{str(error).strip()[:400]}; check that it was trained for this model"
            ) from error
        kept = [value.sum() for value in converted.values() if value.requires_grad]
        gradients = torch.autograd.grad(sum(kept), leaves.values(), allow_unused=True) if kept else [None] * len(leaves)
    lost = [key for (key, leaf), grad in zip(leaves.items(), gradients, strict=True) if grad is None and leaf.any()]
    if lost:
        raise _unknown(file, lost, pipeline_class.__name__)
    return {key: value.detach() for key, value in converted.items()}


def _module(key: str, transformer: nn.Module) -> tuple[str, str] | None:
    """(linear layer, "A" or "B") of a key as diffusers and PEFT name them; alphas by their layer, others None."""
    name = next(iter(convert_unet_state_dict_to_peft({key: None})))  # diffusers' own older names
    if name.endswith(".alpha"):
        name, side = name.removesuffix(".alpha"), "alpha"
    elif match := FACTOR.fullmatch(name):
        name, side = match[1], "A" if (match[2] or match[3]) in ("A", "down") else "B"
    else:
        return None
    name = name.removeprefix("base_model.model.").removeprefix("transformer.")
    try:
        return (name, side) if isinstance(transformer.get_submodule(name), nn.Linear) else None
    except AttributeError:
        return None


def _configured_scale(file: Path, config: dict | None, name: str, rank: int) -> float:
    """alpha / rank, or its root, as PEFT works it out for a module; 1 without a configuration."""
    if config is None:
        return 1.0
    patterns, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    expected = patterns.get(get_pattern_key(patterns, name), config.get("r", 8))
    if expected != rank:
        raise UserError(f"{file}: the configuration gives {name} rank {expected}, its factors have {rank}")
    alpha = alphas.get(get_pattern_key(alphas, name), config.get("lora_alpha", 8))
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def _first(keys: Sequence[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def _unknown(file: Path, keys: Sequence[str], name: str) -> UserError:
    return UserError(
        f"{file}: cannot take all of this LoRA: {_first(keys)} would be left out, being no LoRA factors of linear "
        f"layers of {name}'s transformer. Check that it was trained for this model; train it without text encoders, "
        "biases, norms and DoRA, or remove these keys from the file"
    )


# ------------------------------------------------------------------------------------------------- merging


def merged(transformer: nn.Module, lora: Lora) -> nn.Module:
    """A copy of the transformer whose weights are W + scale B A."""
    return merge_into(deepcopy(transformer), lora)


@torch.no_grad()
def merge_into(transformer: nn.Module, lora: Lora) -> nn.Module:
    """Add scale B A to the transformer's own weights, in float32, one layer at a time; returns the transformer."""
    for name, (a, b, scale) in lora.items():
        weight = transformer.get_submodule(name).weight
        weight.copy_(added(weight, a, b, scale))
    return transformer


def added(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """A weight + scale b a, summed in float32, in the weight's dtype."""
    change = scale * (b.to(weight.device).float() @ a.to(weight.device).float())
    return (weight.float() + change).to(weight.dtype)


# ------------------------------------------------------------------------------------------------- sharing


class _Route:
    """Which adapter the rows of the forward now running ask; None: the base alone."""

    def __init__(self, stacked: int):
        self.stacked = stacked
        self.adapter: torch.Tensor | None = None  # [B] int64, or [1] for all rows
        self.same = False
        self.student: LoraStudent | None = None  # whose adapter all rows ask instead

    @contextmanager
    def of(self, adapter: torch.Tensor | None, same: bool, student: "LoraStudent | None" = None) -> Iterator[None]:
        self.adapter, self.same, self.student = adapter, same, student
        try:
            yield
        finally:
            self.adapter = self.student = None

    def again(self) -> tuple:
        """Contexts of a block's forward and of its recomputation in the backward, when this forward is long over."""
        return nullcontext(), self.of(self.adapter, self.same, self.student)


class _RoutedLinear(nn.Linear):
    """The parameters of a Linear and the adapters of all teachers; the forward takes its samples' from the route."""

    def __init__(self, name: str, linear: nn.Linear, adapters: Sequence[tuple], route: _Route):
        nn.Module.__init__(self)  # without new parameters
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.name, self.route, fp8 = name, route, isinstance(linear, Fp8Linear)
        self.dtype = linear.dtype if fp8 else linear.weight.dtype
        self.modulates = fp8 and linear.modulates
        self.register_buffer("weight_scale", linear.weight_scale if fp8 else None)
        self.register_buffer("lora_a", None, persistent=False)  # so it stays in a layer that only the student changes
        if any(len(a) for a, _, _ in adapters):
            packed = pack_adapters([(a, b) for a, b, _ in adapters])
            self.register_buffer("lora_a", packed.a, persistent=False)
            self.register_buffer("lora_b", packed.b, persistent=False)
            self.first, self.rank = tuple(packed.first.tolist()), packed.rank
            self.scale = tuple(scale for _, _, scale in adapters)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not x.numel():
            return x.new_empty(*x.shape[:-1], self.out_features)
        weight, weight_scale = as_multiplied(self.weight), self.weight_scale
        if self.modulates:  # its input stays as it is
            weight, weight_scale = numbers(weight, weight_scale, self.dtype), None
        if self.route.student is not None:
            return self.route.student.layer(self.name, x.to(self.dtype), weight, self.bias, weight_scale)
        adapter = self.route.adapter
        if adapter is None or self.lora_a is None:
            return frozen_linear(x, weight, self.bias, weight_scale)
        if self.route.same:
            rows = x.reshape(1, -1, x.shape[-1])  # whatever its axes mean
        else:
            copies, rest = divmod(len(x), len(adapter))
            if x.dim() < 2 or rest or copies not in (1, self.route.stacked):
                raise ValueError(
                    f"{self.name}: the first axis of its input {list(x.shape)} is not the batch of {len(adapter)}, so "
                    "its rows cannot be routed; ask each teacher alone (field), or leave this layer out of the LoRAs"
                )
            adapter = adapter if copies == 1 else adapter.repeat(copies)
            rows = x.reshape(len(x), -1, x.shape[-1])
        first = _constant(self.first, torch.int64, x.device)
        scale = _constant(self.scale, torch.float32, x.device)
        adapters = Adapters(self.lora_a, self.lora_b, first, scale, self.rank)
        out = routed_lora_linear(rows.to(self.dtype), weight, self.bias, adapters, adapter, weight_scale=weight_scale)
        return out.reshape(*x.shape[:-1], self.out_features)


class SharedBase:
    """LoRA teachers on one frozen transformer: shared(latents, sigma, conditioning, adapter) -> velocity.

    One forward serves a batch whose samples ask different teachers. The transformer is changed in place: it is frozen,
    and its layers that a LoRA targets, which keep their parameters, get the adapters of all teachers beside them, in
    the weight's dtype. velocity: the backbone's; layers: more of them, for a LoraStudent. Raises UserError for a LoRA
    of another transformer.
    """

    def __init__(
        self,
        transformer: nn.Module,
        loras: Sequence[Lora],
        velocity: Callable[..., torch.Tensor],
        layers: Sequence[str] = (),
    ):
        if any(isinstance(module, _RoutedLinear) for module in transformer.modules()):
            raise ValueError("the transformer is shared already; give all its LoRAs at once")
        self.transformer, self.count, self._velocity = transformer.requires_grad_(False), len(loras), velocity
        # With zero_cond_t, Qwen-Image's modulation sees the times of the batch and then as many zeros: 2 B rows.
        self._route = _Route(2 if getattr(getattr(transformer, "config", None), "zero_cond_t", False) else 1)
        for name in dict.fromkeys([*(name for lora in loras for name in lora), *layers]):
            try:
                linear = transformer.get_submodule(name)
            except AttributeError:
                raise UserError(f"{type(transformer).__name__} has no layer {name}, which a LoRA changes") from None
            dtype = linear.dtype if isinstance(linear, Fp8Linear) else linear.weight.dtype
            like = {"dtype": dtype, "device": linear.weight.device}
            # of rank 0 where a teacher leaves the layer as it is
            none = (torch.zeros(0, linear.in_features), torch.zeros(linear.out_features, 0), 1.0)
            parts = [lora.get(name, none) for lora in loras]
            adapters = [(a.to(**like), b.to(**like), scale) for a, b, scale in parts]
            transformer.set_submodule(name, _RoutedLinear(name, linear, adapters, self._route))

    def enable_gradient_checkpointing(self) -> None:
        """A backward computes each block again instead of keeping what the forward had inside it."""

        def run(block, *args):
            return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False, context_fn=self._route.again)

        self.transformer.enable_gradient_checkpointing(run)

    def in_fp8(self) -> "SharedBase":
        """A copy with the blocks' linear layers in FP8, for students alone: all its other tensors are this one's."""
        tensors = (*self.transformer.parameters(), *self.transformer.buffers())
        copied = deepcopy(self, {id(t): t for t in tensors})
        for name, linear, modulates in fp8_layers(copied.transformer):
            narrow = Fp8Linear(linear, modulates)
            if isinstance(linear, _RoutedLinear):
                narrow = _RoutedLinear(name, narrow, [], copied._route)
            copied.transformer.set_submodule(name, narrow)
        copied.count = 0
        return copied

    def __call__(self, latents, sigma, conditioning: Conditioning, adapter: torch.Tensor) -> torch.Tensor:
        """latents [B, ...], sigma [B], adapter [B] int64: the teacher of each sample, -1 for the base alone.

        Where only some samples have source pictures, these and the others are two forwards. Raises ValueError for an
        adapter of another shape or dtype, on the CPU for one that is not there, and for a layer whose input's first
        axis is not the batch.
        """
        if adapter.shape != (len(latents),) or adapter.dtype != torch.int64:
            raise ValueError(f"adapter must be int64 [{len(latents)}], got {adapter.dtype} {list(adapter.shape)}")
        self._check(adapter)
        return self._ask(latents, sigma, conditioning, adapter.to(latents.device), same=False)

    def field(self, m: int) -> Field:
        """Teacher m alone, -1 for the base, as a field (latents, sigma, conditioning) -> velocity."""
        self._check(torch.tensor([m]))

        def velocity(latents, sigma, conditioning):
            adapter = _constant((m,), torch.int64, latents.device)
            return self._ask(latents, sigma, conditioning, adapter, same=True)

        return velocity

    def _check(self, adapter: torch.Tensor) -> None:
        if adapter.device.type == "cpu" and len(adapter) and not -1 <= adapter.min() <= adapter.max() < self.count:
            raise ValueError(f"adapter must name one of {self.count} teachers, or -1 for the base, got {adapter}")

    def student(self, latents, sigma, conditioning: Conditioning, student: "LoraStudent") -> torch.Tensor:
        """The transformer with a student's adapter, differentiable in it."""
        return self._ask(latents, sigma, conditioning, None, same=True, student=student)

    def _ask(self, latents, sigma, conditioning, adapter, same, student=None):
        def ask(latents, sigma, conditioning, sources, rows):
            part = adapter if same or rows is None else adapter[rows]
            with self._route.of(part, same, student):
                return self._velocity(
                    self.transformer, latents, sigma, conditioning.prompt, sources, conditioning.embedded_guidance
                )

        return by_sources(ask, latents, sigma, conditioning)


class _Factors(nn.Module):
    """One layer's part of a student's adapter: A [rank, in], B [out, rank], what they add times scale.

    A module with a forward of its own, so that its parameters are there while it runs where DeepSpeed shards them.
    """

    def __init__(self, a: torch.Tensor, b: torch.Tensor, scale: float):
        super().__init__()
        self.lora_A, self.lora_B, self.scale = nn.Parameter(a), nn.Parameter(b), scale

    def forward(self, x, weight, bias=None, weight_scale=None) -> torch.Tensor:
        first = _constant((0, len(self.lora_A)), torch.int64, x.device)
        scale = _constant((self.scale,), torch.float32, x.device)
        adapters = Adapters(self.lora_A, self.lora_B.mT, first, scale, len(self.lora_A))
        rows = x.reshape(1, -1, x.shape[-1])
        everyone = _constant((0,), torch.int64, x.device)
        out = routed_lora_linear(rows, weight, bias, adapters, everyone, weight_scale=weight_scale)
        return out.reshape(*x.shape[:-1], len(weight))


class LoraStudent(nn.Module):
    """A trainable adapter on a shared transformer: student(latents, sigma, conditioning) -> velocity.

    Its parameters are the adapter alone, in float32; a deep copy is another adapter on the same transformer. layers:
    as given to the SharedBase too. A is drawn as PEFT draws it and B is zero, so that it begins as the base; what it
    adds is scaled by alpha / rank. embedded_guidance: of all its samples, where the transformer takes one.
    """

    def __init__(
        self,
        shared: SharedBase,
        layers: Sequence[str],
        rank: int,
        alpha: float,
        generator: torch.Generator | None = None,
        embedded_guidance: float | None = None,
    ):
        super().__init__()
        self.embedded_guidance = embedded_guidance
        self._shared, self.rank, self.alpha = (shared,), rank, alpha  # in a tuple: no submodule, and no copy
        self.factors = nn.ModuleDict()
        for name in layers:
            linear = shared.transformer.get_submodule(name)
            bound = linear.in_features**-0.5
            a = (2 * torch.rand(rank, linear.in_features, generator=generator) - 1) * bound
            self.factors[_flat(name)] = _Factors(a, torch.zeros(linear.out_features, rank), alpha / rank)

    def __deepcopy__(self, memo) -> "LoraStudent":
        copied = LoraStudent(self._shared[0], [], self.rank, self.alpha, embedded_guidance=self.embedded_guidance)
        copied.factors = deepcopy(self.factors, memo)
        return copied

    def forward(self, latents: torch.Tensor, sigma: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        return self._shared[0].student(latents, sigma, conditioning.embedding(self.embedded_guidance), self)

    def on_fp8(self) -> None:
        """Go over to a copy of the transformer in FP8."""
        self._shared = (self._shared[0].in_fp8(),)

    @property
    def transformer(self) -> nn.Module:
        """The frozen transformer that the adapter is of."""
        return self._shared[0].transformer

    def layer(self, name: str, x, weight, bias=None, weight_scale=None) -> torch.Tensor:
        """One linear layer with its adapter, or without where the student has none there; as frozen_linear."""
        if _flat(name) not in self.factors:
            return frozen_linear(x, weight, bias, weight_scale)
        return self.factors[_flat(name)](x, weight, bias, weight_scale)

    def factors_of(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """A [rank, in] and B [out, rank] of a layer."""
        own = self.factors[_flat(name)]
        return own.lora_A, own.lora_B

    def lora(self) -> Lora:
        """The adapter by module, detached, on the CPU."""
        return {
            name.replace("/", "."): (own.lora_A.detach().cpu(), own.lora_B.detach().cpu(), own.scale)
            for name, own in self.factors.items()
        }


def target_layers(transformer: nn.Module, targets: Sequence[str], every: bool = True) -> list[str]:
    """The linear layers whose names end in one of targets, at a dot.

    Raises UserError for a target that none has, or if not `every` one must be found, where none has any.
    """
    linear = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    found = {target: [n for n in linear if n == target or n.endswith(f".{target}")] for target in targets}
    unmatched = [target for target, names in found.items() if not names]
    if unmatched and (every or len(unmatched) == len(targets)):
        ends = sorted({name.rsplit(".", 1)[-1] for name in linear})
        raise UserError(f"no linear layer ends in {', '.join(unmatched)}; there are {', '.join(ends)}")
    return [name for name in linear if any(name in names for names in found.values())]


def named_factors(lora: Lora, prefix: str = "") -> dict[str, torch.Tensor]:
    """An adapter's factors by PEFT's names. Scales are folded into B: a file needs no metadata to be read right."""
    tensors = {}
    for name, (a, b, scale) in lora.items():
        tensors[f"{prefix}{name}.lora_A.weight"] = a.contiguous()
        tensors[f"{prefix}{name}.lora_B.weight"] = (b * scale).contiguous()
    return tensors


def save_lora(lora: Lora, folder: Path, pipeline_class: type) -> Path:
    """Write an adapter as the pipeline's own save_lora_weights does, so that load_lora_weights takes it; atomically.

    Raises UserError where it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FILES[1]
    with TemporaryDirectory(dir=folder, prefix=".") as temporary:
        try:
            pipeline_class.save_lora_weights(
                temporary, transformer_lora_layers=named_factors(lora), safe_serialization=True
            )
        except SafetensorError as error:  # a full disk, which for safetensors is no OSError
            raise UserError(f"cannot write {path}: {error}; make room, or give another place") from error
        written = Path(temporary) / FILES[1]
        with open(written, "rb") as file:
            os.fsync(file.fileno())
        os.replace(written, path)
    return path


def _flat(name: str) -> str:
    return name.replace(".", "/")


@cache
def _constant(values: tuple, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A small tensor copied to a device once."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)
