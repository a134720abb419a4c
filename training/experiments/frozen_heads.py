"""What the model's head can make of a frozen LLM: `python -m training.experiments.frozen_heads --models BASE ...`.

The LLM reads each item's texts once, and the vision encoder each picture. On what they give, the model's own late fusion and
reduction are trained on the train pairs, in batches of the model's own make, and measured on the unseen items: with both
modalities, and the same head with the text alone. It takes seconds where training the LLM takes an hour, so that read-outs,
numbers of layers and standardization can be compared with seeds. No visual token is in it, and nothing of the LLM moves.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModel, AutoProcessor, set_seed

from modeling_notellm2 import contrastive_pair_loss
from modeling_notellm2.fusion_notellm2 import NoteLLM2LateFusion, NoteLLM2Standardization
from modeling_notellm2.inputs_notellm2 import last_position, states_at
from modeling_notellm2.readout_notellm2 import mean_of
from training.batches.collators import cache_vision_features
from training.batches.data import RunData, load_data
from training.batches.sampling import DistinctItemsSampler
from training.evaluation.baselines import baseline_embeddings
from training.evaluation.embed import measure
from training.experiments.findings_runs import epochs_of, minilm_folder, text_of
from training.experiments.findings_table import estimate
from training.tables.commands.bounds import AtLeastOne, check_bounds
from training.tables.commands.files import write_text
from training.tables.commands.handler import DONE, command, parse
from training.tables.commands.model_folder import loading
from training.trainer.arguments import DataArguments


BATCH, READ_AT_ONCE = 16, 32
RATE, SCALE_RATE, WARM_UP = 3e-3, 3e-2, 0.1
FIGURES = ("both/recall@10", "both/precision@10", "text/recall@10", "text/precision@10")


@dataclass
class FrozenHeadsArguments:
    """Which LLMs, on which data."""

    models: list[str] = field(metadata={"help": "Folders that hub/assemble.py wrote; they share a vision encoder."})
    data: str = field(metadata={"help": "Folder with items.parquet, train_pairs.parquet and test_pairs.parquet."})
    output: str = field(metadata={"help": "JSON lines file of all runs."})
    seeds: AtLeastOne = field(default=5, metadata={"help": "Runs of each, counted from 0."})
    steps: AtLeastOne = field(default=400, metadata={"help": "Batches of 16 pairs."})

    def __post_init__(self) -> None:
        check_bounds(self)


class Head(nn.Module):
    """The model's own late fusion and reduction on ready states."""

    def __init__(self, config: Any, states: Tensor, standardize: bool):
        super().__init__()
        config.text_hidden_size = states.shape[1]
        self.standardization: nn.Module = nn.Identity()
        if standardize:
            measured = NoteLLM2Standardization(config)
            measured.fit(states)
            self.standardization = measured
        self.late_fusion = NoteLLM2LateFusion(config)
        self.reduction = nn.Linear(states.shape[1], config.embedding_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.full((1,), float(config.logit_scale_init)))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)

    def forward(self, states: Tensor, summary: Tensor | None) -> Tensor:
        hidden = self.standardization(states)
        hidden = hidden if summary is None else self.late_fusion(hidden, summary)
        return F.normalize(self.reduction(hidden), dim=-1)


