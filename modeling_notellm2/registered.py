"""What the package offers, registered with transformers: imported when the first of its names is asked for."""

from transformers import AutoConfig, AutoModel, AutoProcessor

from .configuration_notellm2 import NoteLLM2Config
from .loss_notellm2 import complete_pairs, contrastive_pair_loss
from .modeling_notellm2 import NoteLLM2Model, NoteLLM2Output, NoteLLM2PreTrainedModel
from .precision_notellm2 import Precision, choose_precision
from .processing_notellm2 import NoteLLM2Processor


# For folders saved without code, and so that nobody who has the package needs trust_remote_code.
AutoConfig.register("notellm2", NoteLLM2Config, exist_ok=True)
AutoModel.register(NoteLLM2Config, NoteLLM2Model, exist_ok=True)
AutoProcessor.register(NoteLLM2Config, NoteLLM2Processor, exist_ok=True)

# save_pretrained writes these files beside the weights, so that AutoModel loads the folder anywhere.
NoteLLM2Config.register_for_auto_class()
NoteLLM2Model.register_for_auto_class("AutoModel")
NoteLLM2Processor.register_for_auto_class()

__all__ = [
    "NoteLLM2Config",
    "NoteLLM2Model",
    "NoteLLM2Output",
    "NoteLLM2PreTrainedModel",
    "NoteLLM2Processor",
    "Precision",
    "choose_precision",
    "complete_pairs",
    "contrastive_pair_loss",
]
