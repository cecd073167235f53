"""Training updates beside a plain loop with the published schedule, in turn in one run: ratios of time.

    python benchmarks/train_bench.py                        # on a GPU if there is one
    python benchmarks/train_bench.py --rounds 3 --json results.json

One small SD3.5 of the real classes with random weights, its text encoders, four LoRA teachers and a LoRA student are
saved into a temporary folder and loaded from there by both. The plain loop is diffusers and PEFT alone: one sample a
micro-step, its prompt encoded there, a rollout of all steps although one state is asked, each teacher a copy of the
network with its LoRA fused, gradients accumulated to the same batch. (Published, all samples of an update have one
route, too; the cost is the same.) Ours is the trainer's own update, with everything else that it does. Both take the
same rows, noise and queries and begin with the same adapter, so that their losses must agree.

Then each idea is switched off alone; its factor is the update's time without it over the time with it. All of them
give the same loss. A ratio is the median over rounds, in each of which every contender makes one update; the smallest
and largest round stand beside it.
"""

import argparse
import copy
import json
import platform
import statistics
import string
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import diffusers
import torch
import transformers
from danceopd_kernels import info
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

from danceopd.backbones import sd3
from danceopd.conditioning import Conditioning
from danceopd.config import parse_config
from danceopd.data.prepare import prepare
from danceopd.data.sampler import Batch, Samples, draw_batch, sample_generators
from danceopd.fields import routed
from danceopd.lora import SharedBase, load_lora, merged, save_lora, target_layers
from danceopd.memory import keep_freed_memory
from danceopd.methods.danceopd import danceopd_loss
from danceopd.methods.observed import Observed
from danceopd.objectives import velocity_mse
from danceopd.query import query
from danceopd.rollout import rollout
from danceopd.training.loop import BATCH, QUERY, Trainer
from danceopd.training.setup import build

SIDE = 128  # pixels: 64 image tokens beside SD3's 333 of text
WIDTH, LAYERS, HEADS, RANK = 192, 8, 4, 16
TEACHERS = ("ink", "clay", "neon", "film")
ROWS = 32  # prompts of each
STEPS, RATE = 16, 2e-4  # as published

# ------------------------------------------------------------------------------------- the model and its data


