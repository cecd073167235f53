"""GenEval by one command: it draws, scores, sums up, and goes on where it stopped."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import tiny_geneval as tiny
from geneval_runs import METADATA, clause, close, pixels

from danceopd.cli.parser import main
from danceopd.evaluation.geneval import models as geneval_models
from danceopd.evaluation.geneval.layout import read_results
from danceopd.evaluation.geneval.models import load_detector


def command(folder, metadata, model, evaluators, *more):
    drawing = ("--num-inference-steps", "2", "--resolution", "32", "--dtype", "float32", "--samples", "2")
    looking = ("--detector", evaluators[0], "--clip", evaluators[1], "--device", "cpu")
    return [
        str(x)
        for x in ("evaluate", "geneval", folder, "--metadata", metadata, "--model", model, *drawing, *looking, *more)
    ]


def test_one_command_draws_scores_and_sums_up(tmp_path, model, evaluators, small, capsys):
    metadata = tmp_path / "m.jsonl"
    lines = [*METADATA, tiny.line("a photo of a red cup", "colors", clause("cup", color="red"))]
    metadata.write_text("\n".join(map(json.dumps, lines)))
    args = command(tmp_path / "out", metadata, model, evaluators)
    assert main(args) == 0
    first = capsys.readouterr().out
    assert "6 pictures drawn, 0 were there" in first
    records = read_results(tmp_path / "out" / "results.jsonl")
    assert list(records[0]) == ["filename", "tag", "prompt", "correct", "reason", "metadata", "details"]
    assert [one["tag"] for one in records] == ["single_object"] * 4 + ["colors"] * 2
    assert [json.loads(one["metadata"]) for one in records[::2]] == lines
    assert all(os.path.exists(one["filename"]) for one in records)
    for one in records:
        there = json.loads(one["details"])
        assert all(len(found) == 5 and found[4] > 0.3 for objects in there.values() for found in objects)
        if one["tag"] == "single_object":  # the verdict follows from the details
            assert one["correct"] is (json.loads(one["metadata"])["include"][0]["class"] in there)
    assert main(args) == 0
    again = capsys.readouterr().out
    assert "0 pictures drawn, 6 were there" in again
    assert "6 pictures scored, 0 were before" in first
    assert "0 pictures scored, 6 were before" in again
    assert again.splitlines()[2:] == first.splitlines()[2:]
    looked = [str(x) for x in (tmp_path / "out", "--detector", evaluators[0], "--clip", evaluators[1])]
    assert main(["evaluate", "geneval", *looked, "--results", str(tmp_path / "r.jsonl")]) == 0
    assert read_results(tmp_path / "r.jsonl") == records


class Seen:
    """A detector and the pictures that it looked at; after `limit` of them somebody stops it."""

    def __init__(self, limit=1000):
        self.pictures, self.limit = 0, limit

    def __call__(self, folder, device, classes):
        detect = load_detector(folder, device, classes)

        def look(pictures):
            if self.pictures + len(pictures) > self.limit:
                raise KeyboardInterrupt
            self.pictures += len(pictures)
            return detect(pictures)

        return look


def test_scoring_that_is_stopped_goes_on_and_only_what_changed_is_scored_again(
    tmp_path, evaluators, small, monkeypatch, capsys
):
    metadata = [tiny.line(), tiny.line("a red cup", "colors", clause("cup", color="red")), tiny.line("a dog again")]
    folder, results = tiny.save_pictures(tmp_path / "out", metadata), tmp_path / "scores" / "r.jsonl"
    kept = tmp_path / "scores" / "r.scored"

    def score(limit=1000, detector=evaluators[0], more=()):
        """(exit status, pictures looked at)"""
        seen = Seen(limit)
        monkeypatch.setattr(geneval_models, "load_detector", seen)
        args = [folder, "--detector", detector, "--clip", evaluators[1], "--results", results, "--device", "cpu", *more]
        return main(["evaluate", "geneval", *map(str, args)]), seen.pictures

    assert score(limit=4) == (130, 4)
    assert not results.exists()
    assert score() == (0, 2)
    assert "2 pictures scored, 4 were before" in capsys.readouterr().out
    resumed = read_results(results)
    # The same as in one go, and nothing is loaded or looked at again.
    assert score() == (0, 0)
    assert read_results(results) == resumed
    shutil.rmtree(kept)
    assert score() == (0, 6)
    assert read_results(results) == resumed
    # A line that is torn is scored again, and its file is mended.
    (first, second), torn = (kept / "00001.jsonl").read_text().splitlines(), kept / "00001.jsonl"
    for text in (f"{first}\n{second[:-9]}", f"{first[:40]}\n{second}\n", f"{first}\n[1]\n\x00"):
        torn.write_text(text)
        assert score() == (0, 1)
        mended = [json.loads(line) for line in torn.read_text().splitlines()]
        assert [line["key"] for line in mended] == [json.loads(line)["key"] for line in (first, second)]
    assert [line["correct"] for line in read_results(results)] == [line["correct"] for line in resumed]
    # So is a picture that was drawn again, all of a prompt that is another, and all for other eyes or options.
    tiny.picture(99).save(folder / "00002" / "samples" / "0001.png")
    assert score() == (0, 1)
    (folder / "00000" / "metadata.jsonl").write_text(json.dumps(tiny.line("a cat", "x", clause("cat"))))
    assert score() == (0, 2)
    assert {line["prompt"] for line in read_results(results)[:2]} == {"a cat"}
    assert score(more=("--max-overlap", "0.5")) == (0, 6)
    assert score(detector=tiny.save_detector(tmp_path / "other", seed=1)) == (0, 6)
    # A folder that is moved keeps its scores, under its new name.
    folder = folder.rename(tmp_path / "moved")
    assert score(detector=tmp_path / "other") == (0, 0)
    assert all(line["filename"].startswith(str(folder)) for line in read_results(results))


@pytest.mark.slow  # two more processes
def test_ranks_draw_and_score_what_one_process_does(tmp_path, model, evaluators, small, capsys):
    metadata = tmp_path / "m.jsonl"
    metadata.write_text("\n".join(json.dumps(tiny.line(f"a photo of dog {i}")) for i in range(3)))
    assert main(command(tmp_path / "one", metadata, model, evaluators)) == 0
    script = tmp_path / "rank.py"  # the detector sees small pictures there too
    script.write_text(
        "import sys\nfrom danceopd.evaluation.geneval import models as m\nm.SHORT, m.LONG = 96, 160\n"
        "from danceopd.cli.parser import main\nsys.exit(main(sys.argv[1:]))\n"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script]
    done = subprocess.run(
        [*launcher, *command(tmp_path / "two", metadata, model, evaluators)],
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert "6 pictures drawn, 0 were there" in done.stdout
    assert done.stdout.count("overall") == 1
    assert close(pixels(tmp_path / "two"), pixels(tmp_path / "one"), 0)
    one, two = (read_results(tmp_path / name / "results.jsonl") for name in ("one", "two"))
    assert [r["correct"] for r in one] == [r["correct"] for r in two]
    assert [r["filename"].split("/")[-3:] for r in one] == [r["filename"].split("/")[-3:] for r in two]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "give the FOLDER"),
        (["OUT"], "give --model to draw the pictures, --detector to score"),
        (["OUT", "--model", "M"], "--model draws the prompts of --metadata"),
        (["OUT", "--detector", "D", "--lora", "L"], "belong to a --model"),
        (["OUT", "--detector", "D", "--offload"], "--offload is for a CUDA device"),
        (["OUT", "--detector", "D"], "some prompts ask for colours; give --clip"),
        (["nowhere", "--detector", "D"], "there is no folder nowhere"),
        (["--results", "nowhere.jsonl"], "there is no file nowhere.jsonl"),
    ],
)
def test_commands_that_say_too_little_are_refused(tmp_path, monkeypatch, capsys, args, message):
    monkeypatch.chdir(tmp_path)
    tiny.save_pictures(tmp_path / "OUT", [tiny.line("red", "colors", clause("cup", color="red"))])
    assert main(["evaluate", "geneval", *args, "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err


def test_the_picture_worlds_evaluation_is_still_there(capsys):
    assert main(["evaluate", "nothing-of-this-name"]) == 2
    assert "embedded network" in capsys.readouterr().err
