"""Texts -> vectors, by an encoder. A transformers.Pipeline."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedConfig

from llmcli.errors import ModelUnavailableError, UsageError
from llmcli.models import encoders
from llmcli.pipelines import base
from llmcli.pipelines.base import Inputs, Parameters, TextPipeline
from llmcli.pipelines.encoder_layers import make_layer


class EmbeddingPipeline(TextPipeline):
    """Compute the vector of a text, by the modules of sentence-transformers that the model's directory lists.

    For a batch of B texts, the longest of P tokens, in D dimensions:

    preprocess   input_ids, P of them; prompt_length, of these before the text; cut: tokens that --truncate took away
    _forward     vectors, float32 (B, D); what preprocess gave, in lists of B
    postprocess  {"embedding": D numbers, or the first `dimensions` of them, "usage"} of one text

    A text may have a `role`, query or document, of its own: {"text", "role"}. The model may have a prompt for it.
    """

    auto_class = "AutoModel"
    auto_classes = dict.fromkeys(("t5", "mt5", "umt5"), "AutoModelForTextEncoding")  # without the decoder
    ignorable_weight_prefix = "pooler."

    def __init__(self, *args: object, **settings: object) -> None:
        super().__init__(*args, **settings)
        self.encoder = encoders.read_encoder(Path(self.model.name_or_path))
        self.context_length = self.encoder.context_length
        self._layers = [make_layer(module, self.device) for module in self.encoder.modules]
        self._normalizes = any(module.type == "Normalize" for module in self.encoder.modules)
        self._prompt_lengths: dict[str | None, int] = {}  # by role
        special = [token for token in self.tokenizer.all_special_tokens if len(token) > 1]
        for prompt in self.encoder.prompts.values():
            if any(token in prompt for token in special):
                raise ModelUnavailableError(f"{self.model.name_or_path}: prompt {prompt!r} has a special token")

    @classmethod
    def find_incompatibility(cls, config: PreTrainedConfig) -> str | None:
        has_decoder = getattr(config, "is_encoder_decoder", False) and config.model_type not in cls.auto_classes
        return "are not encoders" if has_decoder else None

    def _sanitize_parameters(
        self, role: str | None = None, dimensions: int | None = None, normalize: bool = False
    ) -> Parameters:
        return {"role": role}, {}, {"dimensions": dimensions, "normalize": normalize}

    def preprocess(self, inputs: str | Mapping[str, str], truncate: bool = False, role: str | None = None) -> Inputs:
        text, role = (inputs, role) if isinstance(inputs, str) else (inputs["text"], inputs["role"])
        prompt = self.encoder.prompts[role]
        if self.encoder.lowers_case:
            prompt, text = encoders.lower(prompt), encoders.lower(text)
        if not truncate:
            base.check_length(prompt + text, self.context_length, self.count_tokens)
        row = self.tokenize(prompt + text, self.context_length, truncate=truncate)
        base.check_tokens(row["input_ids"])
        return {**row, "prompt_length": self._count_prompt_tokens(role, prompt)}

    def _count_prompt_tokens(self, role: str | None, prompt: str) -> int:
        """Return the tokens of a prompt, without those that end every text."""
        if role not in self._prompt_lengths:
            ids = self.tokenizer(prompt)["input_ids"] if prompt else []
            self._prompt_lengths[role] = len(ids) - sum(id in self.tokenizer.all_special_ids for id in ids[-1:])
        return self._prompt_lengths[role]

    def _forward(self, inputs: Inputs) -> Inputs:
        batch = base.as_batch(inputs)
        ids, mask = self.pad(batch["input_ids"])  # on the right: a decoder's tokens do not see what follows them
        features = {
            "token_embeddings": self.model(input_ids=ids, attention_mask=mask).last_hidden_state.float(),
            "attention_mask": mask,
            "prompt_length": torch.tensor(batch["prompt_length"], device=self.device),
        }
        for layer in self._layers:
            layer(features)
        return {"vectors": features["sentence_embedding"].numpy(force=True), **inputs}

    def postprocess(self, output: Inputs, dimensions: int | None = None, normalize: bool = False) -> Inputs:
        (vector,) = output["vectors"]
        base.check_finite(vector)
        if dimensions and dimensions > len(vector):
            raise UsageError(f"--dimensions {dimensions} exceeds the {len(vector)} dimensions of the model's vectors")
        kept = vector[: dimensions or self.encoder.dimensions]
        if normalize or (dimensions and self._normalizes):
            kept = kept / max(np.linalg.norm(kept), 1e-12)
        fields: Inputs = {"embedding": kept.tolist()}
        if output["cut"]:
            fields["truncated"] = output["cut"]
        return {**fields, "usage": {"prompt_tokens": len(output["input_ids"])}}
