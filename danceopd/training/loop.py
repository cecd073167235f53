"""The training loop: draw, ask, match, step."""

import inspect
import math
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import yaml

from danceopd.config.sections import Config
from danceopd.core.batch import Batch
from danceopd.core.fields import Field, counted, within
from danceopd.core.methods import METHODS, needs
from danceopd.core.phase import phase
from danceopd.core.questions import Questions, matched
from danceopd.core.randomness import sample_generators
from danceopd.core.schedule import sigma_grid
from danceopd.core.watch import Watched, columns, join, watched
from danceopd.data.sampler import draw_batch
from danceopd.models.packing import SHAPES, TOKENS
from danceopd.support.errors import Terminated, UserError
from danceopd.support.files import write_atomic
from danceopd.support.memory import keep_freed_memory, ran_out
from danceopd.support.ranks import ALONE, Ranks, agreed
from danceopd.support.texts import many
from danceopd.support.trackers import check_trackers
from danceopd.training.asking import (
    as_student,
    costs_of_run,
    guidance_scales,
    in_graphs,
    pool_of_run,
    rolled_out,
    rows_of_run,
    static_sources,
    static_student,
)
from danceopd.training.assembly.parts import Parts, Scored
from danceopd.training.assembly.room import check_room
from danceopd.training.checkpoints import Checkpoint, checkpoints, load_newest, save_state, tidy
from danceopd.training.engine import Local
from danceopd.training.health import Health, check_answers
from danceopd.training.previews import Previews
from danceopd.training.progress import Progress
from danceopd.training.resume import go_on, identity, state_of
from danceopd.training.rollouts.compiled import compile_blocks
from danceopd.training.rows import in_parts, less_memory
from danceopd.training.running_errors import RunningErrors
from danceopd.training.speed import Speed
from danceopd.training.stopping import stop_requests
from danceopd.training.trace import traced

BATCH, QUERY = 0, 1  # streams of the randomness of a step

Build = Callable[[Config, Ranks, dict | None], Parts]


