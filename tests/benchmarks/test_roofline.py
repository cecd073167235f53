"""benchmarks/roofline.py: a limit by hand, its laws, and what was measured beside it."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")

from benchmarks import common, roofline
from danceopd.core.conditioning import Conditioning
from danceopd.support.cards import CARDS, Card
from danceopd.support.errors import UserError

CONFIG = roofline.CONFIGS / "sd3.5-medium-c.yaml"
PIXELS = 256


class Products(nn.Module):
    """Two products in blocks, the second of which modulates, and one outside of them."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"ff": nn.Linear(8, 16), "mod": nn.Linear(16, 8)})])
        self.out = nn.Linear(8, 8, bias=False)

    def forward(self, x):
        return self.out(self.blocks[0]["mod"](self.blocks[0]["ff"](x)))


@pytest.fixture(scope="module")
def work():
    return roofline.released("sd3.5-medium", 128, False, PIXELS)


# ------------------------------------------------------------------------------------------------------ the limit


def test_a_small_network_by_hand():
    with torch.device("meta"):
        network = Products().bfloat16()
    prompt = {"prompt_embeds": torch.zeros(1, 5, 2, dtype=torch.bfloat16)}
    conditioning = Conditioning(prompt, None, torch.tensor([False]))

    def ask(latents, sigma, conditioning):
        return network(latents.bfloat16())

    work = roofline.work_of(ask, network, (3, 4, 8), conditioning, extra=100)
    tokens = 3 * 4
    assert work.narrow == 2 * tokens * 8 * 16
    assert work.wide == 2 * tokens * (16 * 8 + 8 * 8)
    assert work.half == 100 + 2 * (2 * 8 * 16 + 8 * 8 + 16 + 8)
    assert work.eight == work.half - 2 * 8 * 16 + 4 * (16 + 8)  # a byte an entry less, a float32 a row more
    assert work.sample == 2 * 4 * 3 * 4 * 8 + 2 * 5 * 2

    quick = Card("reads in no time", 1e9, 1e3, 1, 1, 1, bandwidth=1e12, fp8=2e3)
    limit = roofline.least(work, quick, 3, False, "fp8")
    assert limit.binds == "compute"
    assert limit.seconds == pytest.approx(3 * (work.narrow / 2e3 + work.wide / 1e3))
    assert limit.flops == 3 * (work.narrow + work.wide)
    slow = Card("computes in no time", 100, 1e12, 1, 1, 1, bandwidth=10)
    limit = roofline.least(work, slow, 3, True, "bf16")
    assert limit.binds == "memory"
    assert limit.seconds == pytest.approx((work.half + 6 * work.sample) / 10)
    assert not limit.fits


def test_an_adapter_adds_what_its_rank_says(work):
    none, four = (roofline.released("sd3.5-medium", rank, False, PIXELS) for rank in (None, 4))
    added = four.wide - none.wide
    assert added > 0
    assert work.wide - none.wide == 32 * added
    assert none.narrow == four.narrow == work.narrow
    assert work.half - none.half == 32 * (four.half - none.half) == work.eight - none.eight


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("precision", ["bf16", "int8", "fp8"])
@pytest.mark.parametrize("bandwidth", [100, 1e-4])  # of the card's: compute binds, memory binds
def test_laws(work, card, precision, bandwidth):
    card = Card(**vars(CARDS[card]) | {"bandwidth": CARDS[card].bandwidth * bandwidth})
    limits = [roofline.least(work, card, batch, False, precision) for batch in (1, 2, 3, 8)]
    assert limits == sorted(limits, key=lambda limit: limit.seconds)
    assert limits[0].seconds < limits[-1].seconds
    assert {limit.binds for limit in limits} == {"compute" if bandwidth > 1 else "memory"}
    for batch in (1, 4):
        once, guided = (roofline.least(work, card, batch, guidance, precision) for guidance in (False, True))
        assert guided == roofline.least(work, card, 2 * batch, False, precision)
        assert guided.seconds <= 2 * once.seconds * (1 + 1e-9)
        if once.binds == "compute":
            assert guided.seconds == pytest.approx(2 * once.seconds)
        assert once.seconds <= roofline.least(work, card, batch, False, "bf16").seconds


