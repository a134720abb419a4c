"""SECURITY.md: each of its promises names a test that exists, and a model's own files import what it says."""

import ast
import re
import sys
from pathlib import Path

from tests.test_structure import ROOT, imports_of


PROMISED = {"torch", "transformers", "PIL", "numpy", "sentence_transformers", "modeling_notellm2"}


def test_every_promise_names_a_test_that_is_there():
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "SECURITY.md").read_text(encoding="utf-8")))
    there = {
        node.name
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    }
    assert len(named) > 6
    assert not named - there


def test_a_models_files_import_little():
    """Remote code runs where only these are installed; sentence-transformers in its own module alone."""
    for path in Path(ROOT / "modeling_notellm2").glob("*.py"):
        packages = {name.split(".")[0] for name in imports_of(path)} - set(sys.stdlib_module_names)
        own = {"sentence_transformers"} if path.name.startswith("sentence_transformers") else set()
        assert not packages - (PROMISED - {"sentence_transformers"}) - own - {"huggingface_hub", "safetensors"}, path
