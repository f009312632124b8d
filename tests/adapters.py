"""Adapters with random weights, as PEFT saves them."""

from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel


def make_adapter(folder: Path, model: PreTrainedModel, config: PeftConfig, scale: float = 0.3) -> PeftModel:
    """Save an adapter, and return the model with the adapter, not merged."""
    torch.manual_seed(1)
    adapted = get_peft_model(model, config).eval()
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * scale)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return adapted


def make_lora(folder: Path, base: Path) -> Path:
    """Save a LoRA of a Llama's folder."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    make_adapter(folder, model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    return folder
