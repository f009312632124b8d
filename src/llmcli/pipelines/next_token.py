"""Texts -> how likely each token of the vocabulary is next. A transformers.Pipeline."""

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from llmcli.pipelines.base import Inputs, as_batch, check_finite
from llmcli.pipelines.causal import CausalPipeline
from llmcli.pipelines.spelling import CONTEXT_TOKENS, token_texts

if TYPE_CHECKING:
    from transformers import GenerationConfig


class NextTokenPipeline(CausalPipeline):
    """Compute the distribution of the next token.

    For a batch of B texts, the longest of P tokens, with a vocabulary of V:

    preprocess   as of CausalPipeline
    _forward     probability, the softmax of the model's logits, and sampling_probability, that of what `generate` makes
                 of these before it draws a token, 1 for a single one if it is greedy: float32 (B, V)
    postprocess  both, (V,); of one text its input_ids, and as `sampling` the settings by which a token is drawn;
                 truncated, if tokens were cut
    """

    def token_texts(self, token: int, before: Sequence[int]) -> str:
        return token_texts(self.tokenizer, [*before[-CONTEXT_TOKENS:], token])[-1]

    def _forward(self, inputs: Inputs, generation_config: "GenerationConfig | None" = None, **settings: Any) -> Inputs:
        config = copy.copy(generation_config or self.model.generation_config)
        config.max_new_tokens, config.max_length, config.num_beams = 1, None, 1
        config.return_dict_in_generate = config.output_logits = config.output_scores = True
        config.remove_invalid_values = True  # NaN would end `multinomial`, and the whole batch; postprocess reports it
        ids, mask = self.pad(as_batch(inputs)["input_ids"], left=True)
        output = self.model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        (logits,), (scores,) = output.logits, output.scores
        sampling = scores.float().softmax(-1)
        if not config.do_sample:
            sampling = torch.nn.functional.one_hot(scores.argmax(-1), scores.shape[-1]).float()
        computed = {"probability": logits.float().softmax(-1), "sampling_probability": sampling}
        return {**{name: tensor.numpy(force=True) for name, tensor in computed.items()}, **inputs}

    def postprocess(self, output: Inputs, generation_config: "GenerationConfig | None" = None) -> Inputs:
        check_finite(output["probability"])
        config = generation_config or self.model.generation_config
        sampling: Mapping[str, float] = {"temperature": 0}
        if config.do_sample:
            sampling = {name: value for name in ("temperature", "top_k", "top_p") if (value := getattr(config, name))}
        fields: Inputs = {name: output[name][0] for name in ("probability", "sampling_probability")}
        fields |= {"input_ids": output["input_ids"].tolist(), "sampling": sampling}
        return {**fields, "truncated": output["cut"]} if output["cut"] else fields
