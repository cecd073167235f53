"""The training loop: draw, ask the method for its loss, update, watch, log, save."""

import inspect
import math
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from tqdm import tqdm

from danceopd.config.sections import Config
from danceopd.core.batch import Batch
from danceopd.core.fields import Field, counted
from danceopd.core.methods import METHODS
from danceopd.core.methods.provided import needs
from danceopd.core.phase import phase
from danceopd.core.randomness import Generator, sample_generators
from danceopd.core.rollout import rollout, sample
from danceopd.core.schedule import sigma_grid
from danceopd.core.watch import join
from danceopd.data.sampler import draw_batch
from danceopd.models.packing import TOKENS
from danceopd.support.errors import Terminated, UserError
from danceopd.support.files import write_atomic
from danceopd.support.memory import keep_freed_memory
from danceopd.support.pictures import labelled_grid
from danceopd.support.ranks import ALONE, Ranks, agreed
from danceopd.support.run_log import RunLog
from danceopd.training.asking import as_trained, guidance_scales, in_precision, micro_batches
from danceopd.training.assembly.parts import Parts
from danceopd.training.assembly.room import check_room
from danceopd.training.checkpoints import Checkpoint, checkpoints, load_newest, save_state
from danceopd.training.engine import Local
from danceopd.training.gaps import Gaps
from danceopd.training.health import Health
from danceopd.training.previews import MODEL_SAMPLES, PREVIEW_SAMPLES
from danceopd.training.resume import NOT_IDENTITY, _differences, _without_nothing
from danceopd.training.rollouts.compiled import compile_blocks
from danceopd.training.rollouts.kinds import always_guided
from danceopd.training.rollouts.static import StaticField
from danceopd.training.stopping import stop_requests
from danceopd.training.trace import traced

BATCH, QUERY, PREVIEW = 0, 1, 2  # streams of randomness of one step


