"""What is not imported: torch takes seconds, so whatever runs no model starts without it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support.catalogue import write_index


ROOT = Path(__file__).resolve().parents[1]
SLOW = {"torch", "datasets", "scipy"}
LATE = """
import sys
{code}
print("LATE", *(name for name in {names} if name in sys.modules))
"""


def late_imports(code: str, names: set[str]) -> set[str]:
    """Which of the named modules a fresh process has imported after it ran the code."""
    script = LATE.format(code=code, names=sorted(names))
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    return set(run.stdout.splitlines()[-1].split()[1:])


def test_a_search_by_id_runs_without_torch(tmp_path):
    index = write_index(np.array([[1, 0], [0.8, 0.6], [0, 1]]), tmp_path)
    code = (
        f"from hub.index import main\nassert main(['search', '--index', {str(index)!r}, '--id', 'n0', '-k', '2']) == 0"
    )
    assert late_imports(code, SLOW) == set()


def test_the_package_brings_torch_with_the_first_name_that_needs_it():
    code = "import modeling_notellm2\nassert 'NoteLLM2Model' in modeling_notellm2.__all__\n"
    code += "from modeling_notellm2 import DTYPES, ItemError"
    assert late_imports(code, {*SLOW, "transformers"}) == set()
    registered = "from modeling_notellm2 import *\nfrom transformers import AutoConfig\n"
    registered += "assert AutoConfig.for_model('notellm2').__class__ is NoteLLM2Config"
    assert late_imports(registered, {"torch"}) == {"torch"}


def test_the_package_has_no_other_names():
    import modeling_notellm2

    assert all(getattr(modeling_notellm2, name) is not None for name in modeling_notellm2.__all__)
    with pytest.raises(AttributeError, match="no attribute 'NoteLLM3Model'"):
        _ = modeling_notellm2.NoteLLM3Model


@pytest.mark.parametrize("command", ["hub.card", "hub.index", "hub.publish", "training.mine", "training.report"])
def test_commands_without_a_model_start_without_torch(command):
    assert late_imports(f"import {command}", {"torch"}) == set()
