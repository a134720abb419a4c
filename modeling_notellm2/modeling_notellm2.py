"""NoteLLM-2: one embedding per item (picture and text) from any vision encoder and any LLM (arXiv 2405.16789).

Data flow: pixels -> frozen vision encoder -> Q-Former and projector (the connector) -> visual tokens in the LLM's input ->
hidden states at the read-out positions -> gate with the vision encoder's summary feature (late fusion) -> reduction -> L2 norm.
"""

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Blip2QFormerModel, PreTrainedModel
from transformers import initialization as init
from transformers.utils.generic import can_return_tuple

from .backbones_notellm2 import ItemTokens, fit_token_embeddings, language_stack
from .configuration_notellm2 import NoteLLM2Config
from .connectors_notellm2 import NoteLLM2Projector, pooled_patches
from .fusion_notellm2 import NoteLLM2LateFusion, NoteLLM2Standardization, mean_of_images
from .inputs_notellm2 import check_lengths, check_padding, count_images, positions_of
from .joining_notellm2 import join
from .language_notellm2 import (
    LanguageCall,
    build_language_model,
    call_language_model,
    embedding_width,
    takes_positions,
    try_bidirectional,
)
from .loss_notellm2 import add_losses
from .native_notellm2 import call_native_model, native_features, tokens_of_each, vision_parts
from .old_checkpoints_notellm2 import read_old_scales, unsqueeze_scale
from .outputs_notellm2 import NoteLLM2Output
from .packing_notellm2 import allow_packing
from .precision_notellm2 import keep_precision_apart
from .readout_notellm2 import item_parts, read_states, seen_tokens
from .saving_notellm2 import write_sentence_transformers_files
from .towers_notellm2 import build_vision_encoder
from .vision_features_notellm2 import VisionFeatures, features_of
from .vision_notellm2 import vision_features
from .vision_probe_notellm2 import vision_width


