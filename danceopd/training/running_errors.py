"""How far the student is from its sources: running mean errors that adaptive routes and queries follow."""

import torch

from danceopd.core.watch import Watched

MOMENTUM = 0.95

LIMIT = 3.0  # an adaptive route's weight stays within this factor of the configuration's


class RunningErrors:
    """Keeps running means of the squared velocity error: of each capability, and at each trajectory index.

    They are float64 tensors [M] and [N], in which 0 is unseen.

    Args:
        capabilities: Their number M.
        num_inference_steps: Number N of steps of the rollout.
    """

    def __init__(self, capabilities: int, num_inference_steps: int):
        self.capability = torch.zeros(capabilities, dtype=torch.float64)
        self.index = torch.zeros(num_inference_steps, dtype=torch.float64)

    def update(self, seen: Watched) -> None:
        """Takes in one update's queries.

        Args:
            seen: What was watched of them.
        """
        error, on_grid = seen.error.double(), seen.depth >= 0
        self._average(self.capability, seen.route, error)
        self._average(self.index, seen.depth[on_grid], error[on_grid])

    @staticmethod
    def _average(table: torch.Tensor, key: torch.Tensor, error: torch.Tensor) -> None:
        """Moves the running mean of each key that is there towards its mean error."""
        for i in key.unique().tolist():
            mean = error[key == i].mean()
            table[i] = mean if table[i] == 0 else MOMENTUM * table[i] + (1 - MOMENTUM) * mean

    def route_weights(self, weights: list[float]) -> list[float]:
        """Weights the routes by how far each capability is from its source.

        Args:
            weights: The configuration's, one for each capability.

        Returns:
            Them times each capability's error relative to the mean error, a factor within [1 / LIMIT, LIMIT]; `weights`
            themselves until every capability has been seen.
        """
        used = torch.tensor(weights) > 0
        if (self.capability[used] == 0).any():
            return weights
        factor = (self.capability / self.capability[used].mean()).clamp(1 / LIMIT, LIMIT)
        return (torch.tensor(weights, dtype=torch.float64) * factor).tolist()

    def query_weights(self) -> torch.Tensor | None:
        """Weights the trajectory indices by the root mean squared error there.

        Returns:
            float64 tensor [N], an unseen index taken as the mean; None before the first update.
        """
        seen = self.index > 0
        if not seen.any():
            return None
        return torch.where(seen, self.index, self.index[seen].mean()).sqrt()

    def state_dict(self) -> dict:
        """Collects what a checkpoint keeps.

        Returns:
            The running means.
        """
        return {"capability": self.capability, "index": self.index}

    def load_state_dict(self, state: dict) -> None:
        """Goes on from a checkpoint.

        Args:
            state: What state_dict returned.
        """
        self.capability, self.index = state["capability"], state["index"]
