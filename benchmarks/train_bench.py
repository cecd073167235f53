"""Training updates beside a plain loop with the published schedule, in turn in one run: how many times as fast.

    python benchmarks/train_bench.py                        # a small SD3.5, on a GPU if there is one
    python benchmarks/train_bench.py --size medium --batch-size 4 --micro-batch 4 1 --only-ratio --clock cpu
    python benchmarks/train_bench.py --world                # the picture world's network, as in configs/demo.yaml
    python benchmarks/train_bench.py --rounds 3 --json results.json

The SD3.5 is of the real classes with random weights; it, its text encoders, four LoRA teachers and a LoRA student are
saved into a temporary folder and loaded from there by both. The plain loop is diffusers and PEFT alone: one sample a
micro-step, its prompt encoded there, a rollout of all steps although one state is asked, each teacher a copy of the
network with its LoRA fused, gradient checkpointing, gradients accumulated to the same batch. (Published, all samples of
an update have one route, too; the cost is the same.) On the picture world it is the same loop over that network with
all its weights trained, its prompts' tokens and source pictures made in the loop; both use AdamW there.

Ours is the trainer's own update, with everything else that it does; `--micro-batch` says how many samples it matches at
a time. Both take the same rows, noise and queries and begin with the same weights, so that their losses must agree.
"ours, fast" rolls out half the steps by the two-step solver ab2, so that its states are others and its loss is too; the
second half of a run of danceopd_fast makes this very update with these settings.

Of the SD3.5, each idea is then switched off alone: time_over_ours is the update's time without it over the time with
it. All of them give the same loss. At the end one more update of each is split by phase, and another is counted in
calls of Python functions.
"""

import argparse
import copy
import json
import string
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import diffusers
import torch
import transformers
import yaml
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn.functional import mse_loss
from torch.utils.checkpoint import checkpoint
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import common
from benchmarks.networks import random_lora, small_sd3
from danceopd.config.reading import parse_config
from danceopd.core.batch import Batch
from danceopd.core.conditioning import Conditioning
from danceopd.core.phase import phase
from danceopd.core.query import query
from danceopd.core.questions import Questions, on_rollout
from danceopd.core.randomness import sample_generators
from danceopd.core.rollout import rollout
from danceopd.data.prepare import prepare
from danceopd.data.sampler import Samples, draw_batch
from danceopd.models.backbones import sd3
from danceopd.models.lora_algebra import merge_into
from danceopd.models.lora_files import load_lora, save_lora
from danceopd.models.shared_base import SharedBase
from danceopd.support.memory import keep_freed_memory
from danceopd.training.assembly.build import build_model
from danceopd.training.loop import BATCH, QUERY, Trainer
from danceopd.world.build import build
from danceopd.world.files import load_model, resolve_weights


@dataclass(frozen=True)
class Size:
    """Of an SD3.5: pixels of a side, channels, layers, heads, rank of each LoRA."""

    side: int
    width: int
    layers: int
    heads: int
    rank: int