class Trainer:
    """Trains a student: it holds a run's parts and state, and makes one update after another.

    Args:
        config: The run's.
        parts: What it is made of.
        ranks: The processes that share each batch.
        settings: DeepSpeed's, which shards the student over the ranks; None for one process without it.
        at: Is told the places that every rank comes to.

    Raises:
        UserError: For settings that do not go with the student's shards or the number of ranks.
    """

    def __init__(
        self,
        config: Config,
        parts: Parts,
        ranks: Ranks = ALONE,
        settings: dict | None = None,
        at: Callable[[str], None] = lambda place: None,
    ):
        self.config, self.parts, self.device, self.ranks, self._told = config, parts, parts.device, ranks, at
        self.place, self.micro_batches = "", config.training.gradient_accumulation_steps  # more once memory ran out
        self.identity = identity(config)  # now: its files may be changed while it trains
        self.names, self.needs, self.options = list(config.capabilities), needs(config.method), config.method_options()
        self.slots = ranks.slots(config.training.batch_size)
        sigmas = parts.samples.groups[0].sigmas
        if sigmas is None:
            sigmas = sigma_grid(config.rollout.num_inference_steps, config.rollout.shift)
        self.sigmas = sigmas

        # What has been done, and what was seen of it: a checkpoint keeps these.
        self.step, self.seconds, self.skipped, self.skipped_in_a_row = 0, 0.0, 0, 0
        self._drawn: dict[int, Batch] = {}  # the next step's batch, where it was drawn ahead
        self.scores: list[Scored] = []  # where the run has some
        self.evaluations: Counter = Counter()  # all ranks' network evaluations, up to the last update
        self.spent: Counter = Counter()  # this rank's, since then
        # This holds the last update's numbers: a sample's latent entries, all ranks' evaluations, tokens.
        self.new: tuple[int, Counter, Counter] = (0, Counter(), Counter())
        self.errors, self.health = RunningErrors(len(self.names), len(self.sigmas) - 1), Health(self.names, self.sigmas)

        # Who learns: the student, and what a method trains beside it.
        self.method = method(parts.student) if inspect.isclass(method := METHODS[config.method]) else method
        if settings is None:
            self.engine = Local(parts.student, config)
        else:
            from danceopd.training.zero.engine import Zero

            self.engine = Zero(parts.student, config, settings, ranks, parts.lockstep)
        self.learners = {"student": self.engine, **getattr(self.method, "learners", {})}

        # Who is asked: the student is rolled out without gradient, and trained with it.
        self.rows = rows_of_run(config, parts, self.engine.rolled, ranks)
        costs = costs_of_run(config, parts, self.engine.rolled)
        self.speed = Speed(parts.device, parts.student, costs, ranks.size)
        self.previews = Previews(config, parts, self.rows)
        if self.engine.resident is None:
            for key in ("compile", "cuda_graphs"):
                if getattr(config.training, key) is True:
                    raise UserError(
                        f"training.{key}: does not go with rollouts on the student's shards; leave it out, or set "
                        "training.rollout_on: replica"
                    )
        elif config.training.compile:
            compile_blocks(self.engine.resident)
        rolled = self._asked(self.engine.rolled, "student")
        pool = self.rows.pool = pool_of_run(config, parts)
        self.student = rolled_out(config, parts, self.engine.resident, rolled, self.rows, self.spent, pool)
        static = settings is None and in_graphs(config, parts)  # with DeepSpeed, forwards gather weights
        self.sources = static_sources(config, parts, static, pool, self.rows, self.spent)
        self._with_gradient = static_student(config, parts, self.engine, static, pool)
        self.trained = {name: self._trained(name, learner) for name, learner in self.learners.items()}

    def at(self, place: str) -> None:
        """Notes where the run is, for what is said when it ends there.

        Args:
            place: What it is about to do, as "the rollout of step 3".
        """
        self.place = place
        self._told(place)

    # --- one update -----------------------------------------------------------------------------------

    def update(self) -> dict:
        """Makes one update: draws a batch, asks about it, matches the student, and steps where the step is finite.

        Returns:
            The update's record: its loss, gradient norm and learning rate, and what the run has spent so far.
        """
        rate, tokens, shapes = self.learning_rate(), Counter(TOKENS), Counter(SHAPES)
        batch = self._drawn.pop(self.step, None) or self.draw()
        questions = self.ask(batch)
        self.engine.finish()  # no rank asks without gradient any more
        found = self._matched(questions)
        self.at(f"the update of step {self.step}")
        self._draw_ahead()
        with phase("step"):
            norm, updated, seen = self.engine.step(rate, columns(questions["student"], found))
            for name, learner in self.learners.items():
                if updated and name != "student":
                    learner.step(rate)
        new = Counter(TOKENS) - tokens
        new["shapes"] = len(Counter(SHAPES) - shapes)
        seen, spent, tokens = self._count(watched(questions["student"], seen, len(batch)), new)
        self.new = math.prod(batch.noise.shape[1:]), spent, tokens
        if self.step == 0:
            check_answers(self.config, seen)
        if updated:
            self.health.update(seen, norm)
            self.errors.update(seen)
        self.skipped += not updated
        self.skipped_in_a_row = 0 if updated else self.skipped_in_a_row + 1
        self.step += 1
        by_name = {name: seen.mean_loss(m) for m, name in enumerate(self.names)}
        return {
            "loss": seen.mean_loss(),
            "loss_by_capability": {name: loss for name, loss in by_name.items() if loss is not None},
            "gradient_norm": norm,
            "learning_rate": rate,
            "network_evaluations": self.evaluations.total(),
            "skipped": self.skipped,
            **self._padding,
        }

    def _draw_ahead(self) -> None:
        """Draws the next update's batch while the device is at the backward, where nothing of this one decides it."""
        if self.config.route == "adaptive" or self.step + 1 >= self.config.training.max_steps:
            return
        with suppress(Exception):  # it is drawn again in its own update, and says there what is wrong
            self._drawn = {self.step + 1: self.draw(self.step + 1)}

    @phase("route")
    def draw(self, step: int | None = None) -> Batch:
        """Draws this rank's part of a step's batch, the same at any number of ranks and interruptions.

        Args:
            step: The step; this one's if not given.

        Returns:
            The samples, on the run's device.
        """
        training, capabilities = self.config.training, self.config.capabilities.values()
        weights, dropout = [c.weight for c in capabilities], [c.prompt_dropout for c in capabilities]
        return draw_batch(
            self.parts.samples,
            self.errors.route_weights(weights) if self.config.route == "adaptive" else weights,
            training.batch_size,
            training.seed,
            self.step if step is None else step,
            guidance_scales(self.config),
            in_turn=self.config.route == "round_robin",
            group=self.options.get("group_size", 1),
            alike=self.config.route == "per_update",
            prompt_dropout=dropout if any(dropout) else None,
            with_clean="clean" in self.needs,
            rank=self.ranks.rank,
            world_size=self.ranks.size,
            stream=BATCH,
        ).to(self.device)

    @torch.no_grad()
    def ask(self, batch: Batch) -> dict[str, Questions]:
        """Asks the method for its questions about the whole local batch, without gradient.

        Args:
            batch: This rank's samples.

        Returns:
            The questions, by who learns from them.
        """
        self.at(f"the rollout of step {self.step}")
        questions = self.method(self.student, self.sources, batch, **self.provided(batch), **self.options)
        return questions if isinstance(questions, dict) else {"student": questions}

    def match(self, asked: dict[str, Questions], parts: int) -> list:
        """Asks every learner its questions in micro-batches, with gradient, and adds up their gradients.

        Args:
            asked: The questions, by who learns from them.
            parts: Number of micro-batches.

        Returns:
            What matching the student gave, for each of its micro-batches.
        """
        seen = {}
        for name, questions in asked.items():
            seen[name] = []
            for part in questions.split(parts):
                self.at(f"the match of step {self.step}")
                found = matched(self.trained[name], part)
                self.at(f"the backward of step {self.step}")
                with phase("backward"):
                    self.learners[name].backward(found.loss.sum() / self.config.training.batch_size)
                self.spent["fake" if name == "fake" else "backward"] += 2 * len(part)  # it costs about two forwards
                seen[name].append(found)
        return seen["student"]

    def _matched(self, questions: dict[str, Questions]) -> list:
        """Matches in as many micro-batches as the run has; where memory runs out without graphs, then in twice as many.

        Graphs of the rollouts and queries hold memory too, and go before samples do.
        """
        while True:
            spent = Counter(self.spent)
            try:
                return self.match(questions, self.micro_batches)
            except RuntimeError as error:
                sharded = not isinstance(self.engine, Local)  # whose other ranks have made more of this match, or less
                if not ran_out(error) or sharded:
                    raise
                again = self.rows.pool is not None and self.rows.pool.give_up()
                if not again and self.micro_batches >= max(map(len, questions.values())):
                    raise
            for learner in self.learners.values():
                learner.student.zero_grad(set_to_none=True)
            self.spent.clear()
            self.spent.update(spent)
            if again:
                continue
            self.micro_batches *= 2
            print(
                f"warning: memory ran out in {self.place}; going on in {self.micro_batches} micro-batches "
                f"(training.gradient_accumulation_steps: {self.micro_batches} begins so)",
                file=sys.stderr,
            )

    def provided(self, batch: Batch) -> dict:
        """Collects what the method wants by keyword (danceopd.core.methods.PROVIDED).

        Args:
            batch: This rank's samples.

        Returns:
            The values, by the method's keywords.
        """
        rollout, query, training = self.config.rollout, self.config.query, self.config.training
        numbers = [self.step * training.batch_size + slot for slot in self.slots]
        provide = {
            "sigmas": lambda: self.sigmas if batch.sigmas is None else batch.sigmas,
            "shift": lambda: rollout.shift,
            "solver": lambda: rollout.solver,
            "bias": lambda: query.bias,
            "k": lambda: query.k,
            "gap": self.errors.query_weights,
            "progress": self.progress,
            "clean": lambda: batch.clean,
            "ema": lambda: self._asked(self.engine.ema.module, "ema"),
            "anchor": lambda: self._asked(self.parts.anchor, "anchor"),
            "fake": lambda: self._asked(self.learners["fake"].student, "fake"),
            "generator": lambda: sample_generators(training.seed, QUERY, numbers),
        }
        return {key: provide[key]() for key in self.needs}

    def progress(self) -> float:
        """Works out the share of the run that is done: of its steps or its evaluations, whichever is further.

        Returns:
            A number between 0 and 1; 1 where its scores are enough.
        """
        if self.scores and self.parts.enough and self.parts.enough(self.scores):
            return 1.0
        training, done = self.config.training, self.step / self.config.training.max_steps
        if training.max_network_evaluations:
            done = max(done, self.evaluations.total() / training.max_network_evaluations)
        return min(1.0, done)

    def learning_rate(self) -> float:
        """Works out the learning rate of the next update, after warm-up and schedule.

        Returns:
            The learning rate.
        """
        training = self.config.training
        factor = min(1.0, (self.step + 1) / max(1, training.warmup_steps))
        if training.lr_schedule == "cosine":
            factor *= 0.5 * (1 + math.cos(math.pi * self.progress()))
        return training.learning_rate * factor

    # --- who is asked ---------------------------------------------------------------------------------

    def _asked(self, field: Field, name: str) -> Field:
        """Makes a field count its evaluations, and take as many rows at a time as fit."""
        return counted(within(field, lambda network: in_parts(network, self.rows)), self.spent, name)

    def _trained(self, name: str, learner) -> Field:
        """Makes a learner the field that is asked with gradient."""
        if name != "student":
            return counted(lambda *asked: learner.student(*asked), self.spent, name)
        return as_student(self.config, self.parts, counted(self._with_gradient, self.spent, name))

    # --- what came of it ------------------------------------------------------------------------------

    def _count(self, seen: Watched, tokens: Counter) -> tuple[Watched, Counter, Counter]:
        """Adds what this update spent on all ranks, and returns what all of them watched, spent, and had of tokens."""
        everyone = self.ranks.gather((seen, Counter(self.spent), tokens))
        spent = sum((own for _, own, _ in everyone), Counter())
        self.evaluations.update(spent)
        self.spent.clear()
        tokens = sum((own for *_, own in everyone), Counter())
        # Evaluations of samples that have left, and the share of tokens that fill up shorter prompts, were in vain.
        self._padding = {"padding": self.evaluations["padding"]} if hasattr(self.student, "rollout") else {}
        if tokens["computed"]:
            self._padding["padding_tokens"] = tokens["padding"] / tokens["computed"]
            self._padding["attention_shapes"] = tokens["shapes"]
        return join([own for own, *_ in everyone]), spent, tokens

    def save(self) -> Path:
        """Writes the checkpoint and, beside it, the averaged weights as a network of its own.

        Returns:
            The checkpoint's folder.

        Raises:
            UserError: If a checkpoint cannot be written.
        """
        self.at(f"the checkpoint of step {self.step}")
        folder, keep = self.config.training.output_dir, self.config.training.keep_checkpoints
        path = save_state(
            folder / "checkpoints", self.step, *self.engine.tensors(), state_of(self), keep=keep, ranks=self.ranks
        )
        self.save_student(Checkpoint.read(path))
        return path

    def save_student(self, checkpoint: Checkpoint) -> None:
        """Writes a checkpoint's averaged weights as a network of its own; every rank calls it."""
        agreed(self.ranks, lambda: self.ranks.rank or self.parts.save(checkpoint, self.config.training.output_dir))

    # --- the loop -------------------------------------------------------------------------------------

    def run(self, callbacks: Sequence[Callable[[dict], object]] = ()) -> None:
        """Trains until progress is 1; Ctrl-C or a TERM signal ends it after the update at hand, with a checkpoint.

        Args:
            callbacks: Each is given every update's record, with its step, on rank 0.

        Raises:
            UserError: When too many updates in a row were not finite (a checkpoint is left), or when a checkpoint
                can't be written.
            KeyboardInterrupt: After a signal.
        """
        training, first = self.config.training, self.ranks.rank == 0
        steps = training.profile_steps if first else 0
        with (
            Progress(self.config, self.step, silent=not first) as progress,
            stop_requests(silent=not first) as stop,
            traced(training.output_dir / "profile", steps) as traced_update,
        ):
            if self.step == 0:
                self._score(progress)
            while (before := self.progress()) < 1:
                began = time.monotonic()
                with self.speed.phases.update(), self._memory():
                    record = self.update()
                traced_update()
                self.seconds += time.monotonic() - began
                record |= self.speed.record(time.monotonic() - began, training.batch_size, *self.new)
                done = self.progress()
                progress.show(self.step, {**record, "seconds": round(self.seconds, 3)}, self.health.warnings(), done)
                for callback in callbacks if first else ():
                    callback({"step": self.step, **record})
                self._stop_where_nothing_is_finite()
                if training.sample_every and (self.step % training.sample_every == 0 or done == 1):
                    self._with_average("samples", lambda network: self.previews.show(self.step, network, progress.log))
                every, times = self.parts.score_every, self.config.evaluation.times
                if int(times * done) > int(times * before) or (every and self.step % every == 0):
                    self._score(progress)
                    done = self.progress()
                stopped = self.ranks.most(stop[0] if stop else 0)  # a signal may have reached one rank alone
                if stopped and not stop and first:
                    print("\nanother rank was told to stop, and so this run stops with a checkpoint", file=sys.stderr)
                if stopped or self.step % training.save_every == 0 or done == 1:
                    progress.log.write(self.step, {"health": self.health.summary()})
                    self.save()
                if stopped and done < 1:
                    raise Terminated if stopped == signal.SIGTERM else KeyboardInterrupt

    @contextmanager
    def _memory(self) -> Iterator[None]:
        """Says what can be done where memory runs out; of several ranks `launch` says which one it was."""
        try:
            yield
        except RuntimeError as error:
            if self.ranks.size > 1 or not ran_out(error):
                raise
            folder, why = self.config.training.output_dir, str(error).splitlines()[0]
            kept = checkpoints(folder / "checkpoints")
            left = f"the newest checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
            raise UserError(
                f"memory ran out in {self.place}: {why} To take less, {less_memory(self.config)}; {left}"
            ) from error

    def _stop_where_nothing_is_finite(self) -> None:
        """Ends the run, with a checkpoint, where too many updates in a row were not finite."""
        if self.skipped_in_a_row >= self.config.training.max_nonfinite_steps:
            self.save()
            raise UserError(
                f"stopped at step {self.step}: {self.skipped_in_a_row} updates in a row had a loss or gradient that is "
                "not finite. A checkpoint was written. Lower training.learning_rate or look at the sources and the "
                "data, and train into another training.output_dir"
            )

    def _with_average(self, what: str, function: Callable[[Field], object]) -> None:
        """Calls a function with the student's average on rank 0, while all ranks are here."""
        self.at(f"the {what} of step {self.step}")
        with self.engine.averaged() as network:
            if self.ranks.rank == 0:
                function(network)

    def _score(self, progress: Progress) -> None:
        """Writes the scores of the student's average to the log, where the run has scores."""
        if (self.config.evaluation.times or self.parts.score_every) and self.parts.score:
            found: list[dict[str, float]] = []
            self._with_average("scores", lambda network: found.append(self.parts.score(network)))
            (scores,) = self.ranks.from_first(found)
            self.scores.append((self.step, self.config.training.max_steps, scores))
            spent = {"network_evaluations": self.evaluations.total()}
            progress.log.write(self.step, {**spent, "evaluation": scores})
            progress.scored(scores)