@pytest.mark.parametrize(
    "best_first",
    [("b200", "h200", "h100", "h100-pcie", "l40s", "a100-40"), ("h100", "a100", "a100-40"), ("rtx-5090", "rtx-4090")],
)
def test_a_better_card_is_not_slower(work, best_first):
    for precision in ("bf16", "int8", "fp8"):
        times = [roofline.least(work, CARDS[c], 4, False, precision).seconds for c in best_first]
        assert times == sorted(times)


# --------------------------------------------------------------------------------------------------- measured


def write(folder: Path, benchmark: str, device: str, rows: list[dict]) -> Path:
    result = common.result(benchmark, rows)
    result["device"] |= {"name": device, "kind": "cuda"}
    path = folder / f"{benchmark}.json"
    path.write_text(json.dumps(result))
    return path


def test_a_measured_query_stands_beside_its_limit(tmp_path):
    settings = {"teachers": 4, "batch": 2, "resolution": PIXELS, "rank": 128}
    rows = [common.row("shared", [0.5], settings=settings), common.row("shared+fused", [0.2], settings=settings)]
    write(tmp_path, "query, sd35-medium", "NVIDIA H100 80GB HBM3", rows)
    write(tmp_path, "kernels", "NVIDIA H100 80GB HBM3", [common.row("other", [1.0])])
    found = roofline.limits([CONFIG], list(CARDS), [1, 2], PIXELS)
    count = len(found)
    assert roofline.compare(found, roofline.read_measured(tmp_path), list(CARDS)) == []
    assert len(found) == count
    (row,) = (row for row in found if row["measured"])
    assert (row["settings"]["kind"], row["settings"]["batch"], row["settings"]["precision"]) == ("query", 2, "bf16")
    measured = row["measured"]["h100"]
    assert measured["variant"] == "shared+fused"
    assert measured["share_of_limit"] == pytest.approx(row["limits"]["h100"].seconds / 0.2)
    text = roofline.table(found, list(CARDS))
    assert "NOT MEASURED" in text.splitlines()[0]
    assert text.count("%") == 1


def test_a_network_of_no_configuration_gets_a_line_of_its_own(tmp_path):
    settings = {"batch": 4, "resolution": PIXELS, "guidance": 4.5}
    row = common.row("full+fp8", [1.6], settings=settings, evaluations_per_sample=32.0)
    write(tmp_path, "rollout, sd35-medium", "NVIDIA A100-SXM4-40GB", [row])
    found = roofline.limits([CONFIG], ["a100-40"], [4], PIXELS)
    roofline.compare(found, roofline.read_measured(tmp_path), ["a100-40"])
    own = found[-1]
    assert own["name"] == "sd3.5-medium, measured"
    assert own["settings"]["guidance"]
    assert own["settings"]["precision"] == "fp8"
    plain = roofline.released("sd3.5-medium", None, False, PIXELS)
    least = roofline.least(plain, CARDS["a100-40"], 4, True, "fp8").seconds
    assert own["measured"]["a100-40"]["share_of_limit"] == pytest.approx(least / 0.1)  # of 16 steps


def test_what_cannot_be_compared_is_said(tmp_path):
    settings = {"batch": 4, "resolution": PIXELS}
    row = common.row("copies", [0.1], settings=settings)
    write(tmp_path, "query, sd35-medium", "AMD EPYC", [row, row])
    write(tmp_path, "query, sd3", "NVIDIA H100 PCIe", [row])  # of no released size
    write(tmp_path, "rollout, overhead", "NVIDIA H100 PCIe", [row])
    found = roofline.limits([CONFIG], list(CARDS), [4], PIXELS)
    (said,) = roofline.compare(found, roofline.read_measured(tmp_path), list(CARDS))
    assert "AMD EPYC, which is none of" in said
    assert not any(row["measured"] for row in found)


