"""What pipelines have in common that run a causal language model."""

import functools
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING
from transformers.pipelines.base import Pipeline

from llmcli.pipelines import rows


class CausalHead(rows.RowPipeline, Pipeline):  # type: ignore[misc]  # transformers has no types
    """Which models these are, and how much they read."""

    auto_class = "AutoModelForCausalLM"

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.tokenizer.padding_side = "left"  # a causal model continues what stands at the right end

    @staticmethod
    def check(config: Any) -> str | None:
        """Why a model of that configuration cannot be used. AutoModelForCausalLM does take encoders, and the decoders
        of encoder-decoder models, to train them further: as they are, they talk nonsense."""
        is_own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or ())
        is_encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", True)
        is_causal = is_own_code or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
        usable = is_causal and not is_encoder and not getattr(config, "is_encoder_decoder", False)
        return None if usable else "do not continue text"

    @functools.cached_property
    def context_length(self) -> int | None:
        """Tokens that prompt and answer may take together."""
        config = self.model.config.get_text_config()
        length: int | None = getattr(config, "max_position_embeddings", None)
        return length if length and length > 0 else None
