"""FSDP2 on gloo processes: weights in shards, and the losses, gradients and weights of one process on the joined batch.

accelerate enables no FSDP on CPUs by itself; `training.trainer.distributed.shard_on_cpu` does, and from there on it is the
way that GPUs go. Processes are started once for each number of them, and tell everything that the tests look at.
"""

import os
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, AutoProcessor, TrainerCallback

from tests.training.trainer.test_loss_processes import in_processes, item, undropped_model
from training.batches.collators import ItemCollator, PairCollator, PairDataset
from training.evaluation.embed import embed
from training.tables.pairs import PairTable
from training.trainer.adapters import CHECKPOINTED, save_merged, with_lora
from training.trainer.arguments import ModelArguments, NoteLLM2TrainingArguments
from training.trainer.distributed import once_per_machine, whole
from training.trainer.trainer import NoteLLM2Trainer


PAIRS_OF_ALL = 4
STEPS = 5
PICTURED = set(range(19))
"""Of forty items: the pairs of the others are texts alone, so that some processes have a batch without images."""
ADAM = {"optim": "adamw_torch", "learning_rate": 1e-3}
FSDP = {"fsdp": True, "fsdp_config": {"state_dict_type": "FULL_STATE_DICT"}}


class Items(list):
    """Forty items, half of them with pictures, in pairs of neighbours."""

    def __init__(self) -> None:
        super().__init__({"item_id": f"i{n}", **item(n, n in PICTURED)} for n in range(40))
        self.item_ids = [f"i{n}" for n in range(40)]


class Witness(TrainerCallback):
    """Gradients before each step, losses after it."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.losses: list[float] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        named = ((name, p.grad) for name, p in model.named_parameters())
        self.gradients.append({name: whole(gradient).clone() for name, gradient in named if gradient is not None})

    def on_log(self, args, state, control, logs=None, **_):
        if "multimodal_loss" in logs:
            self.losses.append(logs["multimodal_loss"])


class Gathered(TorchDispatchMode):
    """Bytes of all weights that were gathered, and how many times."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.times = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.c10d._allgather_base_.default:
            self.bytes += args[0].nbytes
            self.times += 1
        return result


def make_trainer(folder: Path, world: int, lora: bool = False, **options: Any) -> tuple[NoteLLM2Trainer, Witness]:
    model, processor = undropped_model()
    model.name_or_path = str(folder.parent / "base")
    if lora:
        torch.manual_seed(0)
        model = with_lora(model, ModelArguments(model="base", lora_r=4, lora_dropout=0.0))
    pairs = np.arange(40, dtype=np.int32).reshape(20, 2)
    settings = {"learning_rate": 0.05, "connector_learning_rate": 0.05, "optim": "sgd", "lr_scheduler_type": "constant"}
    settings |= {"max_steps": STEPS, "logging_steps": 1, "save_strategy": "steps", "save_steps": 3, "warmup_steps": 0}
    arguments = NoteLLM2TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        dtype="float32",
        report_to="none",
        per_device_train_batch_size=PAIRS_OF_ALL // world,
        disable_tqdm=True,
        ddp_backend="gloo" if world > 1 else None,
        max_grad_norm=0.0,
        **(settings | options),
    )
    collate = ItemCollator(processor)
    trainer = NoteLLM2Trainer(
        model=model,
        args=arguments,
        train_dataset=PairDataset(Items(), PairTable(pairs)),
        data_collator=PairCollator(collate),
        processing_class=processor,
    )
    witness = Witness()
    trainer.add_callback(witness)
    return trainer, witness


def outcome(trainer: NoteLLM2Trainer, witness: Witness) -> dict[str, Any]:
    named = ((name.replace(CHECKPOINTED, ""), p) for name, p in trainer.model.named_parameters())
    weights = {name: whole(p).clone() for name, p in named if p.requires_grad}
    return {"losses": witness.losses, "gradients": witness.gradients, "weights": weights}


