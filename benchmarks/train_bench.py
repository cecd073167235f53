"""Training updates beside a plain loop with the published schedule, in turn in one run: how many times as fast.

    python benchmarks/train_bench.py                        # a small SD3.5, on a GPU if there is one
    python benchmarks/train_bench.py --world                # the picture world's network, as in configs/demo.yaml
    python benchmarks/train_bench.py --rounds 3 --json results.json

The small SD3.5 is of the real classes with random weights; it, its text encoders, four LoRA teachers and a LoRA
student are saved into a temporary folder and loaded from there by both. The plain loop is diffusers and PEFT alone: one
sample a micro-step, its prompt encoded there, a rollout of all steps although one state is asked, each teacher a copy
of the network with its LoRA fused, gradient checkpointing, gradients accumulated to the same batch. (Published, all
samples of an update have one route, too; the cost is the same.) On the picture world it is the same loop over that
network with all its weights trained, its prompts' tokens and source pictures made in the loop; both use AdamW there.

Ours is the trainer's own update, with everything else that it does. Both take the same rows, noise and queries and
begin with the same weights, so that their losses must agree. "ours, fast" rolls out half the steps by the two-step
solver ab2, so that its states are others and its loss is too.

Of the SD3.5, each idea is then switched off alone: time_over_ours is the update's time without it over the time with
it. All of them give the same loss. At the end one more update of each is split by phase.
"""

import argparse
import copy
import json
import string
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
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
import danceopd.core.fields
import danceopd.core.methods.danceopd
from benchmarks import common
from benchmarks.networks import random_lora, small_sd3
from danceopd.config.reading import parse_config
from danceopd.core.batch import Batch
from danceopd.core.conditioning import Conditioning
from danceopd.core.fields import routed
from danceopd.core.methods.danceopd import danceopd_loss
from danceopd.core.objectives import velocity_mse
from danceopd.core.query import query
from danceopd.core.randomness import sample_generators
from danceopd.core.rollout import rollout
from danceopd.core.watch import Observed
from danceopd.data.prepare import prepare
from danceopd.data.sampler import Samples, draw_batch
from danceopd.models.backbones import sd3
from danceopd.models.lora_algebra import merge_into
from danceopd.models.lora_files import load_lora, save_lora
from danceopd.models.shared_base import SharedBase
from danceopd.support.memory import keep_freed_memory
from danceopd.training.assembly.build import build
from danceopd.training.engine import Local
from danceopd.training.loop import BATCH, QUERY, Trainer
from danceopd.world.files import load_model, resolve_weights

