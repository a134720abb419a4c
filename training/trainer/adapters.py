"""LoRA on the LLM through peft, with everything that starts new trained in full and kept in the adapter's folder.

Q-Former, projector, late fusion, reduction, query tokens and logit scale are no LoRA, but an adapter without them is
worth nothing. Their weights stand in `adapter_model.safetensors` under their own names, where both
`PeftModel.from_pretrained` and `AutoModel.from_pretrained` find them.
"""

import copy
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, BitsAndBytesConfig

from modeling_notellm2 import NoteLLM2Model
from training.tables.commands.files import atomic_write
from training.tables.commands.model_folder import loading
from training.trainer.arguments import READING, ModelArguments


LLM = "language_model"
ADAPTER_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
CHECKPOINTED = "_checkpoint_wrapped_module."
"""What torch puts into names where activations are recomputed."""


def load_trainable(arguments: ModelArguments, compute_dtype: torch.dtype = torch.float32) -> NoteLLM2Model | PeftModel:
    """The model to train: the whole of it, or one with LoRA on its LLM. An adapter's folder goes on from that adapter.

    What is trained is held in float32. An LLM that is only read, beside an adapter of its own, stays in the type in which
    it is stored: 16 bits of a 7B LLM are half the memory.

    Args:
        compute_dtype: of the products with 4-bit weights.

    Raises:
        ValueError: for LoRA modules that the LLM doesn't have.
    """
    adapted = (Path(arguments.model) / "adapter_config.json").is_file()
    only_read = (adapted or arguments.lora_r) and not (arguments.merge_adapter or arguments.load_in_4bit)
    options: dict[str, Any] = {"dtype": "auto" if only_read else torch.float32}
    if arguments.attn_implementation:
        options["attn_implementation"] = arguments.attn_implementation
    chosen = {name: getattr(arguments, name) for name in READING}
    options |= {name: value for name, value in chosen.items() if value is not None}
    if arguments.load_in_4bit:
        options["quantization_config"] = quantization(compute_dtype)
    model = _load(arguments, adapted, options)
    if arguments.text_attention:  # a folder's own code may be older than this option
        unwrap_adapter(model).try_attention()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def _load(arguments: ModelArguments, adapted: bool, options: dict[str, Any]) -> NoteLLM2Model | PeftModel:
    if adapted:
        config = LoraConfig.from_pretrained(arguments.model)
        with loading(config.base_model_name_or_path):
            base = AutoModel.from_pretrained(config.base_model_name_or_path, trust_remote_code=True, **options)
        names = trained_in_full(base)
        model = PeftModel.from_pretrained(base, arguments.model, is_trainable=True)
        _train_in_full(model, names)
        return model
    with loading(arguments.model):
        model = AutoModel.from_pretrained(arguments.model, trust_remote_code=True, **options)
    return with_lora(model, arguments) if arguments.lora_r else model


def with_lora(model: NoteLLM2Model, arguments: ModelArguments) -> PeftModel:
    """LoRA (or DoRA) matrices in the LLM, which is frozen beside them; what is new in NoteLLM-2 stays trainable.

    Raises:
        ValueError: for modules that the LLM doesn't have.
    """
    names = trained_in_full(model)
    if arguments.load_in_4bit:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    folder = model.name_or_path
    if folder and os.path.isdir(folder):  # the adapter must find its base from any working directory
        model.name_or_path = os.path.abspath(folder)
    lora = LoraConfig(
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        use_dora=arguments.use_dora,
        target_modules=llm_modules(model, arguments.lora_target_modules),
    )
    wrapped = get_peft_model(model, lora)
    _train_in_full(wrapped, names)
    return wrapped


def llm_modules(model: NoteLLM2Model, targets: list[str]) -> str:
    """A pattern that matches the LLM's modules of these names (all its linear layers for all-linear) and no others.

    Raises:
        ValueError: for a name that no linear layer of the LLM has.
    """
    llm = model.get_decoder()  # within `language_model` there may be a native connector's tower
    place = next(name for name, part in model.named_modules() if part is llm)
    linear = {name.rsplit(".", 1)[-1] for name, part in llm.named_modules() if isinstance(part, nn.Linear)}
    wanted = sorted(linear) if targets == ["all-linear"] else targets
    unknown = sorted(set(wanted) - linear)
    if unknown:
        raise ValueError(
            f"lora_target_modules: {type(llm).__name__} has no {', '.join(unknown)}; its linear layers are "
            f"{', '.join(sorted(linear))}, or all-linear for all of them."
        )
    return rf"{re.escape(place)}\..*\b({'|'.join(map(re.escape, wanted))})"


