"""Texts -> how likely each token of the vocabulary is next. A transformers.Pipeline."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers.pipelines import PIPELINE_REGISTRY

from llmcli.pipelines import rows
from llmcli.pipelines.causal import CausalPipeline
from llmcli.pipelines.spelling import BEFORE, token_texts


class NextTokenPipeline(CausalPipeline):
    """What the steps hand to each other, for a batch of B texts, the longest of P tokens, with a vocabulary of V:

    preprocess   as of CausalPipeline
    _forward     probability, the softmax of the model's logits, and sampling_probability, that of what `generate` makes
                 of these before it draws a token, 1 for a single one where it is greedy: float32 (B, V)
    postprocess  both, (V,); of one text its input_ids, and as `sampling` the settings by which a token is drawn;
                 truncated, where tokens were cut
    """

    def token_texts(self, token: int, before: Sequence[int]) -> str:
        """What a token stands for behind others."""
        return token_texts(self.tokenizer, [*before[-BEFORE:], token])[-1]

    def _forward(  # type: ignore[override]  # nothing is streamed
        self, inputs: dict[str, Any], generation_config: Any = None, **_: Any
    ) -> dict[str, Any]:
        config = copy.copy(generation_config or self.model.generation_config)
        config.max_new_tokens, config.max_length, config.num_beams = 1, None, 1
        config.return_dict_in_generate = config.output_logits = config.output_scores = True
        ids, mask = rows.padded(rows.listed(inputs)["input_ids"], self.tokenizer.pad_token_id, self.device, left=True)
        made = self.model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        (logits,), (scores,) = made.logits, made.scores
        sampling = scores.float().softmax(-1)
        if not config.do_sample:
            sampling = torch.nn.functional.one_hot(scores.argmax(-1), scores.shape[-1]).float()
        probability = logits.float().softmax(-1)
        return {
            "probability": probability.numpy(force=True), "sampling_probability": sampling.numpy(force=True), **inputs,
        }  # fmt: skip

    def postprocess(self, output: dict[str, Any], generation_config: Any = None) -> dict[str, Any]:
        """Of one text."""
        both = {name: output[name][0] for name in ("probability", "sampling_probability")}
        config = generation_config or self.model.generation_config
        sampling: dict[str, Any] = {"temperature": 0}
        if config.do_sample:
            sampling = {name: value for name in ("temperature", "top_k", "top_p") if (value := getattr(config, name))}
        cut = {"truncated": output["cut"]} if output["cut"] else {}
        return {**both, "input_ids": output["input_ids"].tolist(), "sampling": sampling, **cut}


PIPELINE_REGISTRY.register_pipeline("llmcli-next_token", pipeline_class=NextTokenPipeline)
