"""What a run computes in: one choice, said and kept, for the frozen encoder and its cache too; what is trained is float32."""

import json

import pytest
import torch
from transformers import AutoModel, AutoProcessor

from modeling_notellm2 import Precision
from tests.support.models import make_model
from training.batches.collators import ItemCollator
from training.batches.data import load_data
from training.batches.vision_cache import VisionCache
from training.evaluation.embed import embed, evaluate
from training.run import run
from training.trainer import arguments as arguments_module
from training.trainer.adapters import load_trainable, unwrap_adapter
from training.trainer.arguments import ModelArguments, NoteLLM2TrainingArguments, parse


@pytest.fixture
def options(coloured_tables, tiny_model_folder, tmp_path):
    """Command line options of two steps on the coloured items."""
    settings = {
        "model": tiny_model_folder,
        "items": coloured_tables / "items.parquet",
        "train_pairs": coloured_tables / "train.jsonl",
        "eval_pairs": coloured_tables / "test.jsonl",
        "eval_split": "test",
        "distinct_column": "colour",
        "output_dir": tmp_path / "run",
        "vision_cache_dir": tmp_path / "vision",
        "max_steps": 2,
        "per_device_train_batch_size": 6,
        "use_cpu": True,
        "report_to": "none",
    }
    return lambda **changes: [word for key, value in (settings | changes).items() for word in (f"--{key}", str(value))]


@pytest.mark.parametrize("chosen", ["float32", "bfloat16"])
def test_auto_takes_what_the_machine_has_and_says_why(options, tmp_path, monkeypatch, capsys, chosen):
    monkeypatch.setattr(
        arguments_module, "choose_precision", lambda dtype, device: Precision(chosen, f"{dtype} on {device}")
    )
    report = run(*parse(options()))
    assert report["precision"] == {"name": chosen, "reason": "auto on cpu"}
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["precision"] == report["precision"]
    assert report["settings"]["bf16"] == (chosen == "bfloat16")
    assert capsys.readouterr().out.splitlines()[0] == f"Precision: {chosen} (auto on cpu)"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("chunk_size", [0, 4])
def test_the_frozen_encoder_trains_in_the_precision_of_the_run(options, monkeypatch, dtype, chunk_size):
    """Its products, that is: the class token's embedding and norms stay as autocast has them."""
    seen = {True: set(), False: set()}
    loaded = {}

    def load_and_watch(*arguments):
        model = loaded["model"] = load_trainable(*arguments)
        encoder = unwrap_adapter(model).vision_model
        for part in encoder.modules():
            if isinstance(part, torch.nn.Linear):
                part.register_forward_hook(lambda m, i, output: seen[model.training].add(output.dtype))
        return model

    monkeypatch.setattr("training.run.load_trainable", load_and_watch)
    run(*parse(options(dtype=dtype, chunk_size=chunk_size)))
    assert seen == {True: {getattr(torch, dtype)}, False: {torch.float32}}  # measured in the type of the weights
    assert {parameter.dtype for parameter in loaded["model"].parameters()} == {torch.float32}


def test_the_vision_cache_follows(options, tmp_path):
    for dtype, stored in (("float32", torch.float16), ("bfloat16", torch.bfloat16)):
        root = tmp_path / dtype
        run(*parse(options(dtype=dtype, cache_vision_features=True, vision_cache_dir=root, max_steps=1)))
        (folder,) = root.iterdir()
        features = VisionCache(folder).read([0])
        assert features.last_hidden_state.dtype == features.pooler_output.dtype == stored
    folders = {folder.name for dtype in ("float32", "bfloat16") for folder in (tmp_path / dtype).iterdir()}
    assert len(folders) == 2  # neither run would read the other's


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_metrics_are_those_of_the_saved_model(options, tmp_path, dtype):
    """In the type of its weights, whatever it was trained in."""
    model, tables, arguments = parse(options(dtype=dtype, lora_r=2, merge_adapter=True))
    report = run(model, tables, arguments)
    data = load_data(tables, 0)
    saved = AutoModel.from_pretrained(tmp_path / "run" / "model", trust_remote_code=True)
    collate = ItemCollator(AutoProcessor.from_pretrained(tmp_path / "run" / "model", trust_remote_code=True))
    assert saved.dtype == torch.float32
    measured = evaluate(saved, collate, data.eval_items, data.eval_pairs, data.labels)
    assert {name: measured[name] for name in report["after"]} == report["after"]


def test_an_llm_that_is_only_read_stays_as_it_is_stored(options, tmp_path):
    """A 7B LLM of 16 bits needs no 28 GB; all that is trained is float32, and the whole computes in either precision."""
    stored, processor = make_model()
    stored.to(torch.bfloat16).save_pretrained(tmp_path / "stored")
    processor.save_pretrained(tmp_path / "stored")

    def types(**changes):
        model = load_trainable(ModelArguments(model=str(tmp_path / "stored"), **changes))
        return {(parameter.requires_grad, parameter.dtype) for parameter in model.parameters()}

    assert types(lora_r=2) == {(True, torch.float32), (False, torch.bfloat16)}
    assert types(lora_r=2, merge_adapter=True) == types() == {(True, torch.float32), (False, torch.float32)}
    for dtype in ("float32", "bfloat16"):
        output = tmp_path / dtype
        report = run(*parse(options(model=tmp_path / "stored", lora_r=2, dtype=dtype, output_dir=output)))
        adapter = AutoModel.from_pretrained(output / "model", trust_remote_code=True)
        data = load_data(parse(options())[1], 0)
        embedded = embed(adapter, data.eval_items, ItemCollator(processor), 32, "items")
        assert embedded.embeddings.isfinite().all()
        assert report["after"]["both/recall@100"] > 0


def test_dtype_and_transformers_switches_have_one_meaning(tmp_path):
    def precision(**given):
        arguments = NoteLLM2TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **given)
        return arguments.precision.name, arguments.bf16, arguments.fp16

    assert precision(dtype="bfloat16") == precision(bf16=True) == precision(dtype="bfloat16", bf16=True)
    assert precision(bf16=True) == ("bfloat16", True, False)
    assert precision(dtype="float32") == precision(bf16=False) == ("float32", False, False)
    assert precision(dtype="float16") == precision(fp16=True) == ("float16", False, True)
    assert precision(fp16=False) == precision()
    for given in (
        {"dtype": "float32", "bf16": True},
        {"dtype": "bfloat16", "bf16": False},
        {"dtype": "bfloat16", "fp16": True},
        {"bf16": True, "fp16": True},
    ):
        with pytest.raises(ValueError, match="contradict each other"):
            precision(**given)
    with pytest.raises(ValueError, match="dtype is 'half'"):
        precision(dtype="half")