SIDE = 128  # pixels: 64 image tokens beside SD3's 333 of text
WIDTH, LAYERS, HEADS, RANK = 192, 8, 4, 16
TEACHERS = ("ink", "clay", "neon", "film")
ROWS = 32  # prompts of each
STEPS, RATE = 16, 2e-4  # as published
FAST = {"num_inference_steps": STEPS // 2, "solver": "ab2"}
DEMO = Path(__file__).parents[1] / "configs" / "demo.yaml"

# ------------------------------------------------------------------------------------- the model and its data


def save_pipeline(folder: Path) -> Path:
    """A StableDiffusion3Pipeline whose text encoders have about half the transformer's parameters, together."""
    torch.manual_seed(0)
    text = 256
    transformer = small_sd3(SIDE, WIDTH, LAYERS, HEADS, text)
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


def save_teachers(model: Path, folder: Path) -> None:
    """A random LoRA for each teacher, as diffusers writes it."""
    transformer = sd3.load_transformer(model)
    for seed, name in enumerate(TEACHERS):
        save_lora(random_lora(transformer, RANK, seed), folder / name, StableDiffusion3Pipeline)


def save_rows(model: Path, folder: Path) -> dict[str, list[str]]:
    """Prompts of every teacher, as a manifest and prepared; returned by teacher, in the rows' order."""
    prompts = {name: [f"a photo of {i} cups in the style of {name}" for i in range(ROWS)] for name in TEACHERS}
    rows = [{"id": f"{name}-{i}", "task": name, "prompt": p} for name in TEACHERS for i, p in enumerate(prompts[name])]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(folder / "rows.jsonl", model, folder / "cache", resolution=SIDE)
    return prompts


def trainer_of(model: Path, folder: Path, batch_size: int, rollout: dict) -> Trainer:
    config = {
        "model": str(model),
        "student": {"lora": {"rank": RANK}},
        "sources": {name: {"lora": [{"path": str(folder / name)}]} for name in TEACHERS},
        "capabilities": {
            name: {"source": name, "task": "t2i", "data": {"prepared": str(folder / "cache" / "rows.jsonl")}}
            for name in TEACHERS
        },
        "rollout": rollout,
        "training": training(folder, batch_size),
    }
    config = parse_config(config)
    return Trainer(config, build(config))


def training(folder: Path, batch_size: int) -> dict:
    return {
        "output_dir": str(folder / "run"),
        "batch_size": batch_size,
        "learning_rate": RATE,
        "warmup_steps": 0,
        "sample_every": 0,
    }


def world_trainer(folder: Path, batch_size: int, rollout: dict) -> Trainer:
    """configs/demo.yaml with the published method, optimizer and number of steps."""
    config = yaml.safe_load(DEMO.read_text(encoding="utf-8")) | {"method": "danceopd"}
    config["rollout"] |= rollout
    config["training"] = training(folder, batch_size)
    config = parse_config(config)
    return Trainer(config, build(config))


# -------------------------------------------------------------------------------------------- the plain loop


class Plain:
    """The published schedule. encode(route, row) -> what the networks take of a prompt; ask(network, z, sigma, it)."""

    def __init__(self, ours: Trainer, student, teachers: list, encode: Callable, ask: Callable):
        self.ours, self.sigmas, self.step = ours, ours.sigmas, 0
        self.student, self.teachers, self.encode, self.ask = student, teachers, encode, ask
        self.trained = [p for p in student.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=RATE, weight_decay=0.0)

    def draw(self) -> tuple[Batch, torch.Tensor]:
        """The samples and queries of ours, the prompts as numbers of rows."""

        def numbers(rows, indices, without_prompt):
            return Conditioning(torch.tensor(indices), None, torch.zeros(len(indices), dtype=torch.bool))

        config, step = self.ours.config, self.step
        samples, seed = Samples(self.ours.parts.samples.groups, numbers), config.training.seed
        batch = draw_batch(samples, self.ours.weights, config.training.batch_size, seed, step, stream=BATCH)
        numbered = [step * len(batch) + i for i in range(len(batch))]
        return batch, query(len(batch), STEPS, sample_generators(seed, QUERY, numbered), bias="low_t")

    def update(self) -> float:
        (batch, depth), total = self.draw(), 0.0
        for i in range(len(batch)):
            route, row = int(batch.route[i]), int(batch.conditioning.prompt[i])
            with torch.no_grad():
                prompt = self.encode(route, row)
                states = self.roll_out(batch.noise[i : i + 1].to(self.sigmas.device), prompt)
                asked = states[int(depth[i])], self.sigmas[int(depth[i])], prompt
                target = self.ask_teacher(route, *asked)
            total += self.learn(target, *asked) / len(batch)
        self.update_weights()
        self.step += 1
        return total

    def roll_out(self, noise: torch.Tensor, prompt) -> list[torch.Tensor]:
        states = [noise]
        for now, after in zip(self.sigmas, self.sigmas[1:], strict=False):
            states.append(states[-1] + (after - now) * self.ask(self.student, states[-1], now, prompt))
        return states

    def ask_teacher(self, route: int, z: torch.Tensor, sigma: torch.Tensor, prompt) -> torch.Tensor:
        return self.ask(self.teachers[route], z, sigma, prompt)

    def learn(self, target: torch.Tensor, z: torch.Tensor, sigma: torch.Tensor, prompt) -> float:
        loss = mse_loss(self.ask(self.student, z, sigma, prompt), target)
        (loss / self.ours.config.training.batch_size).backward()
        return float(loss.detach())

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
    student.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(sd3.LORA_TARGETS)))
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


