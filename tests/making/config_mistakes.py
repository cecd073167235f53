"""What a configuration's reader says of mistakes."""

import pytest

from danceopd.config.reading import load_config
from danceopd.support.errors import UserError

DEMO = "configs/demo.yaml"


def mistakes(*overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load_config(DEMO, list(overrides))
    return str(error.value)
