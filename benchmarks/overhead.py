"""What llmcli itself costs a record: JSON Lines through `generate` with a model that answers at once, and a tokenizer
that costs nothing or is SmolLM2's. Records a second, and how much the resident set grows over a million records."""

FEW, MANY = 10_000, 1_000_000
CHILD = """
import sys
from types import SimpleNamespace

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from llmcli import loader
from llmcli.cli import main

is_free, folder, args = sys.argv[1] == "free", sys.argv[2], sys.argv[3:]
config = LlamaConfig(vocab_size=50_000, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                     max_position_embeddings=2048, eos_token_id=2)
answer = torch.tensor([[100, 101, 102, 2]])


class Model(LlamaForCausalLM):
    def generate(self, input_ids, **settings):
        for criterion in settings["stopping_criteria"]:
            criterion(input_ids, None)
        return torch.cat([input_ids, answer.expand(len(input_ids), -1)], 1)


class Tokenizer:
    padding_side, pad_token_id, bos_token_id, eos_token_id, chat_template = "left", 0, None, 2, None
    padding_side, feature_extractor = "left", None

    def __call__(self, text, **settings):
        return {"input_ids": [5, 6, 7, 8], "attention_mask": [1, 1, 1, 1]}

    def decode(self, ids, **settings):
        return " an answer"


def load(*_):
    return Model(config).eval(), Tokenizer() if is_free else AutoTokenizer.from_pretrained(folder)


loader.load = load
status = main(args)
with open("/proc/self/status") as about:
    print(next(line for line in about if line.startswith("VmHWM")).split()[1], file=sys.stderr)
sys.exit(status)
"""
