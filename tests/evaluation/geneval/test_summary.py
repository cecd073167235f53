"""GenEval's figures are those of the original tool."""

from geneval_runs import as_results, result

from danceopd.cli.parser import main
from danceopd.evaluation.geneval.layout import read_results
from danceopd.evaluation.geneval.summary import summary


def test_results_of_the_original_tool_are_summed_up_as_it_does(tmp_path, capsys):
    lines = [result("b", True, "p"), result("b", False, "p", 1), result("b", False, "q"), result("b", False, "q", 1)]
    lines += [result("a", True, "p")]
    scores = summary(read_results(as_results(tmp_path / "r.jsonl", lines)))
    assert scores["overall"] == (0.25 + 1) / 2
    assert list(scores["tags"]) == ["b", "a"]
    assert scores["tags"]["b"] == {"score": 0.25, "correct": 1, "pictures": 4}
    assert (scores["correct_pictures"], scores["correct_prompts"]) == (2 / 5, 2 / 3)
    assert (scores["pictures"], scores["prompts"]) == (5, 3)
    assert main(["evaluate", "geneval", "--results", str(tmp_path / "r.jsonl")]) == 0
    printed = capsys.readouterr().out
    assert "0.62500" in printed
    assert "1 of 4" in printed