GOOD = {"benchmark": "query, sd35-medium", "measured": True, "device": {"name": "x"}}
ROW = {"name": "copies", "settings": {"batch": 1, "resolution": 8}, "milliseconds": [1, 2, 3]}


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        json.dumps({**GOOD, "device": "x", "rows": [ROW]}),
        json.dumps(GOOD),
        json.dumps({**GOOD, "rows": [{**ROW, "milliseconds": [3, 2, 1]}]}),
        json.dumps({**GOOD, "rows": [{**ROW, "milliseconds": [1, 2]}]}),
        json.dumps({**GOOD, "rows": [{**ROW, "settings": {"batch": 1}}]}),
        json.dumps({**GOOD, "rows": [{**ROW, "milliseconds": ["1", "2", "3"]}]}),
    ],
)
def test_a_malformed_file_is_refused_by_name(tmp_path, content):
    (tmp_path / "mine.json").write_text(content)
    with pytest.raises(UserError, match=r"mine\.json is not what a benchmark writes with --json: .*; write it again"):
        roofline.read_measured(tmp_path)


def test_cards_by_the_names_that_torch_gives():
    names = {
        "NVIDIA H100 80GB HBM3": "h100", "NVIDIA H100 PCIe": "h100-pcie", "NVIDIA A100-SXM4-80GB": "a100",
        "NVIDIA A100-SXM4-40GB": "a100-40", "NVIDIA H100 NVL": None, "AMD EPYC": None,
        "NVIDIA H200": "h200", "NVIDIA H200 NVL": None, "NVIDIA GH200 480GB": None, "NVIDIA B200": "b200",
        "NVIDIA GB200": None, "NVIDIA L40S": "l40s", "NVIDIA L40": None, "NVIDIA GeForce RTX 4090": "rtx-4090",
        "NVIDIA GeForce RTX 4090 D": None, "NVIDIA GeForce RTX 5090": "rtx-5090", "Tesla V100-SXM2-16GB": None,
    }  # fmt: skip
    assert {name: roofline.card_of(name) for name in names} == names


# ------------------------------------------------------------------------------------------------- the command


def test_the_command_writes_what_it_computed(tmp_path, capsys):
    file, picture = tmp_path / "out" / "limits.json", tmp_path / "limits.png"
    options = ["--cards", "h100", "a100", "--results", str(tmp_path), "--json", str(file), "--plot", str(picture)]
    roofline.main(["--configs", "sd3.5-medium-c", "sd3.5-medium-d", "--resolution", str(PIXELS), *options])
    written = json.loads(file.read_text())
    assert written["measured"] is False
    assert written["label"] == "computed, not measured"
    assert {row["name"] for row in written["rows"]} == {"sd3.5-medium-c", "sd3.5-medium-d"}
    assert len(written["rows"]) == 2 * 2 * 2 * 2
    assert set(written["rows"][0]["limits"]) == {"h100", "a100"}
    assert picture.stat().st_size > 1000
    text = capsys.readouterr().out
    assert "COMPUTED, NOT MEASURED" in text
    assert text.endswith("nothing is compared\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--configs", "sd3.5-medium-x"], "did you mean"),
        (["--configs", "configs/demo.yaml"], "begins with no model whose size is known"),
        (["--configs", "sd3.5-medium-c", "--resolution", "250"], "no multiple of 16"),
        (["--batch", "0"], "at least 1"),
    ],
)
def test_mistakes_are_explained(options, message, capsys):
    with pytest.raises(SystemExit):
        roofline.main(options)
    assert message in capsys.readouterr().err


def test_every_file_of_the_results_folder_can_be_read():
    assert isinstance(roofline.read_measured(Path(roofline.__file__).parent / "results"), list)
