from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from tests.doctor.machines import Machine, build


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """Makes a recorded machine below this test's folder."""
    return partial(build, tmp_path)