def quantization(compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """4-bit NormalFloat weights for the LLM alone (QLoRA, arXiv 2305.14314)."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=["vision_model", "qformer", "projector", "late_fusion", "reduction"],
    )


def trained_in_full(model: nn.Module) -> list[str]:
    """Names of the trainable parameters outside the LLM."""
    return [name for name, p in model.named_parameters() if p.requires_grad and not name.startswith(f"{LLM}.")]


def _train_in_full(model: PeftModel, names: list[str]) -> None:
    for name in names:
        model.get_parameter(PREFIX + name).requires_grad_(True)


@contextmanager
def training_only(model: nn.Module, chosen: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within it only the chosen parameters take gradients; what else took them does so again behind it."""
    before = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    for parameter in chosen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in before:
            parameter.requires_grad_(True)


def unwrap_adapter(model: nn.Module) -> NoteLLM2Model:
    """The NoteLLM-2 model itself, without an adapter around it."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return cast(NoteLLM2Model, base)  # not by isinstance: a folder may bring its own copy of the class


def save_gathered(model: nn.Module, folder: Path, state: dict[str, Tensor]) -> None:
    """Write a model that FSDP wraps, from its gathered weights.

    They are written by a model of its own class without memory: FSDP's class has no code of its own to put beside them.
    """
    assert isinstance(model, NoteLLM2Model)
    with torch.device("meta"):
        plain = NoteLLM2Model(copy.deepcopy(model.config))
    plain.save_pretrained(folder, state_dict=state)


def save_merged(adapter: Path, folder: Path, dtype: torch.dtype, **reading: Any) -> None:
    """Write a plain model with a saved adapter's LoRA merged in, on the CPU.

    Args:
        reading: the fields of `READING` as the adapter was trained.
    """
    config = LoraConfig.from_pretrained(str(adapter))
    base = AutoModel.from_pretrained(config.base_model_name_or_path, trust_remote_code=True, dtype=dtype, **reading)
    PeftModel.from_pretrained(base, str(adapter)).merge_and_unload().save_pretrained(folder)


def save_adapter(model: PeftModel, folder: Path, state: dict[str, Tensor] | None = None) -> None:
    """Adapter, its config, the parts that are trained in full, and what was measured of states.

    Args:
        state: the gathered weights where they are spread over processes; the model's own if left out.
    """
    with _without_wrappers(model):
        model.save_pretrained(str(folder), state_dict=state)
    trained = {name.replace(CHECKPOINTED, "") for name, p in model.named_parameters() if p.requires_grad}
    measured = {name for name, _ in model.named_buffers() if "standardization." in name}
    full = {name for name in trained | measured if f".{LLM}." not in name}
    state = model.state_dict() if state is None else state
    weights = load_file(folder / ADAPTER_FILE)
    if not any("lora_" in name for name in weights):
        raise RuntimeError("peft found no LoRA weights to save: the adapter would be worth nothing.")
    weights |= {name: state[name].detach().cpu().contiguous() for name in full}
    with atomic_write(folder / ADAPTER_FILE) as place:
        save_file(weights, place, metadata={"format": "pt"})


@contextmanager
def _without_wrappers(model: nn.Module) -> Iterator[None]:
    """Within it the layers whose activations are recomputed stand in their own places.

    peft looks for an adapter's weights by the names of modules, and the wrappers are among these names.
    """
    wrapped = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if hasattr(child, CHECKPOINTED.rstrip("."))
    ]
    for parent, name, child in wrapped:
        parent.register_module(name, getattr(child, CHECKPOINTED.rstrip(".")))
    try:
        yield
    finally:
        for parent, name, child in wrapped:
            parent.register_module(name, child)
