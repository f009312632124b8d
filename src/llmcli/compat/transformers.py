"""What transformers keeps to itself: flags of pipelines, kinds of models, hooks of quantizers."""

import copy
import inspect
import math
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedConfig, PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.quantizers import HfQuantizer

# transformers' loop for greedy decoding and sampling, with what `generate` passes to a `custom_generate`.
sample_tokens = transformers.GenerationMixin._sample
beam_search = transformers.GenerationMixin._beam_search
# In this context, experts compute in the way that is faster for single tokens.
single_token_context = transformers.GenerationMixin._optimize_model_for_decode
OTHER_ATTENTION = {"cache", "position_bias", "softcap"}  # settings of attention that compute something else
FIXED_ROPE_TYPES = {None, "default", "linear", "llama3", "yarn"}


def read_next(
    model: PreTrainedModel, ids: torch.Tensor, settings: dict[str, Any], config: GenerationConfig | None = None
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Return the logits (B, V) after rows of tokens (B, T), and what the next forward pass takes beside tokens.

    It reads the last tokens, or prompts if there is a config, as transformers' loop does.
    """
    if config:
        output = model._prefill(ids, config, settings)
    else:
        length = 1 if settings["use_cache"] else None
        inputs = model.prepare_inputs_for_generation(ids, next_sequence_length=length, **settings)
        output = model(**inputs, return_dict=True)
    is_seq2seq = model.config.is_encoder_decoder
    settings = model._update_model_kwargs_for_generation(output, settings, is_encoder_decoder=is_seq2seq)
    # A copy, so that not all logits of the prompts are kept.
    return output.logits[:, -1].to(ids.device, torch.float32, copy=config is not None), settings


def excluded_tokens(processor: LogitsProcessor) -> tuple[list[int], float] | None:
    """Return the tokens that a `LogitsProcessor` excludes from rows below a length; None if it does anything else."""
    match processor:
        case transformers.NoBadWordsLogitsProcessor(sequence_bias=words) if all(len(word) == 1 for word in words):
            return [word[0] for word in words], math.inf
        case transformers.MinNewTokensLengthLogitsProcessor(eos_token_id=ends, prompt_length_to_skip=start):
            return ends.tolist(), start + processor.min_new_tokens
        case transformers.MinLengthLogitsProcessor(eos_token_id=ends, min_length=length):
            return ends.tolist(), length
    return None


def read_processors(model: PreTrainedModel, config: GenerationConfig) -> LogitsProcessorList:
    """Return each `LogitsProcessor` that `generate` makes for greedy decoding or sampling by a generation config.

    Stop texts and the minimum of new tokens, which depend on the length of the prompt, are left to the caller.
    """

    def run(
        model: PreTrainedModel, input_ids: object, logits_processor: LogitsProcessorList, **_: object
    ) -> LogitsProcessorList:
        return logits_processor

    ids = torch.ones(1, 1, dtype=torch.int64, device=model.device)
    config = copy.copy(config)
    config.stop_strings = config.min_new_tokens = None
    return model.generate(ids, attention_mask=ids, generation_config=config, custom_generate=run)


class TextPipelineMixin:
    """Pipelines that read text alone, and move their tensors to the device themselves."""

    _load_tokenizer = True
    _load_feature_extractor = _load_image_processor = _load_processor = False

    def _ensure_tensor_on_device(self, inputs: object, device: object) -> object:
        return inputs  # transformers would look for tensors in every list, and there is one for each field


def share_keys_and_values() -> None:
    """Let attention read the keys and values that several heads, or beams of a source, share in place."""
    os.environ.setdefault("TRANSFORMERS_SDPA_FORCE_GQA", "1")
    ALL_ATTENTION_FUNCTIONS["sdpa"] = _attend


def _attend(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **settings: Any
) -> tuple[Any, None]:
    """Attend to keys and values as transformers does. One token's queries of all heads that share keys are read as one.

    The kernel then reads keys once: in float32, it is 1.2 to 3 times faster; in bfloat16, that takes 8 heads. Keys and
    values of S sources (S, H, P, D) may have queries of N beams each (S * N, H, 1, D).
    """
    if len(query) != len(key):
        query = query.unflatten(0, (len(key), -1)).flatten(2, 3).transpose(1, 2)
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, **{**settings, "is_causal": False}
        )
        return output.flatten(0, 1)[:, None], None
    (rows, heads, tokens, _), (_, shared, length, _), mask = query.shape, key.shape, attention_mask
    is_faster = query.is_cpu and heads // shared >= (2 if query.dtype == torch.float32 else 8)
    is_plain = (mask is None or mask.shape[1::2] == (1, length)) and settings.keys().isdisjoint(OTHER_ATTENTION)
    if tokens > 1 or not is_faster or not is_plain:
        return sdpa_attention_forward(module, query, key, value, mask, **settings)  # type: ignore[no-any-return]
    queries, scale = query.reshape(rows, shared, heads // shared, -1), settings.get("scaling")
    output = nn.functional.scaled_dot_product_attention(queries, key, value, attn_mask=mask, scale=scale)
    return output.reshape(rows, 1, heads, -1), None


def tensor_parallel_settings(config: PreTrainedConfig, size: int, known: Collection[str]) -> dict[str, Any]:
    """Return what `from_pretrained` takes to split a model among that many processes; empty if it cannot be split."""
    text = config.get_text_config()
    heads = {getattr(text, name, None) or size for name in ("num_attention_heads", "num_key_value_heads")}
    has_plan = config.model_type in known and getattr(text, "base_model_tp_plan", None)
    if not has_plan or any(count % size for count in heads):
        return {}
    try:
        return {"distributed_config": DistributedConfig(tp_plan="auto")}
    except TypeError:  # transformers 5.6
        return {"tp_plan": "auto"}


def is_causal_lm(config: PreTrainedConfig) -> bool:
    """Return whether the model continues text: AutoModelForCausalLM also loads encoders, to train them further."""
    has_own_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or ())
    is_encoder = type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", True)
    is_causal = has_own_code or type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    return is_causal and not is_encoder and not getattr(config, "is_encoder_decoder", False)


def is_seq2seq_lm(config: PreTrainedConfig) -> bool:
    """Return whether transformers knows the model as one from text to text."""
    return bool(type(config) in transformers.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING and config.is_encoder_decoder)


def uses_sdpa(model: PreTrainedModel) -> bool:
    """Return whether attention is PyTorch's, which takes a mask of four dimensions as it is."""
    return bool(model.config._attn_implementation == "sdpa")


def takes_position_ids(model: PreTrainedModel) -> bool:
    """Return whether positions come from position IDs, and not from distances in the sequence as in ALiBi."""
    has_alibi = getattr(model.config, "alibi", False)  # Falcon's takes position IDs and ignores them
    return not has_alibi and takes(model, "position_ids")


def takes(model: PreTrainedModel, name: str) -> bool:
    """Return whether the forward pass of a model has a parameter of that name."""
    return name in inspect.signature(type(model).forward).parameters


def has_fixed_rotary_positions(model: PreTrainedModel) -> bool:
    """Return whether positions are rotary, and do not depend on the batch's length as in dynamic NTK and LongRoPE."""
    names = [type(module).__name__ for module in model.modules()]
    is_rotary = any(name.endswith("RotaryEmbedding") for name in names)
    is_learned = any(name.endswith("PositionalEmbedding") for name in names)
    return is_rotary and not is_learned and not _length_dependent_ropes(model.config)


def rope_limit(config: PreTrainedConfig) -> int | None:
    """Return the length beyond which a row changes the rotary positions of the other rows of its batch."""
    lengths = [rope.get("original_max_position_embeddings") for rope in _length_dependent_ropes(config)]
    return min(filter(None, lengths), default=None)


def _length_dependent_ropes(config: PreTrainedConfig) -> list[dict[str, Any]]:
    config = config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    by_layer = [value for value in rope.values() if isinstance(value, dict)] or [rope]
    return [rope for rope in by_layer if rope.get("rope_type") not in FIXED_ROPE_TYPES]


@contextmanager
def eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Compute attention in plain PyTorch: the faster implementations never have all weights at once."""
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(implementation)


class WeightQuantizer(HfQuantizer):  # type: ignore[misc]  # transformers has no types
    """A quantization method with the hooks before_loading(model), without weights, and after_loading(model)."""

    is_trainable = False

    def is_serializable(self) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: object) -> None:
        self.before_loading(model)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: object) -> None:
        self.after_loading(model)


def float32_modules(model: PreTrainedModel) -> list[str]:
    """Return the names of modules that the model wants to keep in float32."""
    names: list[str] = HfQuantizer.get_modules_to_not_convert(model, [], model._keep_in_fp32_modules)
    return names


def replace_module(model: PreTrainedModel, name: str, module: "nn.Module") -> None:
    """Put a module in the place of another, and untie its weights."""
    model.set_submodule(name, module)
    model.all_tied_weights_keys.pop(f"{name}.weight", None)


def mark_quantized(model: PreTrainedModel, quantizer: WeightQuantizer) -> None:
    """Let `save_pretrained` write the quantizer's config, by which `from_pretrained` finds it again."""
    model.config.quantization_config = quantizer.quantization_config
    model.hf_quantizer = quantizer
