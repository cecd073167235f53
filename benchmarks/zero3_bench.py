"""Gather-once rollouts beside a plain ZeRO-3 loop, in turn in one run: bytes all-gathered and time of an update.

    python benchmarks/zero3_bench.py                        # starts two processes on the host
    python benchmarks/zero3_bench.py --rounds 3 --json results.json
    python benchmarks/zero3_bench.py --only trainer         # the trainer's own updates alone
    python benchmarks/zero3_bench.py --only paper           # the computed table alone

The plain loop is DeepSpeed alone (and PEFT, for an adapter): a rollout of all steps on the sharded student, then one
query with gradient. Ours is training.zero.engine.Zero: the weights are gathered once an update into a replica that
the rollout asks. Both take the same samples, noise and queries, ask the same small teacher, which is not sharded, and
begin alike, so that their losses must agree. Both roll out all steps; training stops at the queried state.

Bytes are counted, not computed: the output of every all-gather that reaches torch.distributed, whoever calls it, on
one rank in one update. Times are of other updates, without the counting. A ratio is the median over rounds, in each of
which either makes one update; quartiles stand beside it.

The second part is the trainer's own update (training.loop.Trainer) of the picture world's network, in 1 and 4
micro-batches, with rollouts that ask a replica or the shards. It rolls out and asks the sources once an update, and
matches once a micro-batch. The third part computes, for the published models, what 8 to 512 cards would gather; no
figure there is measured.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib import import_module
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import common, networks
from danceopd.config.reading import parse_config
from danceopd.config.sections import Config
from danceopd.core.conditioning import Conditioning
from danceopd.core.query import query
from danceopd.core.rollout import rollout
from danceopd.core.schedule import sigma_grid
from danceopd.models.shared_base import SharedBase, target_layers
from danceopd.models.students import LoraStudent
from danceopd.support.ranks import Ranks
from danceopd.training.loop import Trainer
from danceopd.world.build import build
from danceopd.world.dit import DiT, DiTConfig

STEPS, RATE = 16, 1e-4
RANK = 40  # of the adapter: to the width as 128 is to FLUX.1's
TARGETS = ("qkv", "out", "up", "down")
STUDENTS = ("all weights", "adapter")
IMAGE, PATCH, TEXT = 32, 16, 4  # few tokens: a step on the host must take seconds
WAYS = [(ask, parts) for ask in ("replica", "shards") for parts in (1, 4)]  # of the trainer


# ------------------------------------------------------------------------------------------------ the counting


class Gathered(TorchDispatchMode):
    """Bytes of the outputs of all-gathers, and their number, while it is entered.

    It sees what reaches the process group, so that nothing depends on which function DeepSpeed calls.
    """

    def __init__(self):
        super().__init__()
        self.bytes, self.calls = 0, Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if name.startswith("c10d::") and "allgather" in name:
            self.calls[name] += 1
            self.bytes += sum(t.nbytes for t in torch.utils._pytree.tree_leaves(args[0]))
        return function(*args, **(kwargs or {}))


# ------------------------------------------------------------------------------------------------ contenders


def network(width: int, depth: int) -> DiT:
    """Random weights, in the layers that begin as zero too; the same on every rank."""
    torch.manual_seed(0)
    made = DiT(DiTConfig(IMAGE, PATCH, width, depth, heads=width // 64 or 1, text_length=TEXT))
    for name, parameter in made.named_parameters():
        if "modulation" in name or "patch_out" in name:
            nn.init.normal_(parameter, std=0.02)
    return made


def settings(parameters: int) -> dict:
    """DeepSpeed's. At its own sizes a network of this size would be kept whole; these keep a tenth of it, as its own do
    of one with 10 B parameters."""
    tenth = parameters // 10
    return {
        "zero_optimization": {
            "stage": 3,
            "stage3_max_live_parameters": tenth,
            "stage3_max_reuse_distance": tenth,
            "stage3_prefetch_bucket_size": tenth // 2,
            "stage3_param_persistence_threshold": 10_000,
            "reduce_bucket_size": tenth,
        }
    }


def configuration(batch_size: int) -> Config:
    return parse_config(
        {
            "sources": {"base": {"weights": "base"}},
            "capabilities": {"t2i": {"source": "base", "task": "t2i", "data": {"world": "t2i"}}},
            "training": {"output_dir": "unused", "batch_size": batch_size, "learning_rate": RATE, "warmup_steps": 0},
        }
    )


class Plain:
    """DeepSpeed alone."""

    def __init__(self, student: nn.Module, config: Config, zero: dict, ranks: Ranks):
        import deepspeed

        trained = [p for p in student.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
        own = {
            "train_micro_batch_size_per_gpu": config.training.batch_size // ranks.size,
            "gradient_clipping": config.training.max_grad_norm,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 2**31,
        }
        self.engine, *_ = deepspeed.initialize(model=student, optimizer=optimizer, config=zero | own)
        self.student = self.rolled = self.engine

    def update(self, loss: torch.Tensor) -> None:
        self.engine.backward(loss)
        self.engine.step()


class Ours:
    """The trainer's engine."""

    def __init__(self, student: nn.Module, config: Config, zero: dict, ranks: Ranks):
        from danceopd.training.zero.engine import Zero

        self.engine, self.size = Zero(student, config, zero, ranks), ranks.size
        self.student, self.rolled = self.engine.student, self.engine.rolled

    def update(self, loss: torch.Tensor) -> None:
        self.engine.backward(loss / self.size)
        self.engine.step(RATE)


