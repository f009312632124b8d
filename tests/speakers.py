"""Tiny chat models that say what a test wants."""

import itertools
import json

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PARTS = ["<think>", "\nOkay, so", "\nParis.", "</think>", "\n\n", "Rome.", "\n"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SWITCH = "{% if add_generation_prompt and not enable_thinking | default(true) %}<think>\n\n</think>\n\n{% endif %}"
TASKS = {
    "qa": ("Where?", "-c", "It is in Rome."),
    "summarize": ("It is in Rome.",),
    "translate": ("It is in Rome.", "--from", "en", "--to", "fr"),
}


def make_speaker(
    folder, says, template=CHATML, special=(), eos="<|im_end|>", ends=("<eos>",), begins="assistant\n", **settings
):  # fmt: skip
    """Save a Llama whose next token follows from the last one alone: after a prompt that ends with the token `begins`,
    it says the tokens `says`. `settings` are for tokenizer_config.json."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = ["<eos>", "<|im_start|>", "<|im_end|>", *special]
    tokenizer.add_special_tokens(names)
    tokenizer.add_tokens([AddedToken(part, normalized=False) for part in [begins, *says] if part not in names])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
    fast.chat_template = template
    size = len(fast)
    config = LlamaConfig(
        vocab_size=size, hidden_size=size + size % 2, intermediate_size=2, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, max_position_embeddings=4096, eos_token_id=fast.convert_tokens_to_ids(list(ends)),
        pad_token_id=fast.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.zero_()
    model.model.norm.weight.data.fill_(1)
    model.model.embed_tokens.weight.data[:, :size] = torch.eye(size)
    chain = fast.convert_tokens_to_ids([begins, *says, eos])
    for token, after in itertools.pairwise(chain):
        model.lm_head.weight.data[after, token] = 1
    model.lm_head.weight.data[fast.eos_token_id] += 0.01
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    config_file = folder / "tokenizer_config.json"
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | settings))
    return folder
