"""Vision encoders as their own class: found in any checkpoint, built again from a saved config.

transformers' `AutoModel` knows the towers of few composite models (CLIP, SigLIP); of the others (BLIP, MetaCLIP 2,
Qwen2-VL, ...) the tower's class stands in the module beside its config's, under the name that `architectures` keeps.
"""

import importlib
import inspect
from collections.abc import Iterator
from typing import Any

from transformers import MODEL_MAPPING, AutoModel, PreTrainedConfig, PreTrainedModel


# How composite configs name their vision encoder's.
TOWER_CONFIGS = ("vision_config", "image_config")
MISSING_PACKAGE = (
    "%s can't be loaded: %s Encoders of timm need `pip install timm`, and some image processors "
    "(DINOv3, Llama 4, timm) `pip install torchvision` in the version for your torch."
)


def load_vision_encoder(source: str | PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
    """The vision encoder of a checkpoint; of a composite one (CLIP, Qwen-VL) its vision tower alone.

    Args:
        source: id, folder, or an already loaded model; of one with a head the encoder is taken.
        kwargs: for `AutoModel.from_pretrained`.

    Raises:
        ValueError: for a checkpoint without a vision encoder that can be built again by itself.
        ImportError: naming the package that is missing.
    """
    if isinstance(source, PreTrainedModel):
        model = source
    else:
        try:
            model = AutoModel.from_pretrained(source, **kwargs)
        except ImportError as error:
            raise ImportError(MISSING_PACKAGE % (source, " ".join(str(error).split()))) from error
    tower = tower_of(model)
    known = _auto_classes(type(tower.config))
    if known and not isinstance(tower, known):
        if not isinstance(tower.base_model, known):
            raise ValueError(
                f"`vision` is a {type(tower).__name__}, of which a saved model would become a {known[0].__name__}. "
                "Pass the encoder without its head."
            )
        tower = tower.base_model
    if not known and not getattr(tower.config, "auto_map", None):
        tower.config.architectures = [type(tower).__name__]
        if vision_encoder_class(tower.config) is not type(tower):
            raise ValueError(
                f"{type(tower).__name__} can't be built from its config; pass another encoder as `vision`."
            )
    _see_all_patches(tower.config)
    return tower


def build_vision_encoder(config: PreTrainedConfig) -> PreTrainedModel:
    """A vision encoder with fresh weights, of the class that `load_vision_encoder` took.

    Raises:
        ValueError: for a config that is no vision encoder's.
    """
    _see_all_patches(config)
    own = vision_encoder_class(config)
    return AutoModel.from_config(config) if own is None else own._from_config(config)


def vision_encoder_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class of a config that `AutoModel` doesn't know, from the module beside the config's own; else None.

    Raises:
        ValueError: if there is none.
    """
    if _auto_classes(type(config)) or getattr(config, "auto_map", None):
        return None
    try:
        module = importlib.import_module(type(config).__module__.replace("configuration_", "modeling_"))
    except ImportError as error:
        raise ValueError(_not_an_encoder(config)) from error
    classes = {
        name: member
        for name, member in vars(module).items()
        if inspect.isclass(member) and issubclass(member, PreTrainedModel) and member.config_class is type(config)
    }
    named = (config.architectures or [""])[0]
    plain = [name for name in classes if name.endswith(("VisionModel", "ImageModel"))] or [
        name for name in classes if not name.endswith("PreTrainedModel")
    ]
    if named not in classes and not plain:
        raise ValueError(_not_an_encoder(config))
    return classes[named if named in classes else plain[0]]


def tower_of(model: PreTrainedModel) -> PreTrainedModel:
    """The outermost module whose config is the composite's vision config; the model itself if it is no composite."""
    wanted = list(_tower_configs(model.config))
    if not wanted:
        return model
    modules = sorted(model.named_modules(), key=lambda pair: pair[0].count("."))
    for vision_config in wanted:
        for name, module in modules:
            if name and isinstance(module, PreTrainedModel) and type(module.config) is type(vision_config):
                return module
    raise ValueError(
        f"{type(model).__name__} has a vision_config, but no vision encoder that stands by itself. "
        "Pass its vision encoder itself, loaded, as `vision`, or another one (CLIP, SigLIP, DINOv2)."
    )


def _tower_configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """The vision configs of a composite config, also those one level deeper (the Omni models' thinker)."""
    for name in TOWER_CONFIGS:
        if isinstance(tower := getattr(config, name, None), PreTrainedConfig):
            yield tower
    for name in getattr(config, "sub_configs", None) or {}:
        if isinstance(part := getattr(config, name, None), PreTrainedConfig):
            yield from (getattr(part, inner) for inner in TOWER_CONFIGS if hasattr(part, inner))


def _auto_classes(config_class: type[PreTrainedConfig]) -> tuple[type[PreTrainedModel], ...]:
    """What `AutoModel` builds from a config."""
    if config_class not in MODEL_MAPPING:
        return ()
    known: Any = MODEL_MAPPING[config_class]
    return known if isinstance(known, tuple) else (known,)


def _see_all_patches(config: PreTrainedConfig) -> None:
    """Masked autoencoders (ViT-MAE) hide random patches of each picture, also in eval mode, unless told not to."""
    if getattr(config, "mask_ratio", None):
        config.mask_ratio = 0.0


def _not_an_encoder(config: PreTrainedConfig) -> str:
    return (
        f"`vision` is a {config.model_type!r} model, for which transformers has no vision encoder. Pass one (CLIP, SigLIP, "
        "DINOv2, ViT, ConvNeXt, ...), or a composite model that has one."
    )
