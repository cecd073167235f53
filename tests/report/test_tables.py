"""Results as tables of text and of Markdown."""

from report_results import SCORES, make_results

from danceopd.report.tables import format_markdown, format_table


def test_format_table_is_aligned_and_holds_the_figures():
    lines = format_table(make_results()).split("\n")
    assert len(lines) == 2 + len(SCORES)
    assert len({len(line) for line in lines}) == 1
    assert " ".join(lines[-1].split()) == "danceopd 0.861 ± 0.012 97.8 % 7.48 ± 0.14 98.4 % yes"
    assert lines[2].endswith("no")


def test_format_markdown_has_one_width_and_bold_best():
    lines = format_markdown(make_results()).split("\n")
    assert {line.count("|") for line in lines} == {7}
    assert lines[-1] == "| DanceOPD | 0.861 ± 0.012 | 97.8 % | 7.48 ± 0.14 | 98.4 % | yes |"
    assert "| **0.880** ± 0.012 |" in lines[3]
    assert "**7.60** ± 0.14" in lines[4]


def test_tables_of_a_lone_row_without_sources():
    results = {"rows": [{"name": "danceopd", "geneval": {"overall": 0.5}}]}
    assert format_table(results).split("\n")[-1].split() == ["danceopd", "0.500", "–", "–", "–", "no"]
    assert format_markdown(results).split("\n")[-1] == "| DanceOPD | 0.500 | – | – | – | no |"