def all_steps(student, sources, batch, *, sigmas, solver, generator, **rest) -> Observed:
    """danceopd_loss whose rollouts go on to the end."""
    depth = query(len(batch), len(sigmas) - 1, generator, bias=rest["bias"])
    until = torch.cat([depth, torch.full_like(depth, len(sigmas) - 1)], dim=1)
    states, _ = rollout(student, batch.noise, batch.conditioning, sigmas, until, solver)
    states = states[:, 0]
    sigma = sigmas[depth[:, 0].to(sigmas.device)]
    target = routed(sources, batch.route, states, sigma, batch.conditioning)
    velocity = student(states, sigma, batch.conditioning)
    return Observed(velocity_mse(velocity, target), batch.route, depth[:, 0], states, velocity.detach(), target)


def recomputed(student, sources, batch, **provided) -> Observed:
    """danceopd_loss whose backward computes the student's activations again."""

    return danceopd_loss(partial(_again, student), sources, batch, **provided)


def switches(model: Path, folder: Path, prompts: dict[str, list[str]], ours: Trainer) -> dict[str, Callable]:
    """By name: what takes one idea out of a trainer."""
    encode = sd3.text_encoder(model, ours.device)
    base = sd3.load_transformer(model)
    networks = [
        merge_into(copy.deepcopy(base), load_lora(folder / name, base, StableDiffusion3Pipeline)) for name in ours.names
    ]
    copies = [SharedBase(network.to(ours.device), [], sd3.velocity).field(-1) for network in networks]

    def one_sample(trainer):
        size = trainer.config.training.batch_size
        training = trainer.config.training.model_copy(update={"gradient_accumulation_steps": size})
        trainer.config = trainer.config.model_copy(update={"training": training})

    def encoded(rows, indices, without_prompt):
        return Conditioning(
            encode([prompts[rows.capability][i] for i in indices]), None, torch.zeros(len(indices), dtype=torch.bool)
        )

    def encode_every_step(trainer):
        trainer.parts = copy.copy(trainer.parts)
        trainer.parts.samples = Samples(trainer.parts.samples.groups, encoded)

    return {
        "stopping at the queried state": lambda trainer: setattr(trainer, "method", all_steps),
        "batching over routes": one_sample,
        "cached encodings": encode_every_step,
        "teachers on one network": lambda trainer: setattr(trainer, "fields", copies),
        "keeping activations": lambda trainer: setattr(trainer, "method", recomputed),
    }


def twin(ours: Trainer) -> Trainer:
    """Another run from where ours is, that shares with it what is frozen."""
    made = copy.copy(ours)
    made.parts = replace(ours.parts, student=copy.deepcopy(ours.parts.student))
    made.engine = Local(made.parts.student, made.config)
    made.health, made.gaps = copy.deepcopy((ours.health, ours.gaps))
    made.static = made._static_field()
    return made


# --------------------------------------------------------------------------------------------- the comparison

PLAIN_PHASES = {
    "route, data": ["draw"], "encoding": ["encode"], "rollout": ["roll_out"], "query": ["ask_teacher"],
    "student": ["learn"], "step": ["update_weights"],
}  # fmt: skip


def split(update: Callable[[], object], places: dict) -> dict[str, float]:
    """Milliseconds of an update by phase."""
    with common.Phases(places) as phases, phases.phase("rest"):
        update()
    return {phase: 1e3 * taken for phase, taken in phases.seconds.items()}


