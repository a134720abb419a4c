"""Private names of other libraries that the code uses: each has a reason, and a new one fails here."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
OURS = ("modeling_notellm2", "training", "hub")
PRIVATE = re.compile(r"_[A-Za-z]\w*")
REASONS = {
    ("modeling_notellm2/modeling_notellm2.py", "_from_config"): "builds a part with the attention "
    "and type asked for; `from_config` is public for Auto classes alone, and Blip2QFormerModel has none",
    ("modeling_notellm2/towers_notellm2.py", "_from_config"): "the class is known, no Auto class gives it",
    ("modeling_notellm2/language_notellm2.py", "_from_config"): "the class is known, no Auto class gives it",
    ("modeling_notellm2/modeling_notellm2.py", "_attn_implementation"): "the only name under which a config holds it",
    (
        "modeling_notellm2/modeling_notellm2.py",
        "_experts_implementation",
    ): "the only name under which a config holds it",
    (
        "modeling_notellm2/precision_notellm2.py",
        "_is_mkldnn_bf16_supported",
    ): "torch says nowhere else what the CPU has",
    ("training/evaluation/saliency.py", "_attn_implementation"): "the only name under which a config holds it",
    ("training/tables/formats.py", "_fingerprint"): "datasets says nowhere else what content a data set has",
    ("training/trainer/trainer.py", "_prepare_inputs"): "moves a batch to the device as Trainer's own steps do",
}
"""File and name to why there is no public way."""


def defined_by_us(tree: ast.AST) -> Iterator[str]:
    """Names that a file gives to functions, classes, variables, attributes and modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr


def private_names(tree: ast.AST, own: set[str]) -> Iterator[str]:
    """Private attributes and imports that are none of ours."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and PRIVATE.fullmatch(node.attr) and node.attr not in own:
            yield node.attr
        elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] not in OURS:
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            yield from (name for name in names if PRIVATE.fullmatch(name) and not name.startswith("__"))


def test_every_private_name_of_another_library_has_a_reason():
    trees = {
        path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for folder in OURS
        for path in (ROOT / folder).rglob("*.py")
    }
    own = {name for tree in trees.values() for name in defined_by_us(tree)}
    used = {(path, name) for path, tree in trees.items() for name in private_names(tree, own)}
    assert not used - REASONS.keys(), "take the public way, or say here why there is none"
    assert not REASONS.keys() - used, "no longer used: take it off the list"
