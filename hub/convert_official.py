"""Turns a checkpoint of the research code into a folder that `AutoModel.from_pretrained` loads.

    python hub/convert_official.py --weights W.safetensors --config C.json --output DIR

The weights are a state dict under the research code's parameter names: .safetensors; .bin/.pt/.pth, such as DeepSpeed's
zero_to_fp32.py writes, of which nothing is executed; or the .index.json of one in several files. The config is JSON with the
sizes and flags, as in `tests/reference/official/*/config.json`. Both of the research code's LLMs are read: Llama, and Qwen 1
(`text_config` as in Qwen-7B's config.json, with `"model_type": "qwen"`), which becomes a Qwen2 (see `hub/backbones/qwen.py`).
"""

import training.tables.commands.own_folder  # noqa: F401  # isort: skip

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hub.backbones.research import convert, read_weights, save_converted
from training.tables.commands.handler import DONE, OptionError, about, command, parse
from training.tables.commands.outputs import Output, claimed


@dataclass
class ConvertArguments:
    """What to convert."""

    weights: Path = field(metadata={"help": "State dict: .safetensors, .bin, .pt, .pth or .index.json."})
    config: Path = field(metadata={"help": "JSON with sizes and flags of the research model."})
    output: Path = field(metadata={"help": "Folder to write. An earlier model there is replaced."})
    tokenizer: str | None = field(
        default=None, metadata={"help": "Id or folder of the LLM's tokenizer: writes a processor too."}
    )
    image_processor: str | None = field(
        default=None, metadata={"help": "Id or folder of the vision encoder's image processor: with --tokenizer."}
    )


@command("hub/convert_official.py")
def main(options: Sequence[str] | None = None) -> int | None:
    """Entry point."""
    (args,) = parse(ConvertArguments, options=options)
    if (args.tokenizer is None) != (args.image_processor is None):
        raise OptionError("--tokenizer and --image_processor go together: both are needed to write a processor.")
    with claimed([Output("--output", args.output)], (args.config, args.weights)):
        with about(args.config, "It is no JSON of the research code's settings."):
            research = json.loads(args.config.read_text(encoding="utf-8"))
        with about(args.weights, "Pass the safetensors file of the research code's weights."):
            weights = read_weights(args.weights)
        model = convert(weights, research)
        save_converted(model, args.output, args.tokenizer, args.image_processor)
    total = sum(parameter.numel() for parameter in model.parameters())
    print(f"{args.output}: NoteLLM-2 {model.config.prompt_mode}, {total:,} parameters")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
