"""A part of the card check by itself."""

import pytest

from benchmarks.card import parts


class Report:
    """Keeps the rows of a part, whose time never ends."""

    def __init__(self, out):
        self.out, self.rows = out, []

    def left(self):
        return 1000.0

    def need(self, seconds=0.0):
        pass

    def say(self, name, value=None, unit="", **more):
        self.rows.append({"name": name, "value": value, "unit": unit, **more})


def quick_report(out, monkeypatch: pytest.MonkeyPatch) -> Report:
    """Makes a report, and parts that time one round and measure no limits of the machine."""
    monkeypatch.setattr(parts, "limit", lambda: {"flops": 1e10, "fp8": 1e10, "bytes": 1e9, "of": "a test"})
    monkeypatch.setattr(parts, "ROUNDS", 1)
    return Report(out)