class NoteLLM2PreTrainedModel(PreTrainedModel):
    """What NoteLLM-2 tells transformers about itself: capabilities and how its own weights start."""

    config: NoteLLM2Config
    config_class = NoteLLM2Config
    base_model_prefix = "notellm2"
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["NoteLLM2Projector", "NoteLLM2LateFusion"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Xavier for projector, gate, projection and reduction; zero query tokens, or drawn (paper, section 4.1.3)."""
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, NoteLLM2Standardization):
            init.zeros_(module.mean)
            init.ones_(module.scale)
        elif isinstance(module, NoteLLM2Model):
            init.constant_(module.logit_scale, module.config.logit_scale_init)
            if module.query_tokens is not None:
                init.zeros_(module.query_tokens)
                if module.config.query_tokens_std:
                    init.normal_(module.query_tokens, std=module.config.query_tokens_std)
        else:
            super()._init_weights(module)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As for any model; with the processor's files beside it, the folder also is a sentence-transformers model."""
        write_sentence_transformers_files(save_directory)
        super().save_pretrained(save_directory, *args, **kwargs)


class NoteLLM2Model(NoteLLM2PreTrainedModel):
    """
    One embedding per item from a picture, several or none, and a text.

    Args:
        config ([`NoteLLM2Config`]): sizes and variant.
        vision_model, language_model (`PreTrainedModel`, *optional*): ready backbones; built from `config` if left out.
    """

    def __init__(
        self,
        config: NoteLLM2Config,
        vision_model: PreTrainedModel | None = None,
        language_model: PreTrainedModel | None = None,
    ):
        if config.vision_hidden_size is None:
            config.vision_hidden_size = vision_width(config.vision_config, config.vision_feature_layer, vision_model)
        config.qformer_config.encoder_hidden_size = config.vision_hidden_size
        super().__init__(config)
        self.vision_model = vision_model
        if vision_model is None and config.connector != "native":
            self.vision_model = build_vision_encoder(config.vision_config)
        self.language_model = (
            language_model
            if language_model is not None
            else build_language_model(config.text_config, config.text_class)
        )
        self.qformer: nn.Module | None = None
        self.query_tokens: nn.Parameter | None = None
        self.projector: NoteLLM2Projector | None = None
        if config.early_fusion and config.connector == "qformer":
            self.qformer = Blip2QFormerModel._from_config(config.qformer_config)
            self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, config.qformer_config.hidden_size))
        if config.early_fusion and config.connector != "native":
            of_qformer = config.connector == "qformer"
            visual_width = config.qformer_config.hidden_size if of_qformer else config.vision_hidden_size
            self.projector = NoteLLM2Projector(visual_width, embedding_width(self.language_model))
        # The two embeddings are read from states of their own.
        self.standardization = NoteLLM2Standardization(config) if config.standardize_states else None
        both = config.standardize_states and config.micl
        self.visual_standardization = NoteLLM2Standardization(config) if both else None
        self.late_fusion = NoteLLM2LateFusion(config) if config.late_fusion else None
        self.reduction = (
            nn.Linear(config.text_width, config.embedding_dim, bias=False) if config.embedding_dim else None
        )
        # One-dimensional: what spreads weights over processes (FSDP2) can't cut a scalar.
        self.logit_scale = nn.Parameter(torch.full((1,), float(config.logit_scale_init)))
        self.register_load_state_dict_pre_hook(unsqueeze_scale)
        positions = config.text_positions
        self._language_call = LanguageCall(
            config.text_inputs, takes_positions(self.language_model) if positions is None else positions
        )
        if config.connector != "native":
            allow_packing(self.language_model)
        self._freeze_vision()
        self.post_init()
        keep_precision_apart(self, ("vision_model", "language_model"))

    def initialize_weights(self) -> None:
        """Each backbone by its own rules first, as when it is loaded alone; then what is new.

        Started from here, transformers would treat them as foreign code and pass over modules without weights of their
        own, in which some families fill buffers that no checkpoint holds.
        """
        for backbone in filter(None, (self.vision_model, self.language_model)):
            backbone.initialize_weights()
        super().initialize_weights()

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision: str | PreTrainedModel,
        text: str | PreTrainedModel,
        *,
        dtype: torch.dtype | None = None,
        vision_kwargs: dict[str, Any] | None = None,
        text_kwargs: dict[str, Any] | None = None,
        check: bool = True,
        **config_overrides: Any,
    ) -> "NoteLLM2Model":
        """Joins a pretrained vision encoder and a pretrained LLM; everything between them is new and needs training.

        One checkpoint of pictures and text given as both keeps its own merger (`connector: native`), unless
        `connector="qformer"` asks for a new one.

        Where `text` has a tokenizer beside it, <IMG> and <IMG_EMB> are given rows in the LLM's embedding, as
        [`NoteLLM2Processor.from_vision_text_pretrained`] gives them ids; otherwise call `processor.prepare_model(model)`.

        Args:
            vision: id or folder of a vision encoder or of a composite model (CLIP), or a loaded model.
            text: id or folder of a decoder-only LLM, or a loaded model.
            dtype: of the whole model; that of the LLM if left out.
            vision_kwargs, text_kwargs: for the two `AutoModel.from_pretrained`, e.g. `{"gguf_file": "model.gguf"}`.
            check: try the LLM with a few short forward passes: whether it is causal, how it is called, which padding it
                reads rightly, and whether it would load again. Takes seconds. False: as most LLMs are.
            config_overrides: fields of [`NoteLLM2Config`].

        Raises:
            ValueError: for a vision encoder or an LLM that can't be used, or an unknown config field.

        Example:

        ```python
        >>> from modeling_notellm2 import NoteLLM2Model, NoteLLM2Processor

        >>> vision, text = "openai/clip-vit-base-patch16", "Qwen/Qwen3-0.6B"
        >>> model = NoteLLM2Model.from_vision_text_pretrained(vision, text)
        >>> processor = NoteLLM2Processor.from_vision_text_pretrained(vision, text, model=model)
        ```
        """
        return join(cls, vision, text, dtype, vision_kwargs or {}, text_kwargs or {}, check, config_overrides)

    def try_attention(self) -> None:
        """Tries whether the LLM can be read with the config's `text_attention`, by a few short forward passes.

        Raises:
            ValueError: if it can't.
        """
        if self.config.text_attention == "bidirectional":
            try_bidirectional(self.language_model, self._language_call)

    def set_item_tokens(self, tokens: ItemTokens) -> None:
        """Tells the model the ids of <IMG> and <IMG_EMB> and gives them embedding rows."""
        self.config.image_token_id = tokens.image_id
        self.config.visual_embedding_token_id = tokens.visual_embedding_id
        fit_token_embeddings(self, tokens)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_decoder(self) -> PreTrainedModel:
        """The LLM alone."""
        return language_stack(self.language_model)

    @property
    def vision_parts(self) -> list[nn.Module]:
        """What makes the features of pictures, and is frozen with `freeze_vision`; a native merger is among it."""
        return vision_parts(self.language_model) if self.vision_model is None else [self.vision_model]

    def train(self, mode: bool = True) -> "NoteLLM2Model":
        """As for any module, but a frozen vision encoder stays in eval mode (its batch norms must not move).

        It is frozen here too: `from_pretrained` makes new parameters, which all take gradients, and then calls `eval`.
        """
        super().train(mode)
        self._freeze_vision()
        return self

    def _freeze_vision(self) -> None:
        if self.config.freeze_vision:
            for part in self.vision_parts:
                part.requires_grad_(False).eval()

    def get_vision_features(
        self, pixel_values: torch.Tensor, image_sizes: torch.Tensor | None = None
    ) -> VisionFeatures:
        """The vision encoder's tokens and summary feature; without a graph when it is frozen.

        Args:
            pixel_values (`torch.Tensor` of shape `(images, channels, height, width)` or `(images, patches, values)`).
            image_sizes (`torch.LongTensor` of shape `(images, k)`, *optional*): as the processor gives them.

        Returns:
            `last_hidden_state` `(images, tokens, vision width)`, `pooler_output` `(images, vision width)` and, where
            pictures differ in their number of tokens, `attention_mask` `(images, tokens)`, which `forward` takes back as
            `vision_hidden_states`, `vision_pooler_output` and `vision_attention_mask`.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.freeze_vision):
            if self.vision_model is None:
                return native_features(self.language_model, pixel_values.to(self.language_model.dtype), image_sizes)
            pixel_values = pixel_values.to(self.vision_model.dtype)
            layer, summary = self.config.vision_feature_layer, self.config.vision_summary
            return vision_features(self.vision_model, pixel_values, layer, image_sizes, summary)

    def get_visual_tokens(
        self, vision_hidden_states: torch.Tensor, vision_attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The connector: `(images, tokens, vision width)` to `(images, num_query_tokens, LLM width)`."""
        assert self.projector is not None
        # Trained parts may be in float32 beside frozen ones in 16 bits.
        weight = self.projector.linear_1.weight
        if self.qformer is None or self.query_tokens is None:
            hidden = vision_hidden_states.to(weight.device, weight.dtype)
            return self.projector(pooled_patches(hidden, vision_attention_mask, self.config.num_query_tokens))
        queries = self.query_tokens.expand(vision_hidden_states.shape[0], -1, -1)
        hidden = self.qformer(
            query_embeds=queries,
            encoder_hidden_states=vision_hidden_states.to(queries.device, queries.dtype),
            encoder_attention_mask=vision_attention_mask,
        ).last_hidden_state
        return self.projector(hidden.to(weight.dtype))

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        num_images: torch.Tensor | None = None,
        vision_hidden_states: torch.Tensor | None = None,
        vision_pooler_output: torch.Tensor | None = None,
        cached_images: torch.Tensor | None = None,
        image_sizes: torch.Tensor | None = None,
        vision_attention_mask: torch.Tensor | None = None,
        vision_grids: torch.Tensor | None = None,
        return_loss: bool = False,
        output_vision_features: bool = False,
        output_states: bool = False,
        **kwargs: Any,
    ) -> NoteLLM2Output:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(n, length)`): each image stands as `num_query_tokens` times
                `config.image_token_id`, or as many times as its native merger gives tokens.
            attention_mask (`torch.Tensor` of shape `(n, length)`, *optional*): 1 for tokens, 0 for padding on either
                side. All ones if left out.
            pixel_values (`torch.FloatTensor` of shape `(images, channels, height, width)`, *optional*): the images of
                the batch in order of the rows. One image beside a `num_images` of zeros belongs to no item and changes
                nothing; with it every part of the model takes part, for which other processes may wait (DDP, FSDP).
            num_images (`torch.LongTensor` of shape `(n,)`, *optional*): images of each item. Read off the placeholders
                if left out (without early fusion: one each).
            vision_hidden_states (`torch.FloatTensor` of shape `(images, tokens, vision width)`, *optional*) and
            vision_pooler_output (`torch.FloatTensor` of shape `(images, vision width)`, *optional*):
                what `get_vision_features` gave, in place of `pixel_values`.
            cached_images (`torch.BoolTensor` of shape `(images,)`, *optional*): which images' features are given where
                `pixel_values` are those of the others.
            image_sizes (`torch.LongTensor` of shape `(images, k)`, *optional*): the pictures' true sizes in padded
                `pixel_values`, as the processor gives them.
            vision_attention_mask (`torch.LongTensor` of shape `(images, tokens)`, *optional*): 1 for tokens of
                `vision_hidden_states`, 0 for padding.
            vision_grids (`torch.LongTensor` of shape `(images, 3)`, *optional*): patches in time, height and width, for
                native connectors that give visual tokens places in the plane.
            return_loss (`bool`): read the batch as pairs, rows `i` and `i + n/2`, and add the losses.
            output_vision_features (`bool`): add what the vision encoder gave.
            output_states (`bool`): add what `finish` makes the embeddings of.
            kwargs: for the LLM, e.g. `output_hidden_states`, `output_attentions`.

        Returns:
            [`NoteLLM2Output`].

        Raises:
            ValueError: naming the row, if placeholders, <IMG_EMB> and images don't match.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        features = features_of(
            self.get_vision_features,
            pixel_values,
            image_sizes,
            vision_hidden_states,
            vision_pooler_output,
            vision_attention_mask,
            vision_grids,
            cached_images,
        )
        total = 0 if features is None else features.pooler_output.shape[0]
        if total == 1 and num_images is not None and not num_images.any():
            total = 0  # the image of nobody
        tokens = tokens_of_each(features) if features and total else None
        counts = count_images(self.config, input_ids, num_images, total, tokens)
        has_image = torch.gt(counts, 0)

        check_padding(attention_mask, self.config.padding_side)
        check_lengths(attention_mask, self.config.get_text_config())
        outputs = self._read(input_ids, attention_mask, features, total, **kwargs)
        summary = None if features is None else mean_of_images(features.pooler_output, counts)
        states, visual_states = read_states(self.config, outputs.last_hidden_state, input_ids, attention_mask)
        if self.standardization is not None:
            states = self.standardization(states)
        embeddings = self.finish(states, summary, has_image)
        visual_embeddings = None
        if visual_states is not None:
            if self.visual_standardization is not None:
                visual_states = self.visual_standardization(visual_states)
            visual_embeddings = self.finish(visual_states, summary, has_image)
            visual_embeddings = visual_embeddings.masked_fill(~has_image.to(states.device).unsqueeze(-1), 0)

        result = NoteLLM2Output(
            embeddings=embeddings,
            visual_embeddings=visual_embeddings,
            has_image=has_image,
            hidden_states=outputs.hidden_states if "hidden_states" in outputs else None,
            attentions=outputs.attentions if "attentions" in outputs else None,
            logit_scale=self.logit_scale.clone(),  # what wraps the model may free the parameter's memory after this
            vision_hidden_states=features.last_hidden_state if features and output_vision_features else None,
            vision_pooler_output=features.pooler_output if features and output_vision_features else None,
            vision_attention_mask=features.attention_mask if features and output_vision_features else None,
            vision_grids=features.grids if features and output_vision_features else None,
            states=states if output_states else None,
            visual_states=visual_states if output_states else None,
            summary=summary if output_states else None,
        )
        return add_losses(result, self.config, self.logit_scale) if return_loss else result

    def _read(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        features: VisionFeatures | None,
        total: int,
        **kwargs: Any,
    ) -> Any:
        """The LLM's output for ids in which the first `total` pictures of `features` have placeholders."""
        if self.config.connector == "native":
            assert self.config.image_token_id is not None
            mine = features if total else None
            return call_native_model(
                self.language_model, input_ids, attention_mask, self.config.image_token_id, mine, **kwargs
            )
        inputs_embeds = self._embed(input_ids, features)
        text_ids = self._text_ids(input_ids) if self._language_call.inputs == "ids" else input_ids
        seen = None
        if self.config.text_attention == "bidirectional":
            seen = seen_tokens(attention_mask, item_parts(self.config, input_ids)).to(inputs_embeds.device)
        return call_language_model(
            self.language_model, self._language_call, text_ids, inputs_embeds, attention_mask, seen, **kwargs
        )

    def _embed(self, input_ids: torch.Tensor, features: VisionFeatures | None) -> torch.Tensor:
        """Token embeddings with the visual tokens put where the placeholders stand."""
        inputs_embeds = self.get_input_embeddings()(input_ids)
        if features is None or not self.config.early_fusion:
            return inputs_embeds
        visual_tokens = self.get_visual_tokens(features.last_hidden_state, features.attention_mask)
        visual_tokens = visual_tokens.to(inputs_embeds.device, inputs_embeds.dtype)
        places = positions_of(input_ids, self.config.image_token_id).unsqueeze(-1).to(inputs_embeds.device)
        return inputs_embeds.masked_scatter(places, visual_tokens)

    def _text_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The ids for lookups other than the token embeddings, which know no <IMG> and <IMG_EMB>: padding stands there."""
        slots = positions_of(input_ids, self.config.image_token_id)
        slots |= positions_of(input_ids, self.config.visual_embedding_token_id)
        return input_ids.masked_fill(slots, self.config.text_config.pad_token_id or 0)

    def finish(self, hidden: torch.Tensor, summary: torch.Tensor | None, has_image: torch.Tensor) -> torch.Tensor:
        """The head, from states to embeddings: late fusion (of items with an image), reduction, L2 norm in float32.

        Args:
            hidden (`torch.Tensor` of shape `(n, LLM width)`): as of the output's `states` or `visual_states`.
            summary (`torch.Tensor` of shape `(n, vision width)`, *optional*): the vision encoder's summary feature.
            has_image (`torch.BoolTensor` of shape `(n,)`).

        Returns:
            `torch.Tensor` of shape `(n, d)`.
        """
        if self.late_fusion is not None and summary is not None:
            weight = self.late_fusion.projection.weight
            hidden = hidden.to(weight.device, weight.dtype)
            fused = self.late_fusion(hidden, summary.to(weight.device, weight.dtype))
            hidden = torch.where(has_image.to(fused.device).unsqueeze(-1), fused, hidden)
        if self.reduction is not None:
            hidden = self.reduction(hidden.to(self.reduction.weight.device, self.reduction.weight.dtype))
        return F.normalize(hidden.float(), dim=-1).to(hidden.dtype)


read_old_scales(NoteLLM2Model)


__all__ = ["NoteLLM2Model", "NoteLLM2Output", "NoteLLM2PreTrainedModel"]
