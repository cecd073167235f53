"""The sections of a configuration, as typed values."""

from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import FiniteFloat, NonNegativeInt, PositiveInt

from danceopd.config.methods import options
from danceopd.config.operators import Autoguided, BySigma, Compose, Difference, Guided, Slider, TeacherAt
from danceopd.config.section import NonNegativeFinite, PositiveFinite, Samples, Section, Seed, Steps
from danceopd.core.methods import METHODS
from danceopd.core.query import QUERIES
from danceopd.core.routing import ROUTES
from danceopd.core.solver import SOLVERS
from danceopd.support.hub import located
from danceopd.support.optimizers import OPTIMIZERS
from danceopd.support.trackers import TRACKERS

ModelPath = Annotated[Path, pydantic.AfterValidator(located)]  # of a model or LoRA, a name that ships, or a hub's id


class NewLora(Section):
    """A student's adapter: alpha / rank * B A is added beside each target layer.

    Attributes:
        rank: Number of rows of A.
        alpha: Each layer's own rank if not given.
        targets: Ends of the layers' names, in which * stands for anything; or the layers of attention, also of
            feed-forwards, or every linear one; those of the model's family if not given.
        rank_pattern: Ranks of some layers, by ends of their names as regular expressions, as PEFT has it.
        alpha_pattern: Alphas of some layers, in the same way.
        init: How A is drawn, as PEFT has it: "uniform" by the layer's width, or "gaussian" by the rank; B is zero.
    """

    rank: PositiveInt = 128
    alpha: PositiveFinite | None = None
    targets: Literal["attention", "attention+ffn", "all-linear"] | list[str] | None = None
    rank_pattern: dict[str, PositiveInt] = pydantic.Field({})
    alpha_pattern: dict[str, PositiveFinite] = pydantic.Field({})
    init: Literal["uniform", "gaussian"] = "uniform"


class Student(Section):
    """What is trained, and from where it begins.

    Attributes:
        init_from: "merge", the mean of all sources, of a LoRA of all that change the base (of networks: guidance is no
            part of either); or the name of an embedded network, or a .safetensors file. With a `model`: "merge";
            "base", its transformer; or the name of a source.
        lora: Trains an adapter of a `model`'s transformer; all its weights if not given.
        embedded_guidance: The number that a guidance-distilled `model` takes as an input (FLUX.1 dev and Kontext 3.5,
            FLUX.2 dev 4), at which the student is trained and then drawn with.
    """

    init_from: str = "base"
    lora: NewLora | None = None
    embedded_guidance: FiniteFloat | None = None


class LoraFile(Section):
    """A LoRA, DoRA, LoKr or LoHa in any layout that docs/loras.md names.

    Attributes:
        path: A file, or a folder with one.
        scale: What the change of the weights is multiplied by.
        rank: The change is cut to this rank by SVD, and the run says how much that leaves out; taken whole if not
            given.
    """

    path: ModelPath
    scale: FiniteFloat = 1.0
    rank: PositiveInt | None = None


OPERATORS = ("guided", "autoguided", "difference", "compose", "slider", "mean", "by_sigma", "teacher_at")


class Source(Section):
    """A frozen velocity field that supervises the student: the paper's teacher.

    It is a network, or one operator over other sources (docs/operators.md).

    Attributes:
        weights: As a student's init_from. With a `model`: "base" (also if not given), a transformer's or a pipeline's
            folder, or a transformer in one .safetensors file, under diffusers' names or in a layout that it converts.
        lora: Adapters on its transformer, summed.
        guidance_scale: 1 asks the conditional field; any other makes guidance part of the field. Pipelines of Z-Image
            and Krea 2 count their guidance from 0: their g is the guidance_scale 1 + g.
        embedded_guidance: As a student's, the number that this source is asked with.
        guided, autoguided, difference, compose, slider, by_sigma, teacher_at: The operators.
        mean: The sources whose mean it is.
    """

    weights: str | None = None
    lora: list[LoraFile] = pydantic.Field([])
    guidance_scale: FiniteFloat = 1.0
    embedded_guidance: FiniteFloat | None = None
    guided: Guided | None = None
    autoguided: Autoguided | None = None
    difference: Difference | None = None
    compose: Compose | None = None
    slider: Slider | None = None
    mean: Annotated[list[str], pydantic.Field(min_length=2)] | None = None
    by_sigma: BySigma | None = None
    teacher_at: TeacherAt | None = None

    def operator(self) -> str | None:
        """Returns the name of its operator; None where it is a network."""
        return next((key for key in OPERATORS if getattr(self, key) is not None), None)