def start(rank: int, world: int) -> None:
    """What torchrun tells a process."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}


def four_processes(folder: Path, rank: int, world: int) -> dict[str, Any]:
    """Plain steps and chunked ones, and an evaluation with fewer items than processes."""
    start(rank, world)
    results: dict[str, Any] = {}
    trainer, witness = make_trainer(folder / "plain", world, save_strategy="no", **FSDP)
    imageless: list[bool] = []
    count = trainer.model.register_forward_hook(lambda _, __, output: imageless.append(not output.has_image.any()))
    trainer.train()
    count.remove()
    results["plain"] = outcome(trainer, witness)
    results["imageless"] = imageless
    results["kinds"] = {
        name: (isinstance(p, DTensor), p.to_local().numel() if isinstance(p, DTensor) else p.numel(), p.numel())
        for name, p in trainer.model.named_parameters()
    }
    for count in (9, 3):
        items = list(Items())[10 : 10 + count]
        embedded = embed(trainer.model, items, trainer.data_collator.collate_items, 2, "items")
        alone, processor = undropped_model()
        alone.load_state_dict({name: whole(p) for name, p in trainer.model.state_dict().items()})
        expected = alone.eval()(**processor(items, return_tensors="pt"))
        torch.testing.assert_close(embedded.embeddings, expected.embeddings.detach(), atol=1e-5, rtol=0)
        assert embedded.has_image.tolist() == expected.has_image.tolist()

    for name, options in {"chunks": {}, "regathered": {"gather_for_each_chunk": True}}.items():
        trainer, witness = make_trainer(folder / name, world, save_strategy="no", chunk_size=1, **FSDP, **options)
        with Gathered() as gathered:
            trainer.train()
        results[name] = outcome(trainer, witness) | {"bytes": gathered.bytes, "times": gathered.times}
    trainer, witness = make_trainer(folder / "vision", world, save_strategy="no", shard_frozen_vision=True, **FSDP)
    trainer.train()
    results["vision"] = outcome(trainer, witness)
    results["vision_sharded"] = all(isinstance(p, DTensor) for p in trainer.model.parameters())
    return results


def alone(folder: Path, **options: Any) -> dict[str, Any]:
    """One process on the joined batch."""
    trainer, witness = make_trainer(folder, 1, save_strategy="no", **options)
    trainer.train()
    return outcome(trainer, witness)


@pytest.fixture(scope="module")
def in_four(tmp_path_factory):
    folder = tmp_path_factory.mktemp("four")
    return in_processes(partial(four_processes, folder), [4], folder)[4], alone(folder / "alone")


def assert_as_one_process(result: dict[str, Any], expected: dict[str, Any]) -> None:
    assert len(expected["losses"]) == STEPS
    assert result["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    for mine, theirs in zip(
        [*result["gradients"], result["weights"]], [*expected["gradients"], expected["weights"]], strict=True
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "chunks", "regathered", "vision"])
def test_four_processes_with_shards_train_as_one(in_four, kind):
    results, expected = in_four
    for result in results:
        assert_as_one_process(result[kind], expected)
    first = dict(undropped_model()[0].named_parameters())
    moved = [name for name, value in expected["weights"].items() if not torch.equal(value, first[name])]
    assert len(moved) > 60


@pytest.mark.slow
def test_weights_are_in_shards_and_the_frozen_encoder_whole_unless_asked(in_four):
    results, _ = in_four
    for name in results[0]["kinds"]:
        kinds = [result["kinds"][name] for result in results]
        sharded = not name.startswith("vision_model.")
        assert all(is_dtensor == sharded for is_dtensor, _, _ in kinds), name
        assert sum(here for _, here, _ in kinds) == kinds[0][2] * (1 if sharded else 4)
    assert all(result["vision_sharded"] for result in results)
    texts_alone = [sum(result["imageless"]) for result in results]
    assert sum(texts_alone) >= 5  # a process without any image beside others that have some
    assert any(0 < sum(result["imageless"][step] for result in results) < 4 for step in range(STEPS))


@pytest.mark.slow
def test_chunks_gather_every_weight_once_a_step(in_four):
    """Two chunks of one item in two passes: once a step, not once for every chunk, pass and direction."""
    results, _ = in_four
    sizes = {name: size for name, (is_dtensor, _, size) in results[0]["kinds"].items() if is_dtensor}
    model = 4 * sum(sizes.values())
    for result in results:
        assert model * STEPS <= result["chunks"]["bytes"] <= 1.05 * model * STEPS  # with each group's padding
        assert result["regathered"]["bytes"] > 3 * result["chunks"]["bytes"]


# Checkpoints, adapters, work once per machine -------------------------------------------------------------------------


def two_processes(folder: Path, rank: int, world: int) -> dict[str, Any]:
    """Checkpoints of both kinds and what comes after them; LoRA with shards; failures in work that one process does."""
    start(rank, world)
    results: dict[str, Any] = {}
    for kind in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
        options = {
            "fsdp": True,
            "fsdp_config": {"state_dict_type": kind},
            "optim": "adamw_torch",
            "learning_rate": 1e-3,
        }
        whole_run, witness = make_trainer(folder / kind, world, **options)
        whole_run.train()
        results[kind] = outcome(whole_run, witness)
        whole_run.save_model(str(folder / kind / "model"))
        dist.barrier()
        further, witness = make_trainer(folder / f"{kind}-further", world, **options)
        further.train(resume_from_checkpoint=str(folder / kind / "checkpoint-3"))
        results[f"{kind}-further"] = outcome(further, witness)
    recomputed = {"fsdp": True, "fsdp_config": {"state_dict_type": "FULL_STATE_DICT", "activation_checkpointing": True}}
    trainer, witness = make_trainer(folder / "lora", world, lora=True, **recomputed, **ADAM)
    trainer.train()
    results["lora"] = outcome(trainer, witness)
    results["lora_kinds"] = [isinstance(p, DTensor) for n, p in trainer.model.named_parameters() if "vision" not in n]
    trainer.save_model(str(folder / "lora" / "adapter"))
    further, witness = make_trainer(folder / "lora-further", world, lora=True, **recomputed, **ADAM)
    further.train(resume_from_checkpoint=str(folder / "lora" / "checkpoint-3"))
    results["lora-further"] = outcome(further, witness)

    done: list[int] = []
    results["once"] = once_per_machine(lambda: [done.append(rank), {"from": rank, "items": Items()[3]["title"]}][1])
    results["done"] = done
    with pytest.raises(ValueError, match="by the first"):
        once_per_machine(partial(_fail, rank))
    os.environ["LOCAL_WORLD_SIZE"] = "1"  # as on two machines
    results["own"] = once_per_machine(lambda: rank)
    with pytest.raises(ValueError, match="by the second"):
        once_per_machine(partial(_fail, rank - 1) if rank else (lambda: rank))
    return results


def _fail(rank: int) -> None:
    raise ValueError("by the first" if rank == 0 and os.environ["LOCAL_WORLD_SIZE"] != "1" else "by the second")


@pytest.fixture(scope="module")
def in_two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    model, processor = undropped_model()
    model.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    return in_processes(partial(two_processes, folder), [2], folder)[2], folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", "SHARDED_STATE_DICT", "lora"])
def test_a_resumed_run_in_shards_ends_with_the_same_weights(in_two, kind):
    results, _ = in_two
    for result in results:
        once, twice = result[kind], result[f"{kind}-further"]
        assert twice["losses"] == once["losses"][3:]
        assert once["weights"].keys() == twice["weights"].keys()
        assert all(torch.equal(once["weights"][name], value) for name, value in twice["weights"].items())


@pytest.mark.slow
def test_models_are_saved_whole_whatever_the_checkpoints_are(in_two):
    results, folder = in_two
    for kind in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
        model = AutoModel.from_pretrained(folder / kind / "model", trust_remote_code=True)
        assert AutoProcessor.from_pretrained(folder / kind / "model", trust_remote_code=True) is not None
        assert model.config.architectures == ["NoteLLM2Model"]
        named = dict(model.named_parameters())
        for name, value in results[0][kind]["weights"].items():
            assert torch.equal(named[name], value), name
        written = {path.name for path in (folder / kind / "checkpoint-3").iterdir()}
        assert ("model.safetensors" in written) == (kind == "FULL_STATE_DICT")
        assert ("pytorch_model_fsdp_0" in written) == (kind == "SHARDED_STATE_DICT")
        assert "files.json" in written


@pytest.mark.slow
def test_adapters_trained_in_shards_are_merged_from_the_gathered_whole(in_two, tmp_path):
    results, folder = in_two
    assert all(results[0]["lora_kinds"])
    save_merged(folder / "lora" / "adapter", tmp_path / "merged", torch.float32)
    merged = AutoModel.from_pretrained(tmp_path / "merged", trust_remote_code=True).eval()
    alone_model, processor = undropped_model()
    torch.manual_seed(0)
    wrapped = with_lora(alone_model, ModelArguments(model="base", lora_r=4, lora_dropout=0.0)).eval()
    trained = results[0]["lora"]["weights"]
    assert sum("lora_" in name for name in load_file(folder / "lora" / "adapter" / "adapter_model.safetensors")) == 28
    assert set(trained) == {name for name, p in wrapped.named_parameters() if p.requires_grad}
    wrapped.load_state_dict(trained, strict=False)
    inputs = processor(list(Items())[15:25], return_tensors="pt")
    torch.testing.assert_close(merged(**inputs).embeddings, wrapped(**inputs).embeddings, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_work_of_a_machine_is_done_once_and_fails_everywhere(in_two):
    results, _ = in_two
    assert [result["done"] for result in results] == [[0], []]
    assert all(result["once"] == {"from": 0, "items": "item 3 xxx"} for result in results)
    assert [result["own"] for result in results] == [0, 1]
