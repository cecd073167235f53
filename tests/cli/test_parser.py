"""The command line's own answers: help, version, and a command that is not there."""

import re
import shlex
import shutil
import subprocess
import sys
from contextlib import suppress

import pytest

import danceopd
from danceopd.cli.parser import GROUPS, build_parser, main


def test_a_bare_command_shows_the_help(capsys):
    assert main([]) == 0
    assert "train a student as a configuration says, or go on where a run stopped" in capsys.readouterr().out


def test_the_version_names_the_commit(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert re.fullmatch(r"danceopd \d+\.\d+\.\d+( \([0-9a-f]{10}\+?\))?\n", said)
    assert said.split()[1] == danceopd.__version__


@pytest.mark.parametrize(("typed", "said"), [("trian", "did you mean 'train'?"), ("xyz", "danceopd --help lists them")])
def test_a_command_that_is_not_there_names_the_nearest(typed, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([typed])
    assert stopped.value.code == 2
    assert f"there is no command '{typed}'; {said}" in capsys.readouterr().err


def commands():
    """{name: parser} of every command and its actions."""
    waiting, found = [("", build_parser())], {}
    for name, parser in waiting:
        for action in parser._actions:
            if hasattr(action, "_name_parser_map"):
                waiting += [(f"{name} {inner}".strip(), own) for inner, own in action.choices.items()]
        if name and name != "data":
            found[name] = parser
    return found


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("--verion", "there is no option --verion; did you mean '--version'?"),
        ("merge-loras a b --base c -o d.safetensors --stesp=3", "no option --stesp; did you mean '--steps'?"),
        ("data check rows.jsonl --cach x", "there is no option --cach"),
        ("merge-loras a b --base c -o d.safetensors --layout comfy", "'comfy' is not valid; did you mean 'comfyui'?"),
        ("plan --config c.yaml --gpu h10", "'h10' is not valid; did you mean 'h100'?"),
        ("data chekc", "there is no command 'chekc'; did you mean 'check'?"),
        ("data", "ACTION: one of check, prepare, import, world"),
        ("evaluate genveal pictures", "there is no evaluation 'genveal'; did you mean 'geneval'?"),
        ("evaluate base --seed -5", "argument --seed: must be at least 0, not -5"),
        ("sample base x -o a.png --seed 1 4294967296", "--seed: must be at most 4294967295, not 4294967296"),
        ("sample base x --seed 1.5", "--seed: must be a whole number, not '1.5'"),
        ("sample base x --num-inference-steps 999999999", "must be at most 10000, not 999999999"),
        ("sample miniature x --resolution 0", "--resolution: must be at least 1, not 0"),
        ("sample miniature x --resolution 100000", "--resolution: must be at most 16384, not 100000"),
        ("sample base x --guidance-scale 1 nan", "--guidance-scale: must be a number, not 'nan'"),
        ("sample base x --shift 0", "--shift: must be above 0, not 0"),
        ("evaluate base --per-task 0", "--per-task: must be at least 1, not 0"),
        ("evaluate geneval a --detector b --samples 0", "--samples: must be at least 1, not 0"),
        ("evaluate gedit a -o b --max-calls 0", "--max-calls: must be at least 1, not 0"),
        ("init --gpus 0", "--gpus: must be at least 1, not 0"),
        ("init --gpus two", "--gpus: must be a whole number, not 'two'"),
        ("merge-loras a b --base c -o d.safetensors --rank half", "must be a whole number or auto, not 'half'"),
        ("watch runs --port 65536", "--port: must be at most 65535, not 65536"),
        ("evaluate geneval a --detector b --max-overlap 1.5", "--max-overlap: must be at most 1, not 1.5"),
        ("check-model m --tolerance 0", "--tolerance: must be above 0, not 0"),
    ],
)
def test_what_is_mistyped_is_answered_with_the_nearest(typed, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main(shlex.split(typed))
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_an_option_may_be_shortened():
    line = ["merge-loras", "a", "b", "--base", "c", "-o", "d.safetensors", "--guidance", "2"]
    assert build_parser().parse_args(line).guidance_scale == 2


def test_the_help_has_every_command_once_in_a_group(capsys):
    assert main([]) == 0
    said = capsys.readouterr().out
    for title, _ in GROUPS:
        assert f"\n{title}:\n" in said
    for name in commands():
        if not name.startswith("data "):
            assert len(re.findall(rf"^  {re.escape(name)}  ", said, re.M)) == 1, name
    assert max(map(len, said.splitlines())) <= 120


@pytest.mark.parametrize("name", commands())
def test_every_argument_is_explained_and_its_default_named(name):
    for action in commands()[name]._actions:
        said = action.help
        if said == "==SUPPRESS==":
            continue
        what = action.option_strings or action.dest
        assert said, what
        assert said[0] != "(", f"{what}: only its default is said"
        shown = said % vars(action) if "%(" in said else said
        if action.default not in (None, False, (), [], "==SUPPRESS=="):
            assert "(default: " in shown, what
            usual = action.default if isinstance(action.default, list) else [action.default]
            named = shown.partition("(default: ")[2]
            assert all((f"{one:g}" if isinstance(one, float) else str(one)) in named for one in usual), what


@pytest.mark.parametrize("name", commands())
def test_every_command_has_an_example_that_its_parser_takes(name):
    said = commands()[name].format_help()
    example = said[said.index("example") :].partition("\n")[2].replace("\\\n", " ")
    lines = [line for line in example.splitlines() if " ".join(line.split()).startswith("danceopd")]
    assert lines, said
    for line in lines:
        words = shlex.split(line.split(">")[0], comments=True)[1:]
        if words[0] == "evaluate" and words[1] in ("geneval", "gedit", "reward"):
            words[:2] = [" ".join(words[:2])]
        args = build_parser().parse_args(words)
        assert args.run is not None
        assert words[0] == name.split()[0] or words[0] == name


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_prints_a_script_that_the_shell_takes(shell, capsys, tmp_path):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for word in ("merge-loras", "--guidance-scale", "prepare"):
        assert word in script
    if shutil.which(shell):
        (tmp_path / "script").write_text(script)
        subprocess.run([shell, "-n", tmp_path / "script"], check=True, timeout=60)


def test_bash_completes_commands_and_options(tmp_path, capsys):
    main(["completion", "bash"])
    (tmp_path / "script").write_text(capsys.readouterr().out)

    def completed(*words):
        line = f"COMP_WORDS=({' '.join(map(shlex.quote, words))}); COMP_CWORD={len(words) - 1}"
        ask = f"source {tmp_path}/script; {line}; _shtab_danceopd; printf '%s\\n' \"${{COMPREPLY[@]}}\""
        ran = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, timeout=60, check=True)
        return [word.strip() for word in ran.stdout.split()]

    assert completed("danceopd", "merge") == ["merge-loras"]
    assert completed("danceopd", "data", "pre") == ["prepare"]
    assert "--guidance-scale" in completed("danceopd", "sample", "--g")


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("sample base x -o a.jpg", "a.jpg must end in .png"),
        ("edit edit a.png x -o folder.png", "folder.png is a folder; give the file to write"),
        ("compare a b -o a.png", "a.png must end in .html"),
        ("init -o a.json", "a.json must end in .yaml or .yml"),
        ("evaluate base --json a.txt", "a.txt must end in .json"),
        ("evaluate base --pictures file/a", "is no folder, so nothing can be written into it"),
        ("sample base x -o file/deep/a.png", "is no folder"),
        ("data prepare a.jsonl --model m --cache file", "is no folder"),
        ("data import a file/out", "is no folder"),
        ("data world file/out", "is no folder"),
        ("export run -o file/out", "is no folder"),
        ("evaluate gedit set -o file/out", "is no folder"),
        ("evaluate reward a --json file/a.json", "is no folder"),
        ("reproduce A --work file/out", "is no folder"),
        ("evaluate geneval file --model m --metadata a", "is no folder"),
        ("evaluate geneval a --results file/a.jsonl --detector d", "is no folder"),
        ("merge-loras a b --base m -o file/a.safetensors", "is no folder"),
    ],
)
def test_what_cannot_be_written_is_said_before_anything_is_computed(typed, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    with suppress(SystemExit):  # of argparse
        assert main(shlex.split(typed)) == 2
    assert said in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]


def test_the_parser_and_completion_load_no_torch():
    code = "import sys; from danceopd.cli import main; main(['completion', 'bash']); print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert ran.stdout.rstrip().endswith("False")


@pytest.mark.parametrize("written", ["--local_rank=1 doctor --json", "train --config c.yaml --local_rank=1"])
def test_what_a_launcher_of_deepspeed_adds_is_taken(written):
    """It stands before the command with ``--module danceopd``, and behind it with ``train.py``."""
    assert build_parser().parse_args(written.split()).command == written.replace("--local_rank=1 ", "").split()[0]