def train(
    config: Config,
    build: Build,
    overwrite: bool = False,
    ranks: Ranks = ALONE,
    settings: dict | None = None,
    at: Callable[[str], None] = lambda place: None,
    callbacks: Sequence[Callable[[dict], object]] = (),
) -> Path:
    """Runs the training of a configuration, going on from its newest checkpoint if there is one.

    Args:
        config: The run's.
        build: Puts its parts together from files.
        overwrite: Starts again where a finished or another run lies.
        ranks: The processes that share each batch; every rank calls this.
        settings: DeepSpeed's, which shards the student over the ranks; None for one process without it.
        at: Is told the places that every rank comes to.
        callbacks: Each is given every update's record, as `Trainer.run` does.

    Returns:
        The folder of the run.

    Raises:
        UserError: For anything a user can mend, before the first step wherever possible.
    """
    torch.manual_seed(config.training.seed)
    for key in ("rollout_on", "shard_sources") if settings is None else ():
        if getattr(config.training, key) != "auto":  # a configuration for many cards may run on one
            print(f"warning: training.{key} is for ZeRO, and changes nothing in one process")
    if (ranks.size > 1 and inspect.isclass(METHODS[config.method])) or (settings and "ema" in needs(config.method)):
        raise UserError(f"method: {config.method} runs in one process; start the run without a launcher and DeepSpeed")
    agreed(ranks, check_trackers, config.training.trackers)
    parts, first = agreed(ranks, build, config, ranks, settings), ranks.rank == 0
    for line in parts.warnings if first else ():
        print(f"warning: {line}")
    if parts.device.type == "cpu":
        keep_freed_memory()
    folder = config.training.output_dir
    trainer = Trainer(config, parts, ranks, settings, at)
    there = len(checkpoints(folder / "checkpoints"))
    parameters = sum(shape.numel() for shape in trainer.engine.shapes.values())
    agreed(ranks, check_room, folder, parameters, max(1, config.training.keep_checkpoints + 1 - there))
    if overwrite and first:  # now that nothing is in the way of the new run
        for path in checkpoints(folder / "checkpoints"):
            shutil.rmtree(path)
    ranks.wait()
    checkpoint, messages = load_newest(folder / "checkpoints", ranks)
    for message in messages if first else ():
        print(f"warning: {message}")
    for left in folder.rglob(".*.tmp") if first else ():  # by a run that was killed, maybe before its first checkpoint
        if left.is_file():
            left.unlink(missing_ok=True)
    if checkpoint:
        _go_on(trainer, checkpoint)
    if first:
        write_atomic(folder / "config.yaml", yaml.safe_dump(config.to_dict(), sort_keys=False).encode())
    if trainer.progress() < 1:
        trainer.run(callbacks)
    return folder


def _go_on(trainer: Trainer, checkpoint: Checkpoint) -> None:
    """Goes on from a checkpoint, and leaves the folder as the process would have that wrote it, had it not died."""
    training = trainer.config.training
    go_on(trainer, checkpoint)
    if trainer.ranks.rank == 0:
        if trainer.progress() < 1:
            print(f"going on from step {trainer.step} of {training.output_dir}")
        else:
            print(
                f"{training.output_dir} is finished after {many(trainer.step, 'update')}: nothing is left to train; "
                "--overwrite starts again, a larger training.max_steps goes on"
            )
        tidy(training.output_dir / "checkpoints", checkpoint.path, training.keep_checkpoints)
    if trainer.progress() >= 1:  # then no update follows that would write it
        trainer.save_student(checkpoint)