class Trainer:
    """A run: its parts, its state, and the loop over updates.

    ranks: the processes that share each batch; settings: DeepSpeed's, which shards the student over them; at: is told
    the places that every rank comes to.
    """

    def __init__(
        self,
        config: Config,
        parts: Parts,
        ranks: Ranks = ALONE,
        settings: dict | None = None,
        at: Callable[[str], None] = lambda place: None,
    ):
        self.config, self.parts, self.device, self.ranks, self.at = config, parts, parts.device, ranks, at
        self.names = list(config.capabilities)
        self.weights = [c.weight for c in config.capabilities.values()]
        self.guidance_scales = guidance_scales(config)
        dropout = [c.prompt_dropout for c in config.capabilities.values()]
        self.prompt_dropout = dropout if any(dropout) else None
        sigmas = parts.samples.groups[0].sigmas
        if sigmas is None:
            sigmas = sigma_grid(config.rollout.num_inference_steps, config.rollout.shift)
        self.sigmas = sigmas.to(self.device)
        self.step, self.seconds, self.skipped, self.skipped_in_a_row = 0, 0.0, 0, 0
        self.evaluations: Counter = Counter()  # of all ranks, up to the last update
        self.spent: Counter = Counter()  # of this rank, since then
        self.needs, self.options = needs(config.method), config.method_options()
        method = METHODS[config.method]
        self.method = method(parts.student) if inspect.isclass(method) else method
        self.gaps = Gaps(len(self.names), len(self.sigmas) - 1)
        self.fields = [counted(field, self.spent, "sources") for field in parts.fields]
        self._from_sources: list[torch.Tensor] | None = None
        self.health = Health(self.names, self.sigmas, self._reference_norms())
        if settings is None:
            self.engine = Local(parts.student, config)
        else:
            from danceopd.training.zero.engine import Zero

            self.engine = Zero(parts.student, config, settings, ranks, parts.lockstep)
        if config.training.compile and self.engine.resident is not None:
            compile_blocks(self.engine.resident)
        self.static = self._static_field()

    # --- one update -----------------------------------------------------------------------------------

    def progress(self) -> float:
        """The share of the run that is done: of its steps or its network evaluations, whichever is further."""
        training, done = self.config.training, self.step / self.config.training.max_steps
        if training.max_network_evaluations:
            done = max(done, self.evaluations.total() / training.max_network_evaluations)
        return min(1.0, done)

    def learning_rate(self) -> float:
        training = self.config.training
        factor = min(1.0, (self.step + 1) / max(1, training.warmup_steps))
        if training.lr_schedule == "cosine":
            factor *= 0.5 * (1 + math.cos(math.pi * self.progress()))
        return training.learning_rate * factor

    @phase("route")
    def draw(self) -> Batch:
        """This rank's part of the step's batch, the same at any number of micro-batches, ranks and interruptions."""
        weights = self.gaps.route_weights(self.weights) if self.config.route == "adaptive" else self.weights
        return draw_batch(
            self.parts.samples,
            weights,
            self.config.training.batch_size,
            self.config.training.seed,
            self.step,
            self.guidance_scales,
            in_turn=self.config.route == "round_robin",
            prompt_dropout=self.prompt_dropout,
            with_clean="clean" in self.needs,
            rank=self.ranks.rank,
            world_size=self.ranks.size,
            stream=BATCH,
        )

    def student_field(self) -> Field:
        """The student as the field that is trained, counted; without gradient it is asked where that is cheaper."""

        def network(latents, sigma, conditioning):
            if not torch.is_grad_enabled():
                return self.engine.rolled(latents, sigma, conditioning)
            self.at(f"the query of step {self.step}")
            with phase("student"):
                return self.engine.student(latents, sigma, conditioning)

        field = as_trained(self.config, self.parts, counted(network, self.spent, "student"))
        if self.static is None:
            return field
        self.static.field = field
        return self.static

    def _static_field(self) -> StaticField | None:
        """The student with rollouts of static steps; None where they are asked for as they come."""
        wanted, network, on_cuda = self.config.training.cuda_graphs, self.engine.resident, self.device.type == "cuda"
        if not (on_cuda if wanted == "auto" else wanted) or network is None:
            return None
        ask, both = in_precision(self.config, self.parts, network), None
        if self.guidance_scales is not None:
            both = always_guided(ask, self.parts.empty_prompt, self.parts.combine)
        networks = list(dict.fromkeys([network, getattr(network, "transformer", network)]))
        return StaticField(network, ask, both, networks, capture=on_cuda, spent=self.spent)

    def provided(self, batch: Batch, part: int, progress: float, generator: Generator) -> dict:
        """What a method may ask for by keyword, of micro-batch number `part` at the update's progress."""
        rolled, query = self.config.rollout, self.config.query
        everything = {
            "sigmas": self.sigmas if batch.sigmas is None else batch.sigmas.to(self.device),
            "shift": rolled.shift,
            "solver": rolled.solver,
            "bias": query.bias,
            "k": query.k,
            "gap": self.gaps.query_weights(),
            "progress": progress,
            "part": part,
            "clean": batch.clean,
            "anchor": self.parts.anchor and counted(self.parts.anchor, self.spent, "anchor"),
            "counter": self.spent,
            "generator": generator,
        }
        if "ema" in self.needs:
            everything["ema"] = counted(self.engine.ema.module, self.spent, "ema")
        return {key: everything[key] for key in self.needs}

    def update(self) -> dict:
        """One optimizer step: {"loss", "loss_by_capability", "gradient_norm", ...}; skipped if not finite."""
        training, rate, progress = self.config.training, self.learning_rate(), self.progress()
        batch, parts, slots = self.draw(), training.gradient_accumulation_steps, self.ranks.slots(training.batch_size)
        numbers, tokens = [self.step * training.batch_size + slot for slot in slots], Counter(TOKENS)
        field, seen = self.student_field(), []
        for part in range(parts):
            self.at(f"the rollout of step {self.step}")
            own = slice(len(batch) * part // parts, len(batch) * (part + 1) // parts)
            micro, generators = batch[own].to(self.device), sample_generators(training.seed, QUERY, numbers[own])
            provided = self.provided(micro, part, progress, generators)
            observed = self.method(field, self.fields, micro, **provided, **self.options)
            self.at(f"the backward of step {self.step}")
            with phase("backward"):
                self.engine.backward(observed.loss.mean() * len(micro) / training.batch_size)
            self.spent["backward"] += 2 * len(observed.velocity)  # a backward costs about two forwards
            seen.append(observed.summary())
        self.at(f"the update of step {self.step}")
        with phase("step"):
            norm, updated = self.engine.step(rate)
        everyone = self.ranks.gather((seen, Counter(self.spent), Counter(TOKENS) - tokens))
        watched = join([summary for summaries, *_ in everyone for summary in summaries])
        for _, spent, _ in everyone:
            self.evaluations.update(spent)
        tokens = sum((own for *_, own in everyone), Counter())
        self.spent.clear()
        if updated:
            self.health.update(watched, norm)
            self.gaps.update(watched)
            self.skipped_in_a_row = 0
        else:
            self.skipped += 1
            self.skipped_in_a_row += 1
        self.step += 1
        loss, route = watched.loss, watched.route
        by_name = {
            name: float(loss[route == m].mean()) for m, name in enumerate(self.names) if bool((route == m).any())
        }
        return {
            "loss": float(loss.mean()),
            "loss_by_capability": by_name,
            "gradient_norm": norm,
            "learning_rate": rate,
            "network_evaluations": self.evaluations.total(),
            "skipped": self.skipped,
            **({"padding": self.evaluations["padding"]} if self.static else {}),  # of the network_evaluations
            # The share of the update's tokens that filled up shorter prompts, where prompts have masks.
            **({"padding_tokens": tokens["padding"] / tokens["computed"]} if tokens else {}),
        }

    # --- what is watched and shown --------------------------------------------------------------------

    @torch.no_grad()
    def _reference_norms(self, n: int = 8) -> dict[str, torch.Tensor]:
        """Mean state norm of each teacher's own rollouts by trajectory index: what the student's should be."""
        steps = len(self.sigmas) - 1
        reference = {}
        for m, name in enumerate(self.names):
            norms = []
            for batch in micro_batches(self.config, self._preview(m, n)):
                sigmas = self.sigmas if batch.sigmas is None else batch.sigmas
                until = torch.arange(steps + 1).expand(len(batch), -1)
                states, _ = rollout(self.parts.fields[m], batch.noise, batch.conditioning, sigmas, until)
                norms.append(states.flatten(2).norm(dim=2).cpu())
            reference[name] = torch.cat(norms).mean(0)
            if not torch.isfinite(reference[name]).all():
                raise UserError(
                    f"sources.{self.config.capabilities[name].source}: its own samples for {name} are not finite, so "
                    "nothing can be learnt from it. Its weights or the prepared rows hold numbers that are not, or "
                    f"overflow in {self.config.training.precision}; copy or train them again"
                )
        return reference

    def _preview(self, m: int, n: int) -> Batch:
        """n fixed samples of one capability."""
        seed = self.config.training.seed
        only = [float(i == m) for i in range(len(self.names))]
        batch = draw_batch(self.parts.samples, only, n, seed, 0, self.guidance_scales, stream=PREVIEW)
        return batch.to(self.device)

    @torch.no_grad()
    def sample_grid(self, path: Path, network: Field) -> None:
        """Write a PNG of each capability's fixed samples: the pictures to edit, the network's, its source's.

        Nothing of it is counted as network evaluations. A model's VAE is loaded for as long as this takes.
        """
        count = MODEL_SAMPLES if self.config.model else PREVIEW_SAMPLES
        batches = [self._preview(m, count) for m in range(len(self.names))]
        student = as_trained(self.config, self.parts, network)
        drawn = [self._draw(student, batch) for batch in batches]
        if self._from_sources is None:  # they stay the same
            self._from_sources = [
                self._draw(field, batch) for field, batch in zip(self.parts.fields, batches, strict=True)
            ]
        decode = self.parts.load_decoder() if self.parts.load_decoder else lambda pictures: pictures
        rows = []
        for m, (name, capability) in enumerate(self.config.capabilities.items()):
            sets = {f"{name}: student": drawn[m], f"{name}: its source {capability.source}": self._from_sources[m]}
            edited = batches[m].conditioning.source
            if edited is not None:
                sets = {f"{name}: to edit": edited[0] if isinstance(edited, tuple) else edited} | sets
            rows += [(label, [decode(x[None])[0] for x in latents]) for label, latents in sets.items()]
        write_atomic(path, labelled_grid(rows))

    def _draw(self, field: Field, batch: Batch) -> torch.Tensor:
        """Finished samples of a batch [B, ...]."""
        evaluation = self.config.evaluation
        if self.parts.drawing_sigmas:
            sigmas = self.parts.drawing_sigmas[tuple(batch.noise.shape[1:])]
        else:
            sigmas = sigma_grid(evaluation.num_inference_steps, self.config.rollout.shift)
        return torch.cat(
            [
                sample(field, part.noise, part.conditioning, sigmas, evaluation.solver)
                for part in micro_batches(self.config, batch)
            ]
        )

    def _show_samples(self, log: RunLog) -> None:
        """The sample grid of this step; what goes wrong with it is said, and ends no run."""
        self.at(f"the samples of step {self.step}")
        with self.engine.averaged() as network:
            if self.ranks.rank == 0:
                self._try_grid(log, network)

    def _try_grid(self, log: RunLog, network: Field) -> None:
        try:
            self.sample_grid(self.config.training.output_dir / "samples" / f"step-{self.step:08d}.png", network)
        except (UserError, OSError, torch.OutOfMemoryError) as error:
            warning = f"no sample grid: {str(error).splitlines()[0]}"
            tqdm.write(f"warning at step {self.step}: {warning}", file=sys.stderr)
            log.write(self.step, {"warning": warning})

    # --- state ----------------------------------------------------------------------------------------

    def identity(self) -> dict:
        """The part of the configuration that a resumed run must share."""
        values = self.config.to_dict()
        values.pop("evaluation")
        values["training"] = {k: v for k, v in values["training"].items() if k not in NOT_IDENTITY}
        return values

    def rest(self) -> dict:
        """What a checkpoint keeps beside the large tensors."""
        return {
            "step": self.step,
            "engine": self.engine.rest(),
            "health": self.health.state_dict(),
            "gaps": self.gaps.state_dict(),
            "method": self.method.state_dict() if inspect.isclass(METHODS[self.config.method]) else {},
            "evaluations": dict(self.evaluations),
            "seconds": self.seconds,
            "skipped": [self.skipped, self.skipped_in_a_row],
            "identity": self.identity(),
        }

    def load(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint. Raises UserError for one of another configuration."""
        state = checkpoint.rest
        saved, ours = _without_nothing(state["identity"]), _without_nothing(self.identity())
        if saved != ours:
            changed = _differences(saved, ours)
            raise UserError(
                f"{self.config.training.output_dir} holds a run with another configuration ({', '.join(changed)}); "
                "choose another training.output_dir, or give --overwrite to start again there"
            )
        self.engine.load(checkpoint)
        self.health.load_state_dict(state["health"])
        self.gaps.load_state_dict(state["gaps"])
        if state["method"]:
            self.method.load_state_dict(state["method"])
        self.evaluations.update(state["evaluations"])
        self.step, self.seconds = state["step"], state["seconds"]
        self.skipped, self.skipped_in_a_row = state["skipped"]

    def save(self) -> Path:
        """Write the checkpoint and, beside it, the averaged weights as a network of its own."""
        self.at(f"the checkpoint of step {self.step}")
        folder, keep = self.config.training.output_dir, self.config.training.keep_checkpoints
        path = save_state(
            folder / "checkpoints", self.step, *self.engine.tensors(), self.rest(), keep=keep, ranks=self.ranks
        )
        agreed(self.ranks, lambda: self.ranks.rank or self.parts.save(Checkpoint.read(path), folder))
        return path

    # --- the loop -------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train until progress is 1; Ctrl-C or a TERM signal ends the run after the update at hand, with a checkpoint.

        Raises UserError when too many updates in a row were not finite (a checkpoint is left), or when a
        checkpoint can't be written, and KeyboardInterrupt after a signal.
        """
        training, folder, first = self.config.training, self.config.training.output_dir, self.ranks.rank == 0
        log, bar = RunLog(folder, self.step, silent=not first), self._bar()
        said: set[str] = set()
        try:
            profiled = training.profile_steps if first else 0
            with stop_requests(silent=not first) as stop, traced(folder / "profile", profiled) as traced_update:
                if self.step == 0:
                    self._score(log)
                while (before := self.progress()) < 1:
                    start = time.monotonic()
                    record = self.update()
                    elapsed = time.monotonic() - start
                    traced_update()
                    self.seconds += elapsed
                    record["samples_per_second"] = training.batch_size / elapsed
                    drifting = self.health.warnings()
                    progress = self.progress()
                    self._show(bar, record, drifting)
                    if self.step % training.log_every == 0 or progress == 1:
                        log.write(self.step, {**record, "seconds": round(self.seconds, 3)})
                    for name, warning in drifting.items():
                        if name not in said and first:
                            said.add(name)
                            tqdm.write(f"warning at step {self.step}: {warning}", file=sys.stderr)
                            log.write(self.step, {"warning": warning})
                    if self.skipped_in_a_row >= training.max_nonfinite_steps:
                        self.save()
                        raise UserError(
                            f"stopped at step {self.step}: {self.skipped_in_a_row} updates in a row had a loss or "
                            "gradient that is not finite. A checkpoint was written. Lower training.learning_rate or "
                            "look at the sources and the data, and train into another training.output_dir"
                        )
                    if training.sample_every and (self.step % training.sample_every == 0 or progress == 1):
                        self._show_samples(log)
                    times = self.config.evaluation.times
                    if int(times * progress) > int(times * before):
                        self._score(log)
                    stopped = self.ranks.most(stop[0] if stop else 0)  # a signal may have reached one rank alone
                    if stopped and not stop and first:
                        print("\nanother rank was told to stop", file=sys.stderr)
                    if stopped or self.step % training.save_every == 0 or progress == 1:
                        log.write(self.step, {"health": self.health.summary()})
                        self.save()
                    if stopped and progress < 1:
                        raise Terminated if stopped == signal.SIGTERM else KeyboardInterrupt
        finally:
            bar.close()
            log.close()

    def _bar(self) -> tqdm:
        return tqdm(
            total=self.config.training.max_steps,
            initial=self.step,
            unit="step",
            dynamic_ncols=True,
            smoothing=0.05,
            disable=self.ranks.rank > 0,
        )

    def _show(self, bar: tqdm, record: dict, drifting: dict[str, str]) -> None:
        text = f"loss {record['loss']:.4f}, {record['samples_per_second']:.0f} samples/s"
        if self.skipped:
            text += f", {self.skipped} skipped"
        if drifting:
            text += f", {len(drifting)} drifting: {min(drifting)}"
        bar.set_postfix_str(text, refresh=False)
        bar.update()

    def _score(self, log: RunLog) -> None:
        if not self.config.evaluation.times:
            return
        self.at(f"the scores of step {self.step}")
        with self.engine.averaged() as network:
            if self.ranks.rank == 0:
                scores = self.parts.score(network)
                log.write(self.step, {"network_evaluations": self.evaluations.total(), "evaluation": scores})


def train(
    config: Config,
    build: Callable[..., Parts],
    overwrite: bool = False,
    ranks: Ranks = ALONE,
    settings: dict | None = None,
    at: Callable[[str], None] = lambda place: None,
) -> Path:
    """Run the training of a configuration, going on from its newest checkpoint if there is one.

    build: puts the parts together, by (config, ranks, settings): training.assembly.build.build_model or
    world.build.build. ranks, settings, at: as of a Trainer; every rank calls it. Returns the folder of the run. Raises
    UserError for anything a user can mend, before the first step wherever possible.
    """
    torch.manual_seed(config.training.seed)
    if (ranks.size > 1 and inspect.isclass(METHODS[config.method])) or (settings and "ema" in needs(config.method)):
        raise UserError(f"method: {config.method} runs in one process, without DeepSpeed")
    parts, first = agreed(ranks, build, config, ranks, settings), ranks.rank == 0
    for line in parts.samples.never_drawn if first else ():
        print(f"warning: {line}")
    if parts.device.type == "cpu":
        keep_freed_memory()
    folder = config.training.output_dir
    if overwrite and first:
        for path in checkpoints(folder / "checkpoints"):
            shutil.rmtree(path)
    ranks.wait()
    trainer = Trainer(config, parts, ranks, settings, at)
    there = len(checkpoints(folder / "checkpoints"))
    parameters = sum(shape.numel() for shape in trainer.engine.shapes.values())
    agreed(ranks, check_room, folder, parameters, max(1, config.training.keep_checkpoints + 1 - there))
    checkpoint, messages = load_newest(folder / "checkpoints", ranks)
    for message in messages if first else ():
        print(f"warning: {message}")
    if checkpoint:
        trainer.load(checkpoint)
        if first:
            print(f"going on from step {trainer.step} of {folder}")
    if first:
        write_atomic(folder / "config.yaml", yaml.safe_dump(config.to_dict(), sort_keys=False).encode())
    trainer.run()
    return folder