class Data(Section):
    """The samples of a capability: exactly one of `world` and `manifest`; with a `model`, `prepared`.

    Attributes:
        world: Pictures of the picture world, `size` of them drawn from `seed`.
        manifest: A user's own file; its picture paths start from `root`, or from its folder.
        prepared: The rows that `danceopd data prepare` wrote.
    """

    world: Literal["t2i", "style", "edit", "local", "global"] | None = None
    size: PositiveInt = 20000
    seed: Seed = 1
    manifest: Path | None = None
    prepared: Path | None = None
    root: Path | None = None


class Capability(Section):
    """One route: `source` supervises the samples of `data`, drawn with probability `weight` / sum of weights.

    Attributes:
        source: A key of `sources`.
        task: "edit" where every sample has a source picture, "t2i" where none has.
        data: The samples.
        capability: The name in the manifest, if it differs from the key here.
        weight: 0 draws no sample.
        student_guidance_scale: The student's own scale for these samples.
        prompt_dropout: The share of prompts left empty, so that guidance can be used on the student.
    """

    source: str
    task: Literal["t2i", "edit"]
    data: Data
    capability: str | None = None
    weight: NonNegativeFinite = 1.0
    student_guidance_scale: FiniteFloat = 1.0
    prompt_dropout: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.0


class Rollout(Section):
    """How the student rolls out its trajectories.

    Attributes:
        num_inference_steps: Solver steps of a whole trajectory.
        shift: Moves the noise levels towards noise. A `model` rolls out on those of its scheduler; there it moves only
            the levels at which joint, off_policy and danceopd_fast noise the data's pictures.
        solver: How a step is taken: euler and ab2 (Adams-Bashforth) evaluate once, heun twice.
    """

    num_inference_steps: Steps = 16
    shift: PositiveFinite = 5.0
    solver: Literal[*SOLVERS] = "euler"


class Query(Section):
    """Which states of a trajectory are asked.

    Attributes:
        bias: Where along the trajectory: low_t is near the data, high_t near the noise.
        k: How many states of each sample.
    """

    bias: Literal[*QUERIES] = "low_t"
    k: PositiveInt = 1


class Training(Section):
    """How long, how fast and on what it trains, and what it writes.

    Attributes:
        output_dir: The run's folder.
        seed: All that is drawn at random follows from it.
        max_steps: Number of updates.
        max_network_evaluations: Ends a run before max_steps: forwards of one sample by any network, a backward counted
            as two.
        batch_size: Samples of one update, of all ranks together. They are rolled out and the sources asked at once,
            without gradient.
        gradient_accumulation_steps: Micro-batches in which the student is matched.
        rollout_batch_size: Rows of a forward without gradient; auto is the whole local batch where it fits, and either
            is halved, with a warning, when memory runs out.
        optimizer: adamw_8bit needs the extra 8bit; muon takes matrices, AdamW the rest, in one process.
        learning_rate: After the warm-up.
        warmup_steps: Updates in which it rises.
        lr_schedule: What it does then.
        weight_decay: AdamW takes off this share of each weight, times the rate.
        max_grad_norm: A larger gradient is scaled down to it.
        ema_decay: What the average of the weights keeps of itself at an update; the average is what a run writes, draws
            and scores. After n updates it keeps at most (1 + n) / (10 + n), so that a short run is not averaged with
            where it began.
        precision: The dtype that the student multiplies in.
        rollout_precision: Rollouts ask a copy of the student in it, filled after each update; fp8 as in
            base_precision. If not given they ask the student itself, or with ZeRO-3 a replica in its own precision. An
            adapter's base in FP8 is the one that sources share where base_precision is fp8 too, else a copy.
        gradient_checkpointing: With a `model`, the backward computes each block again instead of keeping it.
        base_precision: The frozen linear weights in a `model`'s blocks have it, those of sources too; adapters stay as
            they are, and nf4 has 4 bits. With fp8 a token's input is rounded too where the device multiplies FP8; the
            embedded network's sources can have it as well. auto leaves them as they are where that fits the card by
            the dry run's estimate, and else takes fp8 where the card multiplies it (int8 on older ones), then nf4; a
            run that goes on keeps what it began with.
        offload_sources: With a `model`, sources with weights of their own wait in host memory, and a forward brings
            their blocks to the device one after another, the next while one computes; without effect on a CPU.
        swap_blocks: With a `model` and student.lora, so many blocks of the transformer that the adapters share wait in
            host memory, evenly spread; each is brought ahead of its use, so that two of them are on the device at a
            time. auto is as few as let the run fit the card by the dry run's estimate.
        rollout_on: With DeepSpeed, ZeRO-3's rollouts ask a replica of the student that is gathered once an update, or
            its shards, which every forward gathers. auto looks at the memory that is free.
        shard_sources: With DeepSpeed, sources with weights of their own lie on all ranks in shards, or on each of them
            whole. auto looks at the memory that is free.
        cuda_graphs: Rollouts, sources' queries and, in one process without DeepSpeed, the student's forward and
            backward take static steps, on CUDA as captured graphs; auto does on CUDA alone.
        compile: torch.compile of each block of the network that rollouts ask.
        attention_backend: With a `model`, by diffusers' name of it, or auto (models.attention).
        device: auto is a card where there is one.
        log_every: Updates between two lines of the log.
        trackers: Where the log's numbers go too: wandb or trackio, or both; they need the extra trackers.
        save_every: Updates between two checkpoints.
        keep_checkpoints: How many of the newest stay.
        sample_every: Updates between two grids of pictures; 0 draws none.
        max_nonfinite_steps: A run ends after so many updates in a row whose loss or gradient is not finite.
        profile_steps: Updates, from the second on, of which torch's profiler writes a trace into the run's folder
            `profile`.
    """

    output_dir: Path
    seed: Seed = 0
    max_steps: PositiveInt = 1000
    max_network_evaluations: PositiveInt | None = None
    batch_size: Samples = 64
    gradient_accumulation_steps: PositiveInt = 1
    rollout_batch_size: Literal["auto"] | PositiveInt = "auto"
    optimizer: Literal[*OPTIMIZERS] = "adamw"
    learning_rate: PositiveFinite = 5e-4
    warmup_steps: NonNegativeInt = 20
    lr_schedule: Literal["constant", "cosine"] = "constant"
    weight_decay: NonNegativeFinite = 0.0
    max_grad_norm: PositiveFinite = 1.0
    ema_decay: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.99
    precision: Literal["fp32", "bf16"] = "fp32"
    rollout_precision: Literal["bf16", "fp8"] | None = None
    gradient_checkpointing: bool = False
    base_precision: Literal["auto", "int8", "fp8", "nf4"] | None = None
    offload_sources: bool = False
    swap_blocks: Literal["auto"] | PositiveInt | None = None
    rollout_on: Literal["auto", "replica", "shards"] = "auto"
    shard_sources: Literal["auto"] | bool = "auto"
    cuda_graphs: Literal["auto"] | bool = "auto"
    compile: bool = False
    attention_backend: str = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    log_every: PositiveInt = 5
    trackers: list[Literal[*TRACKERS]] = pydantic.Field([])
    save_every: PositiveInt = 100
    keep_checkpoints: PositiveInt = 2
    sample_every: NonNegativeInt = 200
    max_nonfinite_steps: PositiveInt = 10
    profile_steps: NonNegativeInt = 0