def save_pipeline(folder: Path) -> Path:
    """A StableDiffusion3Pipeline whose text encoders have about half the transformer's parameters, together."""
    torch.manual_seed(0)
    text = 256
    transformer = SD3Transformer2DModel(
        sample_size=SIDE // 8, patch_size=2, in_channels=16, out_channels=16, num_layers=LAYERS,
        attention_head_dim=WIDTH // HEADS, num_attention_heads=HEADS, caption_projection_dim=WIDTH,
        joint_attention_dim=text, pooled_projection_dim=192, pos_embed_max_size=SIDE // 16,
        dual_attention_layers=tuple(range(LAYERS // 2)), qk_norm="rms_norm",
    )  # fmt: skip
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.1)
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
        generator = torch.Generator().manual_seed(seed)
        lora = {}
        for layer in target_layers(transformer, sd3.LORA_TARGETS):
            out, width = transformer.get_submodule(layer).weight.shape
            a = torch.randn(RANK, width, generator=generator) / width**0.5
            lora[layer] = (a, 0.1 * torch.randn(out, RANK, generator=generator), 1.0)
        save_lora(lora, folder / name, StableDiffusion3Pipeline)


def save_rows(model: Path, folder: Path) -> dict[str, list[str]]:
    """Prompts of every teacher, as a manifest and prepared; returned by teacher, in the rows' order."""
    prompts = {name: [f"a photo of {i} cups in the style of {name}" for i in range(ROWS)] for name in TEACHERS}
    rows = [{"id": f"{name}-{i}", "task": name, "prompt": p} for name in TEACHERS for i, p in enumerate(prompts[name])]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(folder / "rows.jsonl", model, folder / "cache", sd3, resolution=SIDE)
    return prompts


def trainer_of(model: Path, folder: Path, batch_size: int) -> Trainer:
    config = {
        "model": str(model),
        "student": {"lora": {"rank": RANK}},
        "sources": {name: {"lora": [{"path": str(folder / name)}]} for name in TEACHERS},
        "capabilities": {
            name: {"source": name, "task": "t2i", "data": {"prepared": str(folder / "cache" / "rows.jsonl")}}
            for name in TEACHERS
        },
        "rollout": {"num_inference_steps": STEPS},
        "training": {
            "output_dir": str(folder / "run"),
            "batch_size": batch_size,
            "learning_rate": RATE,
            "warmup_steps": 0,
            "sample_every": 0,
        },
    }
    config = parse_config(config)
    return Trainer(config, build(config))


# -------------------------------------------------------------------------------------------- the plain loop


class Plain:
    """The published schedule, by diffusers and PEFT alone."""

    def __init__(self, model: Path, folder: Path, prompts: dict[str, list[str]], ours: Trainer):
        self.prompts, self.ours, device = [prompts[name] for name in ours.names], ours, ours.device
        self.encoders = StableDiffusion3Pipeline.from_pretrained(model, transformer=None, vae=None).to(device)
        self.teachers = []
        for name in ours.names:
            teacher = SD3Transformer2DModel.from_pretrained(model / "transformer")
            file = "pytorch_lora_weights.safetensors"
            teacher.load_lora_adapter(folder / name, prefix="transformer", weight_name=file)
            teacher.fuse_lora()
            teacher.unload_lora()
            self.teachers.append(teacher.to(device).requires_grad_(False).eval())
        student = SD3Transformer2DModel.from_pretrained(model / "transformer").requires_grad_(False)
        student.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(sd3.LORA_TARGETS)))
        for name, (a, b, _) in ours.parts.student.lora().items():  # begin with the same adapter
            layer = student.get_submodule(name)
            layer.lora_A["default"].weight.data.copy_(a)
            layer.lora_B["default"].weight.data.copy_(b)
        self.student = student.to(device)
        self.trained = [p for p in student.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=RATE, weight_decay=0.0)
        self.sigmas = ours.sigmas

    def draw(self, step: int) -> tuple[Batch, torch.Tensor]:
        """The samples and queries of ours, the prompts as numbers of rows."""

        def numbers(rows, indices, without_prompt):
            return Conditioning(torch.tensor(indices), None, torch.zeros(len(indices), dtype=torch.bool))

        config = self.ours.config
        samples, seed = Samples(self.ours.parts.samples.groups, numbers), config.training.seed
        batch = draw_batch(samples, self.ours.weights, config.training.batch_size, seed, step, stream=BATCH)
        numbered = [step * len(batch) + i for i in range(len(batch))]
        return batch, query(len(batch), STEPS, sample_generators(seed, QUERY, numbered), bias="low_t")

    def update(self, step: int) -> float:
        batch, depth = self.draw(step)
        total = 0.0
        for i in range(len(batch)):
            loss = self.loss(batch.noise[i : i + 1], int(batch.route[i]), int(batch.conditioning.prompt[i]), depth[i])
            (loss / len(batch)).backward()
            total += float(loss.detach()) / len(batch)
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    def loss(self, noise: torch.Tensor, route: int, row: int, depth: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            prompt = self.prompts[route][row]
            embeds, _, pooled, _ = self.encoders.encode_prompt(prompt, None, None, do_classifier_free_guidance=False)

        def ask(network, z, sigma):
            return network(z, embeds, pooled, sigma[None] * 1000, return_dict=False)[0]

        states = [noise.to(self.sigmas.device)]
        with torch.no_grad():
            for now, after in zip(self.sigmas, self.sigmas[1:], strict=False):
                states.append(states[-1] + (after - now) * ask(self.student, states[-1], now))
            z, sigma = states[int(depth)], self.sigmas[int(depth)]
            target = ask(self.teachers[route], z, sigma)
        return mse_loss(ask(self.student, z, sigma), target)


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

    def again(*asked):
        return checkpoint(student, *asked, use_reentrant=False) if torch.is_grad_enabled() else student(*asked)

    return danceopd_loss(again, sources, batch, **provided)


def switches(model: Path, folder: Path, prompts: dict[str, list[str]], ours: Trainer) -> dict[str, Callable]:
    """By name: what takes one idea out of a trainer."""
    encode = sd3.text_encoder(model, ours.device)
    base = sd3.load_transformer(model)
    networks = [merged(base, load_lora(folder / name, base, StableDiffusion3Pipeline)) for name in ours.names]
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


# --------------------------------------------------------------------------------------------- the comparison


@dataclass(frozen=True)
class Measured:
    name: str
    samples_per_second: float  # median
    ratio: tuple[float, float, float]  # its time over ours: median, smallest and largest round
    loss: float  # mean over rounds


def compare(folder: Path, rounds: int, batch_size: int, only_ratio: bool, say: Callable[[str], None]) -> list[Measured]:
    """Ours first, then the plain loop, then ours without each idea."""
    model = save_pipeline(folder)
    save_teachers(model, folder)
    prompts = save_rows(model, folder)
    ours = trainer_of(model, folder, batch_size)
    plain = Plain(model, folder, prompts, ours)
    say(_sizes(ours, plain))
    whole = dict(vars(ours))
    without = {} if only_ratio else switches(model, folder, prompts, ours)
    names = ["ours", "plain loop", *(f"ours without {name}" for name in without)]
    times, losses = ({name: [] for name in names} for _ in range(2))

    def take(name: str, update: Callable[[], float]) -> None:
        start = time.perf_counter()
        loss = update()  # a number, so that the device is waited for
        times[name].append(time.perf_counter() - start)
        losses[name].append(loss)

    for i in range(rounds + 1):
        take("plain loop", lambda step=i: plain.update(step))
        before = copy.deepcopy((ours.parts.student.state_dict(), [o.state_dict() for o in ours.engine.optimizers]))
        for name, change in without.items():  # from the state that ours begins the round with
            change(ours)
            ours.step = i
            take(f"ours without {name}", lambda: ours.update()["loss"])
            vars(ours).update(whole)
            ours.parts.student.load_state_dict(before[0])
            for optimizer, state in zip(ours.engine.optimizers, copy.deepcopy(before[1]), strict=True):
                optimizer.load_state_dict(state)
        ours.step = i
        take("ours", lambda: ours.update()["loss"])
    kept = {name: taken[1:] for name, taken in times.items()}  # the first round warms up
    return [
        Measured(
            name,
            batch_size / statistics.median(kept[name]),
            _spread([a / b for a, b in zip(kept[name], kept["ours"], strict=True)]),
            statistics.mean(losses[name]),
        )
        for name in names
    ]


def _spread(ratios: list[float]) -> tuple[float, float, float]:
    return statistics.median(ratios), min(ratios), max(ratios)


def _sizes(ours: Trainer, plain: Plain) -> str:
    def millions(*modules):
        tensors = {t.data_ptr(): t.numel() for m in modules for t in [*m.parameters(), *m.buffers()]}
        return sum(tensors.values()) / 1e6

    encoders = [getattr(plain.encoders, f"text_encoder{suffix}") for suffix in ("", "_2", "_3")]
    (shared,) = ours.parts.student._shared
    return (
        f"SD3.5 of {LAYERS} layers, {millions(plain.teachers[0]):.1f} M parameters, text encoders "
        f"{millions(*encoders):.1f} M, {SIDE} px, batches of {ours.config.training.batch_size}, {STEPS} steps, "
        f"{len(TEACHERS)} LoRA teachers and a LoRA student of rank {RANK}\nnetworks in memory while training: ours "
        f"{millions(shared.transformer, ours.parts.student):.1f} M parameters, plain loop "
        f"{millions(plain.student, *plain.teachers, *encoders):.1f} M"
    )


def main(argv: list[str] | None = None) -> list[Measured]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--only-ratio", action="store_true", help="leave the contribution of each idea out")
    parser.add_argument("--json", help="file to write the figures to")
    args = parser.parse_args(argv)
    if min(args.rounds, args.batch_size) < 1:
        parser.error("--rounds and --batch-size must be at least 1")
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.processor() or platform.machine()} CPU"
    threads = f", {torch.get_num_threads()} threads" if device == "cpu" else ""
    print(f"{name}{threads}, torch {torch.__version__}\n{info()}\n")
    if device == "cpu":
        keep_freed_memory()  # as `danceopd train` does; the plain loop has it too
    with tempfile.TemporaryDirectory() as folder:
        results = compare(Path(folder), args.rounds, args.batch_size, args.only_ratio, print)
    print(f"\n{'':<44}{'samples/s':>10}{'time over ours':>26}{'mean loss':>12}")
    for m in results:
        ratio = f"{m.ratio[0]:.2f} ({m.ratio[1]:.2f} to {m.ratio[2]:.2f})"
        print(f"{m.name:<44}{m.samples_per_second:>10.2f}{ratio:>26}{m.loss:>12.6f}")
    if args.json:
        rows = [asdict(m) for m in results]
        values = {"device": name + threads, "torch": torch.__version__, "batch_size": args.batch_size, "rows": rows}
        Path(args.json).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    return results


if __name__ == "__main__":
    main()
