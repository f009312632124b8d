"""Print which causal architectures compute the same with their layers split among processes:

    torchrun --nproc_per_node 2 tests/tensor_parallel.py

Those are the list `split` of src/llmcli/models/architectures.toml.
"""

import tempfile

import torch
from accelerate import PartialState
from test_architectures import CAUSAL, make_model, small_config
from transformers import AutoModelForCausalLM

from llmcli.compat.transformers import tensor_parallel_settings
from llmcli.models.loading import quiet_libraries

IDS = torch.arange(5, 25).view(2, 10)
GREEDY = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
MAX_PARAMETERS = 4_000_000


def compare(model_type: str, size: int) -> str | None:
    """Return how a tiny model of that type differs from its split copy, or "" if it does not; None if there is none."""
    try:
        config = small_config(model_type, is_causal=True)
        settings = tensor_parallel_settings(config, size, [config.model_type])
        with torch.device("meta"):
            meta = AutoModelForCausalLM.from_config(config)
        if not settings or sum(parameter.numel() for parameter in meta.parameters()) > MAX_PARAMETERS:
            return None
        torch.manual_seed(0)
        whole = make_model(AutoModelForCausalLM, config)
    except Exception:  # it needs images, audio or another library
        return None
    try:
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode(False), torch.no_grad():
            whole.save_pretrained(folder)
            split = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **settings)
            expected, logits = whole(IDS).logits, split(IDS).logits
            difference = float((logits - expected).abs().max() / expected.abs().max())
            same_text = torch.equal(whole.generate(IDS, **GREEDY), split.generate(IDS, **GREEDY))
        return "" if same_text and difference < 1e-4 else f"logits differ by {difference:.1e}"
    except Exception as exc:
        return f"{type(exc).__name__}: {exc}".split("\n")[0]


if __name__ == "__main__":
    quiet_libraries()
    state = PartialState(cpu=True)
    for name in CAUSAL:
        found = compare(name, state.num_processes)
        if state.is_main_process and found is not None:
            print(f"{name}: {found or 'same'}", flush=True)
