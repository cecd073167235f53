"""benchmarks/query_bench.py at a size where it takes seconds: all of its variants ask the same teachers."""

import json
from functools import partial
from itertools import product

import pytest

pytest.importorskip("diffusers")

from benchmarks import networks, query_bench


def test_every_variant_has_the_same_loss_and_sharing_takes_less_memory(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(networks, "small_sd3", partial(networks.small_sd3, width=64, layers=2, heads=2))
    file = tmp_path / "figures.json"
    monkeypatch.setattr(networks, "SD3_TEXT", 4)
    argv = ["--batch", "4", "--resolution", "32", "--rank", "2", "--rounds", "1", "--json", str(file)]
    result = query_bench.main(["--teachers", "1", "3", "--guidance", "1", "4", "--variants", *query_bench.FULL, *argv])
    assert json.loads(file.read_text())["rows"] == result["rows"]
    losses = set()
    for count, guidance in product((1, 3), (1.0, 4.0)):
        asked = {"teachers": count, "guidance": guidance}
        rows = {row["name"]: row for row in result["rows"] if asked.items() <= row["settings"].items()}
        assert list(rows) == list(query_bench.FULL)
        loss = rows["copies"]["loss"]
        losses.add(loss)
        for name, row in rows.items():
            assert row["loss"] == pytest.approx(loss, rel=2e-2 if "fp8" in name else 1e-5)
        assert rows["copies+fp8+fused"]["memory_over_first"] < 0.5
        assert (rows["shared"]["memory_over_first"] < 1) == (count > 1)
    assert len(losses) == 4  # guidance and the number of teachers change what is matched
    assert rows["copies"]["networks_MiB"] == pytest.approx(3 * result["rows"][0]["networks_MiB"])
    assert "query, sd3: measured on" in capsys.readouterr().out


@pytest.mark.parametrize("options", [["--variants", "copy"], ["--variants", "fused"], ["--teachers", "0"]])
def test_mistakes_are_refused(options):
    with pytest.raises(SystemExit):
        query_bench.main(options)