def pair(kind: str, width: int, depth: int, config: Config, ranks: Ranks) -> tuple[dict, dict[str, int]]:
    """({name: contender}, parameters by kind)."""
    plain = network(width, depth)
    count = {"network": sum(p.numel() for p in plain.parameters())}
    zero = settings(count["network"])
    if kind == "all weights":
        ours = network(width, depth)
    else:
        from peft import LoraConfig, inject_adapter_in_model

        base = network(width, depth)
        layers = target_layers(base, TARGETS)
        shared = SharedBase(
            base, [], lambda transformer, z, sigma, prompt, *_: _drawn(transformer, z, sigma, prompt), layers
        )
        ours = LoraStudent(shared, layers, RANK, RANK, torch.Generator().manual_seed(1))
        count["adapter"] = sum(p.numel() for p in ours.parameters())
        plain = inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(TARGETS)), plain)
        for name, (a, b, _) in ours.lora().items():  # begin with the same adapter
            layer = plain.get_submodule(name)
            layer.lora_A["default"].weight.data.copy_(a)
            layer.lora_B["default"].weight.data.copy_(b)
    return {"plain loop": Plain(plain, config, zero, ranks), "gather once": Ours(ours, config, zero, ranks)}, count


def _drawn(transformer: DiT, z: torch.Tensor, sigma: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
    return transformer(z, sigma, Conditioning(prompt, None, torch.zeros(len(z), dtype=torch.bool)))


def update(contender, teacher: nn.Module, step: int, batch: int, ranks: Ranks) -> float:
    """One update on the samples of a step; the loss of this rank's part."""
    generator = torch.Generator().manual_seed(1000 * step + ranks.rank)
    noise = torch.randn(batch, 3, IMAGE, IMAGE, generator=generator)
    prompt = torch.randint(0, 400, (batch, TEXT), generator=generator)
    conditioning = Conditioning(prompt, None, torch.zeros(batch, dtype=torch.bool))
    depth = query(batch, STEPS, generator)
    until = torch.cat([depth, torch.full_like(depth, STEPS)], dim=1)
    sigmas = sigma_grid(STEPS, 5.0)
    states, _ = rollout(contender.rolled, noise, conditioning, sigmas, until)
    asked = states[:, 0], sigmas[depth[:, 0]], conditioning
    with torch.no_grad():
        target = teacher(*asked)
    loss = mse_loss(contender.student(*asked), target)
    contender.update(loss)
    return float(loss.detach())


# ------------------------------------------------------------------------------------------------ measuring


def measure(kind: str, args: argparse.Namespace, ranks: Ranks) -> dict:
    """Both contenders on this rank, in turn."""
    config = configuration(args.batch_size * ranks.size)
    teacher = network(64, 1).requires_grad_(False)
    contenders, parameters = pair(kind, args.width, args.depth, config, ranks)
    names = list(contenders)
    found = {name: {"losses": [], "seconds": []} for name in names}
    # The first update warms up and lets DeepSpeed see the order of layers; the second is counted, the others timed.
    for step in range(args.rounds + 2):
        for name in names if step % 2 else reversed(names):
            ranks.wait()
            start = time.perf_counter()
            if step == 1:
                with Gathered() as gathered:
                    loss = update(contenders[name], teacher, step, args.batch_size, ranks)
                found[name] |= {"gathered_bytes": gathered.bytes, "all_gathers": dict(gathered.calls)}
            else:
                loss = update(contenders[name], teacher, step, args.batch_size, ranks)
            ranks.wait()
            if step > 1:
                found[name]["seconds"].append(time.perf_counter() - start)
            found[name]["losses"].append(sum(ranks.gather(loss)) / ranks.size)
    differ = max(abs(a - b) / abs(a) for a, b in zip(*(found[name]["losses"] for name in names), strict=True))
    return {
        "student": kind,
        "parameters": parameters,
        **{name: found[name] for name in names},
        "largest_difference_of_losses": differ,
    }


def measure_trainer(args: argparse.Namespace, ranks: Ranks) -> list[dict]:
    """The trainer's updates on this rank, each of WAYS in turn; one rank's time is about the other's."""
    made = {way: trainer_of(*way, ranks) for way in WAYS}
    found = {way: {"seconds": []} for way in WAYS}
    for step in range(args.rounds + 2):  # as in `measure`
        for way in WAYS if step % 2 else WAYS[::-1]:
            ranks.wait()
            start = time.perf_counter()
            if step == 1:
                with Gathered() as gathered:
                    record = made[way].update()
                found[way] |= {"gathered_bytes": gathered.bytes, "all_gathers": dict(gathered.calls)}
            else:
                record = made[way].update()
            ranks.wait()
            if step > 1:
                found[way]["seconds"].append(time.perf_counter() - start)
            found[way]["loss"] = record["loss"]
    return [{"rollouts_ask": way[0], "micro_batches": way[1], **found[way]} for way in WAYS]


def trainer_of(rollout_on: str, micro_batches: int, ranks: Ranks) -> Trainer:
    """A run of the picture world, text to image and editing, 16 samples an update, all weights trained."""
    training = {
        "output_dir": "unused", "batch_size": 16, "gradient_accumulation_steps": micro_batches,
        "rollout_on": rollout_on, "learning_rate": RATE, "warmup_steps": 0, "sample_every": 0,
    }  # fmt: skip
    tasks = ("t2i", "edit")
    config = parse_config(
        {
            "student": {"init_from": "base"},
            "sources": {task: {"weights": task} for task in tasks},
            "capabilities": {
                task: {"source": task, "task": task, "data": {"world": task, "size": 64, "seed": 1}} for task in tasks
            },
            "rollout": {"num_inference_steps": STEPS, "shift": 5.0, "solver": "euler"},
            "evaluation": {"times": 0},
            "training": training,
        }
    )
    parts = build(config, ranks)
    return Trainer(config, parts, ranks, settings(sum(p.numel() for p in parts.student.parameters())))


def work(args: argparse.Namespace) -> None:
    """What each started process does; rank 0 writes the figures."""
    from danceopd.training.zero.launch import begin

    ranks, _ = begin(None, "cpu", 300)
    figures = measure_trainer(args, ranks) if args.only == "trainer" else measure(args.student[0], args, ranks)
    if ranks.rank == 0:
        args.worker.write_text(json.dumps(figures), encoding="utf-8")
    ranks.wait()


def start(argv: list[str], ranks: int):
    """Measure in processes of their own; returns what rank 0 wrote."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "figures.json"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        ended = subprocess.run(
            [*launcher, __file__, *argv, "--worker", str(file)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        if ended.returncode:
            raise SystemExit(f"a process failed:\n{ended.stdout[-6000:]}")
        return json.loads(file.read_text(encoding="utf-8"))


def rows(figures: dict, samples: int) -> list[dict]:
    """Of one kind of student."""
    plain, kind = figures["plain loop"], {"student": figures["student"], "M": figures["parameters"]["network"] // 10**6}
    return [
        common.row(
            name,
            figures[name]["seconds"],
            settings=kind,
            samples=samples,
            over=("plain loop", plain["seconds"]),
            gathered_MB=figures[name]["gathered_bytes"] / 1e6,
            all_gathers=sum(figures[name]["all_gathers"].values()),
            times_fewer_bytes=plain["gathered_bytes"] / figures[name]["gathered_bytes"],
            loss=sum(figures[name]["losses"]) / len(figures[name]["losses"]),
        )
        for name in ("plain loop", "gather once")
    ]


def trainer_rows(figures: list[dict]) -> list[dict]:
    """Of the trainer's updates."""
    return [
        common.row(
            "trainer",
            way["seconds"],
            settings={"rollouts ask": way["rollouts_ask"], "micro-batches": way["micro_batches"]},
            gathered_MB=way["gathered_bytes"] / 1e6,
            all_gathers=sum(way["all_gathers"].values()),
            loss=way["loss"],
        )
        for way in figures
    ]


# ------------------------------------------------------------------------------------------------- on paper


def paper(rank: int = 128) -> list[dict]:
    """What an update of one micro-batch gathers for the models of configs/models, by the numbers of their parameters.

    Weights gathered are bfloat16, an adapter's float32. The plain loop gathers everything 16 + 2 times, ours what is
    trained 1 + 2 times.
    """
    import diffusers

    from danceopd.models.backbones import FAMILIES
    from danceopd.support.cards import CARDS, gather_seconds

    sizes = networks.released()
    modules = [import_module(f"danceopd.models.backbones.{family}") for family in FAMILIES]
    rows, seen = [], set()
    for model, (family, config, _) in sizes.MODELS.items():
        if config is None:
            continue  # of unknown size
        with torch.device("meta"):
            transformer = getattr(diffusers, sizes.CLASSES[family])(**config)
        network = sum(p.numel() for p in transformer.parameters())
        if (family_of := (sizes.CLASSES[family], network)) in seen:
            continue  # of the same size
        seen.add(family_of)
        targets = next(m.LORA_TARGETS for m in modules if hasattr(m, sizes.CLASSES[family]))
        linear = [transformer.get_submodule(name) for name in target_layers(transformer, targets, every=False)]
        adapter = sum(rank * (layer.in_features + layer.out_features) for layer in linear)
        for student, plain, ours in (
            (f"adapter of rank {rank}", (STEPS + 2) * (2 * network + 4 * adapter), 3 * 4 * adapter),
            ("all weights", (STEPS + 2) * 2 * network, 3 * 2 * network),
        ):
            seconds = {
                str(gpus): [gather_seconds(size, gpus, CARDS["h100"]) for size in (plain, ours)]
                for gpus in (8, 64, 512)
            }
            rows.append(
                {"model": model, "student": student, "parameters": network, "adapter": adapter, "plain_bytes": plain}
                | {"bytes": ours, "seconds": seconds}
            )
    return rows


def paper_table(rows: list[dict]) -> str:
    lines = [
        "COMPUTED from numbers of parameters and stated link speeds, nothing of it measured: gathered in an update on",
        f"one rank ({STEPS} rollout steps, K = 1, one micro-batch), plain loop -> gather once, and the seconds of it;",
        "links in one direction at full speed: NVLink 450 GB/s a card within 8, InfiniBand 50 GB/s a card between",
        f"{'':22}{'':22}{'GB gathered':>18}{'':>8}{'s, 8 GPUs':>17}{'s, 64 GPUs':>17}{'s, 512 GPUs':>17}",
    ]
    for row in rows:
        plain, ours = row["plain_bytes"], row["bytes"]
        size = f"{plain / 1e9:.0f} -> {ours / 1e9:.1f}"
        seconds = "".join(f"{f'{a:.2f} -> {b:.3f}':>17}" for a, b in row["seconds"].values())
        lines.append(f"{row['model']:22}{row['student']:22}{size:>18}{f'{plain / ours:.0f} x':>8}{seconds}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=common.positive, default=2, help="processes (%(default)s)")
    parser.add_argument("--batch-size", type=common.positive, default=2, help="of each process (%(default)s)")
    parser.add_argument("--width", type=common.positive, default=1024, help="of the network (%(default)s)")
    parser.add_argument("--depth", type=common.positive, default=6, help="its blocks (%(default)s)")
    parser.add_argument("--student", nargs="+", choices=STUDENTS, default=STUDENTS)
    parser.add_argument("--only", choices=("measured", "trainer", "paper"), help="one of the three parts")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = common.arguments(parser).parse_args(argv)
    if args.width < 64:
        parser.error("--width must be at least 64")
    if args.worker:
        return work(args)
    parts = {args.only} if args.only else {"measured", "trainer", "paper"}
    own = ("rounds", "batch-size", "width", "depth")
    forwarded = [f"--{key}={vars(args)[key.replace('-', '_')]}" for key in own]
    students = [start([*forwarded, "--student", kind], args.ranks) for kind in args.student if "measured" in parts]
    trainer = start([*forwarded, "--only", "trainer"], args.ranks) if "trainer" in parts else []
    computed = paper() if "paper" in parts else []
    lines = [row for figures in students for row in rows(figures, args.ranks * args.batch_size)] + trainer_rows(trainer)
    result = common.result("ZeRO-3", lines, processes=args.ranks, students=students, trainer=trainer, computed=computed)
    result["device"]["threads"] = int(os.environ["OMP_NUM_THREADS"])  # of each process
    if not lines:
        common.write(result | {"measured": False}, args.json)
    else:
        common.finish(result, args)
        for figures in students:
            print(
                f"{figures['student']}: losses differ by at most {figures['largest_difference_of_losses']:.1e} of them"
            )
    if computed:
        print(paper_table(computed))
    return result


if __name__ == "__main__":
    main()
