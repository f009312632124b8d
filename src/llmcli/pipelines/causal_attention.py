"""The attention of a causal language model, on the weights that it generates with. A transformers.Pipeline."""

from transformers.pipelines import PIPELINE_REGISTRY

from llmcli.pipelines.attention import AttentionPipeline
from llmcli.pipelines.head import CausalHead


class CausalAttentionPipeline(AttentionPipeline):
    """As of AttentionPipeline; a worker that keeps the model for `generate` need not load it again."""

    auto_class = CausalHead.auto_class
    check = staticmethod(CausalHead.check)


PIPELINE_REGISTRY.register_pipeline("llmcli-causal_attention", pipeline_class=CausalAttentionPipeline)
