"""The command line's own answers: help, version, and a command that is not there."""

import re

import pytest

from danceopd.cli.parser import main


def test_a_bare_command_shows_the_help(capsys):
    assert main([]) == 0
    assert "train, or go on where a run stopped" in capsys.readouterr().out


def test_the_version_names_the_commit(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert re.fullmatch(r"danceopd \d+\.\d+\.\d+( \([0-9a-f]{10}\+?\))?\n", capsys.readouterr().out)


@pytest.mark.parametrize(("typed", "said"), [("trian", "did you mean 'train'?"), ("xyz", "danceopd --help lists them")])
def test_a_command_that_is_not_there_names_the_nearest(typed, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([typed])
    assert stopped.value.code == 2
    assert f"there is no command '{typed}'; {said}" in capsys.readouterr().err
