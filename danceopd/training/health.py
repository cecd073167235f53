"""Watches for silent collapse: norms of velocities and states, and the gradient's running quantiles."""

import math
import statistics
from collections import deque

import torch

from danceopd.config.sections import Config
from danceopd.core.watch import Watched
from danceopd.support.errors import UserError

RATIO_LIMITS = (0.8, 1.25)  # a norm over what it is held against

MOMENTUM = 0.9

MIN_OBSERVATIONS = 20

GRADIENT_WINDOW = 200

GRADIENT_RECENT = 10

GRADIENT_FACTOR = 5.0


class Health:
    """Keeps running ratios of norms by capability and trajectory index.

    The student's velocity is held against its source's, and a state of its rollouts against the mean of the first
    `MIN_OBSERVATIONS` of the run there, so that nothing has to be asked before the first update.

    Args:
        names: The capabilities, in the order of the routes.
        sigmas: float32 tensor [N + 1], the noise levels of the rollout.
    """

    def __init__(self, names: list[str], sigmas: torch.Tensor):
        self.names, self.sigmas = names, sigmas.tolist()
        self.velocity: dict[str, list[float]] = {}
        self.state: dict[str, list[float]] = {}
        self.first: dict[str, list[float]] = {}  # sum and number of the state norms that the run began with
        self.gradients: deque[float] = deque(maxlen=GRADIENT_WINDOW)
        self.rolled_out: bool | None = None  # whether the last update asked at states of rollouts

    def update(self, seen: Watched, gradient_norm: float) -> None:
        """Takes in one update.

        Args:
            seen: What was watched of its queries.
            gradient_norm: The norm of its gradient.
        """
        rolled_out = bool((seen.depth >= 0).any())
        if rolled_out is not self.rolled_out:
            self.gradients.clear()  # a warm start is over: gradients of other states have other norms
        self.rolled_out = rolled_out
        if math.isfinite(gradient_norm):
            self.gradients.append(gradient_norm)
        columns = (seen.route, seen.depth, seen.velocity_norm, seen.target_norm, seen.state_norm)
        for m, i, v, t, s in zip(*(column.tolist() for column in columns), strict=True):
            if i < 0:
                continue
            key = f"{self.names[m]}/{i}"
            self._average(self.velocity, key, v / max(t, 1e-12))
            total, count = self.first.setdefault(key, [0.0, 0])
            if count < MIN_OBSERVATIONS:
                self.first[key] = [total + s, count + 1]
            else:
                self._average(self.state, key, s / max(total / count, 1e-12))

    def _average(self, table: dict[str, list[float]], key: str, value: float) -> None:
        """Moves the running mean of a key towards a value."""
        mean, count = table.get(key, (value, 0))
        table[key] = [MOMENTUM * mean + (1 - MOMENTUM) * value, count + 1]

    def quantiles(self) -> dict[str, float]:
        """Works out the gradient norm's running quantiles.

        Returns:
            ``p10``, ``p50`` and ``p90``; empty before the first update.
        """
        if not self.gradients:
            return {}
        values = torch.quantile(torch.tensor(list(self.gradients)), torch.tensor([0.1, 0.5, 0.9])).tolist()
        return dict(zip(("p10", "p50", "p90"), values, strict=True))

    def summary(self) -> dict:
        """Averages the ratios over capabilities.

        Returns:
            The ratios by sigma, as {"velocity_norm_ratio": {"0.620": 1.01}, ...}, the gradient norm's quantiles, and
            the number of the run's queries by sigma.
        """
        result: dict[str, dict] = {}
        for name, table in (("velocity_norm_ratio", self.velocity), ("state_norm_ratio", self.state)):
            by_sigma: dict[str, list[float]] = {}
            for key, (mean, _) in table.items():
                sigma = self.sigmas[int(key.rpartition("/")[2])]
                by_sigma.setdefault(f"{sigma:.3f}", []).append(mean)
            result[name] = {sigma: sum(v) / len(v) for sigma, v in sorted(by_sigma.items())}
        queries: dict[str, int] = {}
        for key, (_, count) in sorted(self.velocity.items()):
            sigma = f"{self.sigmas[int(key.rpartition('/')[2])]:.3f}"
            queries[sigma] = queries.get(sigma, 0) + count
        return {**result, "gradient_norm": self.quantiles(), "queries": dict(sorted(queries.items()))}

    def warnings(self) -> dict[str, str]:
        """Finds what is drifting now.

        Returns:
            A short name and a sentence for each; empty while all is well.
        """
        low, high = RATIO_LIMITS
        found = {}
        for what, table in (("velocity", self.velocity), ("rollout state", self.state)):
            for key, (mean, count) in table.items():
                if count >= MIN_OBSERVATIONS and not low <= mean <= high:
                    name, _, index = key.rpartition("/")
                    at = f"{what} norm of {name} at sigma {self.sigmas[int(index)]:.2f}"
                    than = "its source's" if what == "velocity" else "what it was in the first updates"
                    found[at] = f"the student's {at} is {mean:.2f} times {than}"
        if len(self.gradients) >= MIN_OBSERVATIONS:
            # The median of the last few, since a single spike is no drift.
            recent = statistics.median(list(self.gradients)[-GRADIENT_RECENT:])
            times = recent / max(statistics.median(self.gradients), 1e-12)
            if times > GRADIENT_FACTOR:
                found["gradient norm"] = f"the gradient norm is {recent:.3g}, {times:.0f} times its running median"
        return found

    def state_dict(self) -> dict:
        """Collects what a checkpoint keeps.

        Returns:
            The running ratios and the gradient norms.
        """
        tables = {"velocity": self.velocity, "state": self.state, "first": self.first}
        return {**tables, "gradients": list(self.gradients), "rolled_out": self.rolled_out}

    def load_state_dict(self, state: dict) -> None:
        """Goes on from a checkpoint.

        Args:
            state: What state_dict returned.
        """
        self.velocity, self.state, self.first = state["velocity"], state["state"], state["first"]
        self.gradients.extend(state["gradients"])
        self.rolled_out = state["rolled_out"]


def check_answers(config: Config, seen: Watched) -> None:
    """Checks that the sources' answers at finite states are finite.

    Args:
        config: The run's.
        seen: What was watched of an update.

    Raises:
        UserError: For the first source whose answers are not.
    """
    broken = seen.state_norm.isfinite() & ~seen.target_norm.isfinite()
    for m, (name, capability) in enumerate(config.capabilities.items()):
        if bool((broken & (seen.route == m)).any()):
            raise UserError(
                f"sources.{capability.source}: its answers for {name} are not finite, so nothing can be learnt "
                "from it. Its weights or the prepared rows hold numbers that are not, or overflow in "
                f"{config.training.precision}; copy or train them again"
            )
