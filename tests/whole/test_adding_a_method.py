"""The example of docs/adding-a-method.md works as it is printed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from danceopd.config.reading import load_config
from danceopd.core.methods import METHODS
from danceopd.support.errors import UserError
from danceopd.training.loop import Trainer
from danceopd.world.build import build

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", (ROOT / "docs" / "adding-a-method.md").read_text(), re.DOTALL)
CODE, REGISTRATION = [text for kind, text in BLOCKS if kind == "python"]
COMMAND, MESSAGE = [text for kind, text in BLOCKS if not kind]


@pytest.fixture
def example():
    names = {}
    exec(compile(CODE, "nudged.py", "exec"), names)
    exec(REGISTRATION, {"METHODS": METHODS, **names})
    yield names["nudged"]
    del METHODS["nudged"]


def test_it_trains_with_its_option_and_counts(example, tmp_path):
    config = load_config(
        ROOT / "configs" / "setting_a.yaml",
        [f"training.output_dir={tmp_path}", "training.batch_size=8"],
    )
    config = config.model_copy(update={"method": "nudged", "options": {"share": 0.3}})
    assert config.method_options() == {"share": 0.3}
    trainer = Trainer(config, build(config))
    record = trainer.update()
    assert record["loss"] > 0
    assert record["gradient_norm"] > 0
    assert trainer.evaluations["sources"] == 2 * 8


def test_the_message_is_the_real_one(tmp_path):
    """A process of its own, whose registry holds the method before the configuration's class is made."""
    (tmp_path / "nudged.py").write_text(CODE)
    overrides = ["method=nudged", "options.shar=1", "training.output_dir=x"]
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from danceopd.core.methods import METHODS\nfrom nudged import nudged\n"
        f"{REGISTRATION}"
        "from danceopd.cli.parser import main\n"
        f"sys.exit(main(['train', '--config', 'configs/setting_a.yaml', *{overrides!r}]))\n"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == MESSAGE


def test_without_the_line_the_method_is_unknown():
    with pytest.raises(UserError, match="nudged"):
        load_config(ROOT / "configs" / "setting_a.yaml", ["method=nudged"])
