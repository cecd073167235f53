"""What a run says while it trains: the bar, the log, and warnings once each."""

import sys

from tqdm import tqdm

from danceopd.config.sections import Config
from danceopd.support.bars import bar
from danceopd.support.run_log import RunLog
from danceopd.training.speed import told

SHOWN = 4  # capabilities whose losses the bar has room for


class Progress:
    """Shows a run's bar in the terminal and writes the log in its folder; as a context it closes both.

    Args:
        config: The run's.
        step: The update that it goes on from.
        silent: Neither prints nor writes, as all ranks but one.
    """

    def __init__(self, config: Config, step: int, silent: bool = False):
        training = config.training
        self.log = RunLog(training.output_dir, step, silent, training.trackers, config.to_dict())
        self.log_every, self.silent = training.log_every, silent
        self.bar = bar(total=training.max_steps, initial=step, unit="step", smoothing=0.05, disable=silent)
        self.said: set[str] = set()
        self.scores = ""  # the last ones, as the bar has them

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()
        self.log.close()

    def scored(self, scores: dict[str, float]) -> None:
        """Takes in the student's scores, which the bar shows until there are new ones."""
        self.scores = "".join(f"{name.replace('_', ' ')} {value:.3g}, " for name, value in scores.items())

    def show(self, step: int, record: dict, drifting: dict[str, str], done: float) -> None:
        """Takes in one update.

        Args:
            step: Number of updates that are done.
            record: The update's record.
            drifting: A sentence for each thing that drifts now, by a short name; each is said once.
            done: The share of the run that is done.
        """
        text = f"{_losses(record)}, {self.scores}{told(record)}"
        if record["skipped"]:
            text += f", {record['skipped']} skipped"
        if drifting:
            text += f", {len(drifting)} drifting: {min(drifting)}"
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()
        if step % self.log_every == 0 or done == 1:
            self.log.write(step, record)
        for name in drifting.keys() - self.said if not self.silent else ():
            self.said.add(name)
            tqdm.write(f"warning at step {step}: {drifting[name]}", file=sys.stderr)
            self.log.write(step, {"warning": drifting[name]})


def _losses(record: dict) -> str:
    """Writes the loss of each capability where they are few, so that one sees what is being learnt; else the mean."""
    each = record.get("loss_by_capability", {})
    if not 1 < len(each) <= SHOWN:
        return f"loss {record['loss']:.4f}"
    return "loss " + ", ".join(f"{name} {loss:.4f}" for name, loss in each.items())