def train_head(head: Head, states: Tensor, summary: Tensor, data: RunData, steps: int, seed: int) -> None:
    """The model's loss on the model's batches, AdamW with warm-up and linear decay."""
    rest = [parameter for name, parameter in head.named_parameters() if name != "logit_scale"]
    optimizer = torch.optim.AdamW(
        [{"params": rest, "lr": RATE}, {"params": [head.logit_scale], "lr": SCALE_RATE}], weight_decay=1e-3
    )
    warm_up = max(1, int(WARM_UP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (steps - step) / (steps - warm_up + 1))
    )
    order = np.fromiter(islice(epochs_of(DistinctItemsSampler(data.train, BATCH, seed)), steps * BATCH), dtype=np.int64)
    for chosen in order.reshape(steps, BATCH):
        rows = torch.from_numpy(data.train.pairs[chosen].T.reshape(-1).astype(np.int64))
        loss = contrastive_pair_loss(head(states[rows], summary[rows]), head.logit_scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def read_texts(model: Any, processor: Any, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """The LLM's states of each item's texts by both read-outs, `(n, width)` float32."""
    read: dict[str, list[Tensor]] = {"last": [], "mean": []}
    for start in tqdm(range(0, len(items), READ_AT_ONCE), desc="Reading texts", unit="batch"):
        texts = [{**item, "image": None} for item in items[start : start + READ_AT_ONCE]]
        inputs = processor(texts, return_tensors="pt")
        mask = inputs["attention_mask"]
        hidden = model.language_model(inputs["input_ids"], attention_mask=mask, use_cache=False).last_hidden_state
        read["last"].append(states_at(hidden, last_position(mask)).float())
        read["mean"].append(mean_of(hidden, mask.bool()).float())
    return {name: torch.cat(parts) for name, parts in read.items()}


def compare(arguments: FrozenHeadsArguments) -> list[dict[str, Any]]:
    """One line for each LLM, read-out, standardization and seed, with its figures."""
    folder = Path(arguments.data)
    tables = DataArguments(
        items=str(folder / "items.parquet"),
        train_pairs=str(folder / "train_pairs.parquet"),
        eval_pairs=str(folder / "test_pairs.parquet"),
        eval_split="test",
        label_column="subcategory",
        distinct_column="subcategory",
    )
    data = load_data(tables, 0)
    items = list(data.items)
    lines: list[dict[str, Any]] = []
    summary = None
    for name in arguments.models:
        with loading(name):
            model = AutoModel.from_pretrained(name, trust_remote_code=True, dtype=torch.float32).eval()
            processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
        if summary is None:
            features = cache_vision_features(model, processor, data.items)
            summary = torch.stack([features.summary(item) for item in items]).float()
            states = torch.from_numpy(
                SentenceTransformer(str(minilm_folder()), device="cpu").encode(list(map(text_of, items)))
            )
            lines += runs_of("MiniLM", {"mean": states}, summary, model.config, data, arguments)
            lines += linear_maps(items, summary, data, arguments.seeds)
        layers = model.config.text_config.num_hidden_layers
        states_of = read_texts(model, processor, items)
        lines += runs_of(f"{Path(name).name} ({layers} layers)", states_of, summary, model.config, data, arguments)
    return lines


def runs_of(
    name: str,
    states_of: dict[str, Tensor],
    summary: Tensor,
    config: Any,
    data: RunData,
    arguments: FrozenHeadsArguments,
) -> list[dict[str, Any]]:
    """All runs on one model's states."""
    lines = []
    everything = list(range(len(data.eval_items)))
    for readout, states in states_of.items():
        for standardize in (False, True):
            for seed in range(arguments.seeds):
                set_seed(seed)
                head = Head(config, states, standardize)
                train_head(head, states, summary, data, arguments.steps, seed)
                figures: dict[str, float] = {}
                with torch.no_grad():
                    for modality, shown in (("both", summary), ("text", None)):
                        embeddings = head(states, shown)[data.eval_positions]
                        figures |= measure(modality, embeddings, everything, data.eval_pairs, data.labels)
                lines.append({"model": name, "readout": readout, "standardized": standardize, "seed": seed} | figures)
    return lines


def linear_maps(items: list[Any], summary: Tensor, data: RunData, seeds: int) -> list[dict[str, Any]]:
    """The baseline of the reports: one linear map on frozen picture and character n-grams, 400 batches of 64 pairs."""
    lines = []
    for seed in range(seeds):
        embeddings = baseline_embeddings(items, summary, data.train.pairs, seed)["linear map"][data.eval_positions]
        figures = measure("both", embeddings, list(range(len(data.eval_items))), data.eval_pairs, data.labels)
        lines.append({"model": "n-grams, one linear map", "readout": "", "standardized": False, "seed": seed} | figures)
    return lines


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Means over the seeds with 95 % intervals, in Markdown."""
    groups: dict[tuple[str, str, bool], list[Mapping[str, Any]]] = {}
    for line in lines:
        groups.setdefault((line["model"], line["readout"], line["standardized"]), []).append(line)
    rows = [
        "| frozen texts by | read-out | standardized | " + " | ".join(FIGURES) + " |",
        "|" + "---|" * (3 + len(FIGURES)),
    ]
    for (model, readout, standardized), runs in groups.items():
        cells = [interval([run[figure] for run in runs if figure in run]) for figure in FIGURES]
        rows.append(f"| {model} | {readout} | {'yes' if standardized else 'no'} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def interval(values: Sequence[float]) -> str:
    """Mean and half of the 95 % interval over seeds (Student's t)."""
    if not values:
        return ""
    over_seeds = estimate(values)
    return f"{over_seeds.value:.3f}" if over_seeds.count < 3 else f"{over_seeds.value:.3f} ±{over_seeds.margin:.3f}"


@command("training.experiments.frozen_heads")
def main(options: Sequence[str] | None = None) -> int | None:
    """Entry point."""
    (arguments,) = parse(FrozenHeadsArguments, options=options)
    lines = compare(arguments)
    write_text("".join(json.dumps(line) + "\n" for line in lines), Path(arguments.output))
    print(table(lines))
    return DONE


if __name__ == "__main__":
    sys.exit(main())
