"""The configuration of NoteLLM-2: which vision encoder, which LLM, and how the two are joined."""

from typing import Any, Literal

from transformers import AutoConfig, Blip2QFormerConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.utils import logging


logger = logging.get_logger(__name__)

# The published Q-Former: 6 layers of width 768 (NoteLLM-2 paper, section 4.1.3).
PUBLISHED_QFORMER = {"hidden_size": 768, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 3072}


class NoteLLM2Config(PreTrainedConfig):
    r"""
    Configuration of a [`NoteLLM2Model`] (NoteLLM-2, arXiv 2405.16789).

    Args:
        vision_config (`PreTrainedConfig` or `dict`, *optional*):
            Any vision encoder of transformers' `AutoModel`. Defaults to `CLIPVisionConfig()`.
        text_config (`PreTrainedConfig` or `dict`, *optional*):
            Any decoder-only language model of `AutoModel`. Defaults to `LlamaConfig()`.
        qformer_config (`Blip2QFormerConfig` or `dict`, *optional*):
            The connector. Fields left out take the published values: 6 layers, width 768, 12 heads.
        connector (`str`, defaults to `"qformer"`):
            What turns the vision encoder's features into visual tokens: "qformer", the published one; "mlp", the projector
            alone on the means of patches that lie together, no query looks for anything; "native", the merger that a
            checkpoint of pictures and text has itself, whose config is then `text_config` as a whole.
        num_query_tokens (`int`, defaults to 16):
            Visual tokens that each image becomes in the LLM's input; "native" gives its own number.
        query_tokens_std (`float`, defaults to 0.0):
            Deviation of the query tokens that a new Q-Former starts with. At 0, the published start, all are alike, and a
            LayerNorm of zeros multiplies gradients by 1e12, of which clipping leaves the rest of the model nothing; 0.02 starts
            as every other weight of the Q-Former.
        early_fusion (`bool`, defaults to `True`):
            Whether visual tokens enter the LLM. Without it there is neither Q-Former nor projector.
        late_fusion (`bool`, defaults to `True`):
            Whether a gate mixes the vision encoder's summary feature into the embeddings (paper, section 3.4).
        micl (`bool`, defaults to `True`):
            Multimodal in-context learning (paper, section 3.3): the prompt compresses the image first, so that there is
            a visual embedding beside the multimodal one. Needs `early_fusion`.
        readout (`str`, defaults to `"last"`):
            What of the LLM's last hidden state becomes an embedding: "last", the published state of the last token (the one
            before <IMG_EMB> for the visual embedding); "mean" over all tokens of the item (up to <IMG_EMB>).
        text_attention (`str`, defaults to `"causal"`):
            Which tokens of an item see which: "causal", those before (published); "bidirectional", all (LLM2Vec, arXiv
            2404.05961), but none before <IMG_EMB> sees behind it. Needs an LLM that takes a mask of its own.
        standardize_states (`bool`, defaults to `False`):
            Whether the LLM's states are centred and scaled, each direction by itself, before late fusion and reduction. Nearly
            all of a state is alike in all items; what tells them apart counts from the first step then. Training measures
            mean and deviation on its items before the first step, and goes on from there.
        embedding_dim (`int` or `None`, defaults to 64):
            Width of the embeddings. `None`: the LLM's hidden states are not reduced.
        logit_scale_init (`float`, defaults to 3.0):
            Initial logarithm of the factor on cosine similarities in the loss.
        visual_loss_weight (`float`, defaults to 1.0), multimodal_loss_weight (`float`, defaults to 9.0):
            Weights of the two contrastive losses; their sum divides the total.
        vision_feature_layer (`int`, defaults to -1):
            Which hidden state of the vision encoder gives the tokens. -1 is its last hidden state as it returns it.
        vision_summary (`str`, defaults to `"auto"`):
            The vision encoder's summary feature for late fusion: "cls", its class token's state; "pooler", its own pooled
            output; "mean" of its patches' tokens; "auto", the first of these that it has.
        freeze_vision (`bool`, defaults to `True`):
            The vision encoder takes no gradient, stays in eval mode and runs without a graph.
        vision_hidden_size (`int`, *optional*):
            Width of the vision encoder's tokens. Found out when the model is built; no need to set it.
        text_class (`str`, *optional*):
            Class that the LLM is built from, where `AutoModel` would build another one from its config.
        text_inputs (`str`, defaults to `"embeds"`):
            How the LLM is called: "embeds" with `inputs_embeds` alone, "ids" with `input_ids` beside them (per-layer
            embeddings). This and the next three are found out by trying when a model is joined.
        text_positions (`bool`, *optional*):
            Whether the LLM is given positions. Left out: if it takes them.
        text_hidden_size (`int`, *optional*):
            Width of the LLM's last hidden state. Left out: that of its config.
        padding_side (`str`, *optional*):
            "left" or "right", if the LLM can be padded on that side only.
        image_token_id (`int`, *optional*):
            Id of the placeholder that visual tokens replace.
        visual_embedding_token_id (`int`, *optional*):
            Id of <IMG_EMB>; the visual embedding is read at the position before it.
        base_models (`dict[str, str]`, *optional*):
            What the two halves were before training, for the model card: ids by "vision_encoder" and "language_model".

    Example:

    ```python
    >>> from transformers import CLIPVisionConfig, LlamaConfig
    >>> from modeling_notellm2 import NoteLLM2Config, NoteLLM2Model

    >>> config = NoteLLM2Config(
    ...     vision_config=CLIPVisionConfig(), text_config=LlamaConfig(num_hidden_layers=2), num_query_tokens=8
    ... )
    >>> model = NoteLLM2Model(config)
    ```
    """

    model_type = "notellm2"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_vision_model"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
        "qformer_config": SubConfigSpec(config_class=Blip2QFormerConfig),
    }

    vision_config: Any = None
    text_config: Any = None
    qformer_config: Any = None
    connector: Literal["qformer", "mlp", "native"] = "qformer"
    num_query_tokens: int = 16
    query_tokens_std: float = 0.0
    early_fusion: bool = True
    late_fusion: bool = True
    micl: bool = True
    readout: Literal["last", "mean"] = "last"
    text_attention: Literal["causal", "bidirectional"] = "causal"
    standardize_states: bool = False
    embedding_dim: int | None = 64
    logit_scale_init: float = 3.0
    visual_loss_weight: float = 1.0
    multimodal_loss_weight: float = 9.0
    vision_feature_layer: int = -1
    vision_summary: str = "auto"
    freeze_vision: bool = True
    vision_hidden_size: int | None = None
    text_class: str | None = None
    text_inputs: Literal["embeds", "ids"] = "embeds"
    text_positions: bool | None = None
    text_hidden_size: int | None = None
    padding_side: Literal["left", "right"] | None = None
    image_token_id: int | None = None
    visual_embedding_token_id: int | None = None
    base_models: dict[str, str] | None = None
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.qformer_config, PreTrainedConfig):
            self.qformer_config = {**PUBLISHED_QFORMER, **(self.qformer_config or {})}
        super().__post_init__(**kwargs)
        if self.vision_hidden_size is not None:
            self.qformer_config.encoder_hidden_size = self.vision_hidden_size
        self.check()

    def check(self) -> None:
        """Refuses settings that contradict each other.

        Raises:
            ValueError: naming the fields and what to change.
        """
        if self.micl and not self.early_fusion:
            raise ValueError(
                "micl=True needs early_fusion=True: the visual embedding is read behind the visual tokens in the LLM. "
                "Set micl=False for a late-fusion-only model."
            )
        if not (self.early_fusion or self.late_fusion):
            raise ValueError(
                "early_fusion=False and late_fusion=False leave the image out altogether. Set one of them to True."
            )
        if self.connector not in ("qformer", "mlp", "native"):
            raise ValueError(f"connector is {self.connector!r}; expected qformer, mlp or native.")
        if self.connector == "native" and not self.early_fusion:
            raise ValueError('connector="native" needs early_fusion=True: its visual tokens enter the LLM.')
        if self.readout not in ("last", "mean"):
            raise ValueError(f"readout is {self.readout!r}; expected last or mean.")
        if self.text_attention not in ("causal", "bidirectional"):
            raise ValueError(f"text_attention is {self.text_attention!r}; expected causal or bidirectional.")
        if self.connector == "native" and self.text_attention == "bidirectional":
            raise ValueError(
                'text_attention="bidirectional" needs connector="qformer" or "mlp"; a native connector\'s family masks itself.'
            )
        if self.vision_summary not in ("auto", "cls", "pooler", "mean"):
            raise ValueError(f"vision_summary is {self.vision_summary!r}; expected auto, cls, pooler or mean.")
        if self.num_query_tokens < 1:
            raise ValueError(f"num_query_tokens must be at least 1, got {self.num_query_tokens}.")
        if self.query_tokens_std < 0:
            raise ValueError(f"query_tokens_std must not be negative, got {self.query_tokens_std}.")
        if self.embedding_dim is not None and self.embedding_dim < 1:
            raise ValueError(f"embedding_dim must be positive, or None for no reduction; got {self.embedding_dim}.")
        if self.visual_loss_weight < 0 or self.multimodal_loss_weight < 0:
            raise ValueError("visual_loss_weight and multimodal_loss_weight must not be negative.")
        if self.visual_loss_weight + self.multimodal_loss_weight == 0:
            raise ValueError("visual_loss_weight and multimodal_loss_weight are both 0: nothing would be trained.")

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        """The LLM's configuration, which transformers asks for vocabulary size, cache and attention settings."""
        return self.text_config.get_text_config() if self.connector == "native" else self.text_config

    @property
    def native_image_token_id(self) -> int | None:
        """The placeholder that a native connector's checkpoint was trained with; None for other connectors."""
        return self.text_config.image_token_id if self.connector == "native" else None

    @property
    def text_width(self) -> int:
        """Width of the LLM's last hidden state."""
        return self.text_hidden_size or self.text_config.hidden_size

    @property
    def prompt_mode(self) -> Literal["micl", "basic", "late_only"]:
        """Which of the published prompts an item with an image gets: "micl", "basic" or "late_only"."""
        if not self.early_fusion:
            return "late_only"
        return "micl" if self.micl else "basic"


__all__ = ["NoteLLM2Config"]
