"""Private names of other libraries, used or overridden: each has a reason, and a new one fails here."""

import ast
import importlib
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
    ("modeling_notellm2/joining_notellm2.py", "_attn_implementation"): "the only name under which a config holds it",
    (
        "modeling_notellm2/joining_notellm2.py",
        "_experts_implementation",
    ): "the only name under which a config holds it",
    (
        "modeling_notellm2/precision_notellm2.py",
        "_is_mkldnn_bf16_supported",
    ): "torch says nowhere else what the CPU has",
    ("modeling_notellm2/language_notellm2.py", "_attn_implementation"): "the only name under which a config holds it",
    ("modeling_notellm2/packing_notellm2.py", "_attn_implementation"): "the only name under which a config holds it",
    ("training/evaluation/saliency.py", "_attn_implementation"): "the only name under which a config holds it",
    ("training/tables/formats.py", "_fingerprint"): "datasets says nowhere else what content a data set has",
    ("training/trainer/stopping.py", "_exit"): "Python's documented name; a thread can end its process no other way",
    ("training/trainer/trainer.py", "_prepare_inputs"): "moves a batch to the device as Trainer's own steps do",
}
"""File and name to why there is no public way."""

MODEL_CLASS = "how transformers asks every model class to say it; its guide for new models names no other way"
METRIC_CLASS = "the method that evaluate's guide for new metrics asks for"
OVERRIDDEN = {
    ("NoteLLM2PreTrainedModel", "_init_weights"): MODEL_CLASS,
    ("NoteLLM2PreTrainedModel", "_no_split_modules"): MODEL_CLASS,
    ("NoteLLM2PreTrainedModel", "_supports_attention_backend"): MODEL_CLASS,
    ("NoteLLM2PreTrainedModel", "_supports_flash_attn"): MODEL_CLASS,
    ("NoteLLM2PreTrainedModel", "_supports_flex_attn"): MODEL_CLASS,
    ("NoteLLM2PreTrainedModel", "_supports_sdpa"): MODEL_CLASS,
    ("NoteLLM2CardData", "_format_example_value"): "the card shows a dict, an item, as Python "
    "prints it, its picture with it; the public steps around it (`compute_dataset_metrics`) have no say in one cell",
    ("I2IRecall", "_info"): METRIC_CLASS,
    ("I2IRecall", "_compute"): METRIC_CLASS,
}
"""Class of ours and private member of another library's class that it replaces, to what public way was looked for."""


def parsed() -> dict[str, ast.Module]:
    """The code of every file of ours, by its path."""
    return {
        path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for folder in OURS
        for path in (ROOT / folder).rglob("*.py")
    }


def defined_by_us(tree: ast.AST) -> Iterator[str]:
    """Names that a file gives to functions, classes, variables, attributes and modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
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
    trees = parsed()
    own = {name for tree in trees.values() for name in defined_by_us(tree)}
    used = {(path, name) for path, tree in trees.items() for name in private_names(tree, own)}
    assert not used - REASONS.keys(), "take the public way, or say here why there is none"
    assert not REASONS.keys() - used, "no longer used: take it off the list"


def private_members(node: ast.ClassDef) -> set[str]:
    """Methods and attributes with private names that stand in a class's body."""
    targets = [getattr(part, "name", None) or getattr(part, "target", None) for part in node.body]
    targets += [target for part in node.body if isinstance(part, ast.Assign) for target in part.targets]
    names = {getattr(target, "id", target) for target in targets}
    return {name for name in names if isinstance(name, str) and PRIVATE.fullmatch(name)}


def overridden_private_members() -> Iterator[tuple[str, str]]:
    """Private members of our classes that a base of another library has too; only their modules are imported."""
    for path, tree in parsed().items():
        for node in tree.body:
            if not (isinstance(node, ast.ClassDef) and node.bases and (members := private_members(node))):
                continue
            module = importlib.import_module(path.removesuffix("/__init__.py").removesuffix(".py").replace("/", "."))
            bases = getattr(module, node.name).__mro__[1:]
            others = [base for base in bases if base.__module__.split(".")[0] not in OURS]
            yield from ((node.name, name) for name in members if any(name in vars(base) for base in others))


def test_every_private_member_that_a_class_of_ours_overrides_has_a_reason():
    overridden = set(overridden_private_members())
    assert not overridden - OVERRIDDEN.keys(), "take the public way, or say here why there is none"
    assert not OVERRIDDEN.keys() - overridden, "no longer overridden: take it off the list"