class Evaluation(Section):
    """How the student is scored: pictures per GenEval task and per edit kind, drawn with the rollout's shift.

    Attributes:
        seed: Prompts, placements and noise follow from it.
        per_task, per_kind: Number of pictures.
        batch_size: Pictures drawn at a time.
        times: How often the student is scored during the run, evenly spread, by `quick` pictures of each.
        num_inference_steps, solver: How pictures are drawn.
    """

    seed: Seed = 1234
    per_task: PositiveInt = 100
    per_kind: PositiveInt = 100
    batch_size: Samples = 128
    times: NonNegativeInt = 0
    quick: PositiveInt = 30
    num_inference_steps: Steps = 16
    solver: Literal[*SOLVERS] = "euler"


class Config(Section):
    """A whole run.

    Attributes:
        model: The folder of a diffusers pipeline whose transformer is distilled; the embedded network if not given.
        allow_distilled_base: Goes on without a warning where the `model`, or a source, was distilled to a few steps.
        method: How an update's questions are made and matched; danceopd is the paper's.
        options: The method's own options.
        route: How a sample's capability is chosen: drawn with the weights, in turn, or by weight and velocity error; or
            one capability is drawn for all samples of an update.
        student, sources, capabilities, rollout, query, training, evaluation: The sections.
    """

    model: ModelPath | None = None
    allow_distilled_base: bool = False
    method: Literal[*METHODS] = "danceopd"
    options: dict[str, Any] = pydantic.Field({})
    route: Literal[*ROUTES] = "random"
    student: Student = Student()
    sources: dict[str, Source] = pydantic.Field(min_length=1)
    capabilities: dict[str, Capability] = pydantic.Field(min_length=1)
    rollout: Rollout = Rollout()
    query: Query = Query()
    training: Training
    evaluation: Evaluation = Evaluation()

    def to_dict(self) -> dict:
        """Returns plain values, as YAML or JSON take them."""
        return self.model_dump(mode="json")

    def networks(self) -> dict[str, Source]:
        """Returns the sources that are networks."""
        return {name: source for name, source in self.sources.items() if not source.operator()}

    def method_options(self) -> dict:
        """Returns the method's options by keyword, defaults and all."""
        return options(self.method)(**self.options).model_dump()