# 64 and 256 tokens of picture beside SD3's 333 of text; 12 and 48 million parameters.
SIZES = {"small": Size(128, 192, 8, 4, 16), "medium": Size(256, 384, 8, 6, 32)}
TEACHERS = ("ink", "clay", "neon", "film")
ROWS = 32  # prompts of each
STEPS, RATE = 16, 2e-4  # as published
FAST = {"num_inference_steps": STEPS // 2, "solver": "ab2"}
DEMO = Path(__file__).parents[1] / "configs" / "demo.yaml"

# ------------------------------------------------------------------------------------- the model and its data


def save_pipeline(folder: Path, size: Size) -> Path:
    """A StableDiffusion3Pipeline whose text encoders have about half the transformer's parameters, together."""
    torch.manual_seed(0)
    text = 256
    transformer = small_sd3(size.side, size.width, size.layers, size.heads, text)
    vae = AutoencoderKL(
        block_out_channels=(8,) * 4, down_block_types=("DownEncoderBlock2D",) * 4, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=16, scaling_factor=1.5305, shift_factor=0.0609,
        use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    characters = string.digits + string.ascii_letters + string.punctuation
    specials = ["<pad>", "</s>", "<unk>"]
    letters = models.Unigram([*((t, 0.0) for t in specials), *((c, -1.0) for c in "▁" + characters)], 2)
    tokenizer = Tokenizer(letters)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    t5 = T5Config(vocab_size=128, d_model=text, d_kv=64, d_ff=512, num_layers=6, num_heads=4)
    clips = {width: _clip(folder, characters, width) for width in (64, 128)}
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        tokenizer=clips[64][0],
        text_encoder=clips[64][1],
        tokenizer_2=clips[128][0],
        text_encoder_2=clips[128][1],
        tokenizer_3=T5TokenizerFast(tokenizer_object=tokenizer, extra_ids=0, model_max_length=512),
        text_encoder_3=T5EncoderModel(t5),
    )
    pipeline.save_pretrained(folder / "model")
    return folder / "model"


def _clip(folder: Path, characters: str, width: int) -> tuple[CLIPTokenizer, CLIPTextModelWithProjection]:
    vocabulary = [*characters, *(f"{c}</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)
    config = CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=width, intermediate_size=4 * width, projection_dim=width,
        num_hidden_layers=4, num_attention_heads=4, max_position_embeddings=77,
        bos_token_id=len(vocabulary) - 2, eos_token_id=len(vocabulary) - 1,
    )  # fmt: skip
    return tokenizer, CLIPTextModelWithProjection(config)


def save_teachers(model: Path, folder: Path, rank: int) -> None:
    """A random LoRA for each teacher, as diffusers writes it."""
    transformer = sd3.load_transformer(model)
    for seed, name in enumerate(TEACHERS):
        save_lora(random_lora(transformer, rank, seed), folder / name, StableDiffusion3Pipeline)


def save_rows(model: Path, folder: Path, side: int) -> dict[str, list[str]]:
    """Prompts of every teacher, as a manifest and prepared; returned by teacher, in the rows' order."""
    prompts = {name: [f"a photo of {i} cups in the style of {name}" for i in range(ROWS)] for name in TEACHERS}
    rows = [{"id": f"{name}-{i}", "task": name, "prompt": p} for name in TEACHERS for i, p in enumerate(prompts[name])]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(folder / "rows.jsonl", model, folder / "cache", resolution=side)
    return prompts


def trainer_of(model: Path, folder: Path, rank: int, training: dict, rollout: dict) -> Trainer:
    config = {
        "model": str(model),
        "student": {"lora": {"rank": rank}},
        "sources": {name: {"lora": [{"path": str(folder / name)}]} for name in TEACHERS},
        "capabilities": {
            name: {"source": name, "task": "t2i", "data": {"prepared": str(folder / "cache" / "rows.jsonl")}}
            for name in TEACHERS
        },
        "rollout": rollout,
        "training": training,
    }
    config = parse_config(config)
    return Trainer(config, build_model(config))


def training_of(folder: Path, batch_size: int, micro_batch: int) -> dict:
    return {
        "output_dir": str(folder / "run"),
        "batch_size": batch_size,
        "gradient_accumulation_steps": -(-batch_size // micro_batch),
        "learning_rate": RATE,
        "warmup_steps": 0,
        "sample_every": 0,
    }


def world_trainer(training: dict, rollout: dict) -> Trainer:
    """configs/demo.yaml with the published method, optimizer and number of steps."""
    config = yaml.safe_load(DEMO.read_text(encoding="utf-8")) | {"method": "danceopd"}
    config["rollout"] |= rollout
    config["training"] = training
    config = parse_config(config)
    return Trainer(config, build(config))


# -------------------------------------------------------------------------------------------- the plain loop


class Plain:
    """The published schedule, its parts ranges as a trainer's are.

    Args:
        ours: Whose rows, noise and queries it takes.
        student: Is trained.
        teachers: One of each route.
        encode: ``encode(route, row)`` gives what the networks take of a prompt.
        ask: ``ask(network, z, sigma, prompt)`` gives a velocity.
    """

    def __init__(self, ours: Trainer, student, teachers: list, encode: Callable, ask: Callable):
        self.ours, self.sigmas, self.step = ours, ours.sigmas.to(ours.device), 0
        self.student, self.teachers, self.encode, self.ask = student, teachers, encode, ask
        self.trained = [p for p in student.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=RATE, weight_decay=0.0)

    @phase("route")
    def draw(self) -> tuple[Batch, torch.Tensor]:
        """The samples and queries of ours, the prompts as numbers of rows."""

        def numbers(rows, indices, without_prompt):
            return Conditioning(torch.tensor(indices), None, torch.zeros(len(indices), dtype=torch.bool))

        config, step = self.ours.config, self.step
        samples, seed = Samples(self.ours.parts.samples.groups, numbers), config.training.seed
        weights = [capability.weight for capability in config.capabilities.values()]
        batch = draw_batch(samples, weights, config.training.batch_size, seed, step, stream=BATCH)
        numbered = [step * len(batch) + i for i in range(len(batch))]
        return batch, query(len(batch), STEPS, sample_generators(seed, QUERY, numbered), bias="low_t")

    def update(self) -> float:
        (batch, depth), total = self.draw(), 0.0
        for i in range(len(batch)):
            route, row = int(batch.route[i]), int(batch.conditioning.prompt[i])
            with torch.no_grad():
                with phase("encode"):
                    prompt = self.encode(route, row)
                states = self.roll_out(batch.noise[i : i + 1].to(self.sigmas.device), prompt)
                asked = states[int(depth[i])], self.sigmas[int(depth[i])], prompt
                target = self.ask_teacher(route, *asked)
            total += self.learn(target, *asked) / len(batch)
        self.update_weights()
        self.step += 1
        return total

    @phase("rollout")
    def roll_out(self, noise: torch.Tensor, prompt) -> list[torch.Tensor]:
        states = [noise]
        for now, after in zip(self.sigmas, self.sigmas[1:], strict=False):
            states.append(states[-1] + (after - now) * self.ask(self.student, states[-1], now, prompt))
        return states

    @phase("query")
    def ask_teacher(self, route: int, z: torch.Tensor, sigma: torch.Tensor, prompt) -> torch.Tensor:
        return self.ask(self.teachers[route], z, sigma, prompt)

    def learn(self, target: torch.Tensor, z: torch.Tensor, sigma: torch.Tensor, prompt) -> float:
        with phase("match"):
            loss = mse_loss(self.ask(self.student, z, sigma, prompt), target)
        with phase("backward"):
            (loss / self.ours.config.training.batch_size).backward()
        return float(loss.detach())

    @phase("step")
    def update_weights(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def plain_sd3(model: Path, folder: Path, prompts: dict[str, list[str]], ours: Trainer) -> Plain:
    """By diffusers and PEFT alone."""
    encoders = StableDiffusion3Pipeline.from_pretrained(model, transformer=None, vae=None).to(ours.device)
    teachers = []
    for name in ours.names:
        teacher = SD3Transformer2DModel.from_pretrained(model / "transformer")
        teacher.load_lora_adapter(folder / name, prefix="transformer", weight_name="pytorch_lora_weights.safetensors")
        teacher.fuse_lora()
        teacher.unload_lora()
        teachers.append(teacher.to(ours.device).requires_grad_(False).eval())
    student = SD3Transformer2DModel.from_pretrained(model / "transformer").requires_grad_(False)
    rank = ours.parts.student.rank
    student.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(sd3.LORA_TARGETS)))
    for name, (a, b, _) in ours.parts.student.lora().items():  # begin with the same adapter
        layer = student.get_submodule(name)
        layer.lora_A["default"].weight.data.copy_(a)
        layer.lora_B["default"].weight.data.copy_(b)
    student.enable_gradient_checkpointing()
    plain = Plain(
        ours,
        student.train().to(ours.device),
        teachers,
        lambda route, row: encoders.encode_prompt(
            prompts[ours.names[route]][row], None, None, do_classifier_free_guidance=False
        ),
        lambda network, z, sigma, prompt: network(z, prompt[0], prompt[2], sigma[None] * 1000, return_dict=False)[0],
    )
    plain.encoders = [getattr(encoders, f"text_encoder{suffix}") for suffix in ("", "_2", "_3")]
    return plain


def plain_world(ours: Trainer) -> Plain:
    """The embedded network, asked for one sample at a time."""
    sources = [ours.config.sources[c.source].weights for c in ours.config.capabilities.values()]
    teachers = [load_model(resolve_weights(name)).requires_grad_(False).to(ours.device) for name in sources]
    student = copy.deepcopy(ours.parts.student)
    for block in student.blocks:
        block.forward = partial(_again, block.forward)
    data = ours.parts.samples.groups[0].data

    def encode(route, row):
        return ours.parts.samples.condition(data[route], [row], [False]).to(ours.device)

    return Plain(ours, student, teachers, encode, lambda network, z, sigma, prompt: network(z, sigma[None], prompt))


def _again(function: Callable, *args):
    """function(*args); a backward computes it again instead of keeping what it had inside."""
    return checkpoint(function, *args, use_reentrant=False) if torch.is_grad_enabled() else function(*args)


# ------------------------------------------------------------------------------------------------ the switches


def all_steps(student, sources, batch, *, sigmas, solver, generator, bias, **rest) -> Questions:
    """The method danceopd with rollouts that go on to the end."""
    depth = query(len(batch), len(sigmas) - 1, generator, bias=bias)
    until = torch.cat([depth, torch.full_like(depth, len(sigmas) - 1)], dim=1)
    states, sigma = rollout(student, batch.noise, batch.conditioning, sigmas, until, solver)
    return on_rollout(sources, batch, depth, states[:, :1], sigma[:, :1], sigmas)


def switched_off(model: Path, folder: Path, prompts: dict[str, list[str]], ours: Trainer) -> dict[str, Trainer]:
    """Trainers that begin where ours does and share with it what is frozen, each without one idea, by its name."""
    encode = sd3.text_encoder(model, ours.device)
    base = sd3.load_transformer(model)
    networks = [
        merge_into(copy.deepcopy(base), load_lora(folder / name, base, StableDiffusion3Pipeline)) for name in ours.names
    ]
    copies = [SharedBase(network.to(ours.device), [], sd3.velocity).field(-1) for network in networks]

    def encoded(rows, indices, without_prompt):
        return Conditioning(
            encode([prompts[rows.capability][i] for i in indices]), None, torch.zeros(len(indices), dtype=torch.bool)
        )

    def twin(training: dict | None = None, **parts) -> Trainer:
        changed = ours.config.training.model_copy(update=training or {})
        parts = {"student": copy.deepcopy(ours.parts.student)} | parts
        return Trainer(ours.config.model_copy(update={"training": changed}), replace(ours.parts, **parts))

    size = ours.config.training.batch_size
    full, recomputed = twin(), twin()
    full.method = all_steps
    recomputed.trained["student"] = partial(_again, recomputed.trained["student"])
    return {
        "stopping at the queried state": full,
        "batching over routes": twin({"gradient_accumulation_steps": size, "rollout_batch_size": 1}),
        "cached encodings": twin(samples=Samples(ours.parts.samples.groups, encoded)),
        "teachers on one network": twin(fields=copies),
        "keeping activations": recomputed,
    }


# --------------------------------------------------------------------------------------------- the comparison


def split(update: Callable[[], object], clock: str) -> dict[str, float]:
    """Percent of an update by phase."""
    with common.Phases(clock) as phases, phase("rest"):
        update()
    whole = sum(phases.seconds.values())
    return {name: 100 * taken / whole for name, taken in phases.seconds.items()}


def compare(folder: Path, args: argparse.Namespace) -> list[dict]:
    """Rows of the plain loop, ours, ours with the fast recipe, and ours without each idea."""
    recipes = {"ours": {"num_inference_steps": STEPS, "solver": "euler"}, "ours, fast": FAST}
    whole, trainers, without = args.micro_batch[0], {}, {}
    if not args.world:
        size = SIZES[args.size]
        model = save_pipeline(folder, size)
        save_teachers(model, folder, size.rank)
        prompts = save_rows(model, folder, size.side)
    for micro in args.micro_batch:
        training = training_of(folder, args.batch_size, micro)
        for name, recipe in recipes.items():
            if args.world:
                trainer = world_trainer(training, recipe)
            else:
                trainer = trainer_of(model, folder, size.rank, training, recipe)
            trainers[name if micro == whole else f"{name}, {micro} at a time"] = trainer
    ours = trainers["ours"]
    plain = plain_world(ours) if args.world else plain_sd3(model, folder, prompts, ours)
    if not args.world and not args.only_ratio:
        without = switched_off(model, folder, prompts, ours)
    print(_sizes(ours, plain, args) + "\n", flush=True)
    trainers |= {f"ours without {name}": trainer for name, trainer in without.items()}
    updates = {"plain loop": plain.update}
    updates |= {name: lambda trainer=trainer: trainer.update()["loss"] for name, trainer in trainers.items()}
    losses = defaultdict(list)

    def kept(name):
        return lambda: losses[name].append(updates[name]())  # a number, so that the device is waited for

    times = common.interleaved({name: kept(name) for name in updates}, args.rounds, clock=args.clock)
    rows = []
    for name, update in updates.items():
        more = {"time_over_ours": common.ratios(times[name], times["ours"])[1]} if "without" in name else {}
        row = common.row(
            name,
            times[name],
            settings={"batch": args.batch_size},
            samples=args.batch_size,
            over=("plain loop", times["plain loop"]),
            loss=sum(losses[name]) / len(losses[name]),
            phases=split(update, args.clock),
            python_calls=common.python_calls(update),
            **more,
        )
        if args.profile:
            common.profiled(update, args.profile, name)
        rows.append(row)
    return rows


def _sizes(ours: Trainer, plain: Plain, args: argparse.Namespace) -> str:
    def millions(*modules):
        tensors = {t.data_ptr(): t.numel() for m in modules for t in [*m.parameters(), *m.buffers()]}
        return sum(tensors.values()) / 1e6

    student, own = ours.parts.student, [*plain.teachers, plain.student]
    if args.world:
        kind = f"the picture world's network, {millions(student):.1f} M parameters, all trained"
        together = [student, *plain.teachers]
    else:
        kind = (
            f"SD3.5 of {SIZES[args.size].layers} layers, {millions(plain.teachers[0]):.1f} M parameters, text encoders "
            f"{millions(*plain.encoders):.1f} M, {SIZES[args.size].side} px, a LoRA student of rank {student.rank}"
        )
        own, together = [*own, *plain.encoders], [student, student.transformer]
    return (
        f"{kind}, batches of {args.batch_size}, {STEPS} steps, {len(plain.teachers)} teachers\n"
        f"networks in memory while training: ours {millions(*together):.1f} M parameters, "
        f"plain loop {millions(*own):.1f} M"
    )


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", action="store_true", help="the picture world's network instead of a small SD3.5")
    parser.add_argument("--size", choices=SIZES, default="small", help="of the SD3.5 (%(default)s)")
    parser.add_argument("--batch-size", type=common.positive, help="8; 64 with --world")
    parser.add_argument(
        "--micro-batch", type=common.positive, nargs="+", help="samples that ours matches at a time; the whole batch"
    )
    parser.add_argument("--only-ratio", action="store_true", help="leave the contribution of each idea out")
    args = common.arguments(parser).parse_args(argv)
    args.batch_size = args.batch_size or (64 if args.world else 8)
    args.micro_batch = list(dict.fromkeys(args.micro_batch or [args.batch_size]))
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    keep_freed_memory()  # as `danceopd train` does on a CPU; the plain loop has it too
    with tempfile.TemporaryDirectory() as folder:
        rows = compare(Path(folder), args)
    name = f"training update, {'the picture world' if args.world else f'{args.size} SD3.5'}"
    result = common.finish(common.result(name, rows), args)
    print("\n% of one update by phase (phases are waited for, so that they are no timing of the whole):")
    for row in rows:
        print(f"  {row['name']:<44}" + ", ".join(f"{name} {share:.1f}" for name, share in row["phases"].items()))
    return result


if __name__ == "__main__":
    main()