def phases_of(trainer: Trainer) -> dict:
    module, here = danceopd.core.methods.danceopd, sys.modules[__name__]
    return {
        "route, data": [(trainer, "draw")],
        "rollout": [(module, "rollout"), (here, "rollout")],
        "query": [(danceopd.core.fields, "routed"), (here, "routed")],
        "student": [(trainer, "method"), (trainer.engine, "backward")],
        "step": [(trainer.engine, "step")],
    }


def compare(folder: Path, args: argparse.Namespace) -> list[dict]:
    """Rows of the plain loop, ours, ours with the fast recipe, and ours without each idea."""
    exact, without = {"num_inference_steps": STEPS, "solver": "euler"}, {}
    if args.world:
        ours, fast = (world_trainer(folder, args.batch_size, rollout) for rollout in (exact, FAST))
        plain = plain_world(ours)
    else:
        model = save_pipeline(folder)
        save_teachers(model, folder)
        prompts = save_rows(model, folder)
        ours, fast = (trainer_of(model, folder, args.batch_size, rollout) for rollout in (exact, FAST))
        plain = plain_sd3(model, folder, prompts, ours)
        if not args.only_ratio:
            without = switches(model, folder, prompts, ours)
    print(_sizes(ours, plain, args) + "\n", flush=True)
    trainers = {"ours": ours, "ours, fast": fast}
    for name, change in without.items():
        trainers[f"ours without {name}"] = changed = twin(ours)
        change(changed)
    updates = {"plain loop": plain.update}
    updates |= {name: lambda trainer=trainer: trainer.update()["loss"] for name, trainer in trainers.items()}
    losses = defaultdict(list)

    def kept(name):
        return lambda: losses[name].append(updates[name]())  # a number, so that the device is waited for

    times = common.interleaved({name: kept(name) for name in updates}, args.rounds)
    rows = []
    for name, update in updates.items():
        if name in trainers:
            phases = split(update, phases_of(trainers[name]))
        else:
            phases = split(update, {phase: [(plain, m) for m in where] for phase, where in PLAIN_PHASES.items()})
        more = {"time_over_ours": common.ratios(times[name], times["ours"])[1]} if "without" in name else {}
        row = common.row(
            name,
            times[name],
            settings={"batch": args.batch_size},
            samples=args.batch_size,
            over=("plain loop", times["plain loop"]),
            loss=sum(losses[name]) / len(losses[name]),
            phases=phases,
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
            f"SD3.5 of {LAYERS} layers, {millions(plain.teachers[0]):.1f} M parameters, text encoders "
            f"{millions(*plain.encoders):.1f} M, {SIDE} px, a LoRA student of rank {RANK}"
        )
        own, together = [*own, *plain.encoders], [student, student._shared[0].transformer]
    return (
        f"{kind}, batches of {args.batch_size}, {STEPS} steps, {len(plain.teachers)} teachers\n"
        f"networks in memory while training: ours {millions(*together):.1f} M parameters, "
        f"plain loop {millions(*own):.1f} M"
    )


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", action="store_true", help="the picture world's network instead of a small SD3.5")
    parser.add_argument("--batch-size", type=common.positive, help="8; 64 with --world")
    parser.add_argument("--only-ratio", action="store_true", help="leave the contribution of each idea out")
    args = common.arguments(parser).parse_args(argv)
    args.batch_size = args.batch_size or (64 if args.world else 8)
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    keep_freed_memory()  # as `danceopd train` does on a CPU; the plain loop has it too
    with tempfile.TemporaryDirectory() as folder:
        rows = compare(Path(folder), args)
    name = f"training update, {'the picture world' if args.world else 'small SD3.5'}"
    result = common.finish(common.result(name, rows), args)
    print("\nms of one update by phase (phases are waited for, so that they are no timing of the whole):")
    for row in rows:
        print(f"  {row['name']:<44}" + ", ".join(f"{phase} {ms:.0f}" for phase, ms in row["phases"].items()))
    return result


if __name__ == "__main__":
    main()
