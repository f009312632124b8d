"""Models that nobody trusts: no code of theirs runs, no file outside their directory is read, no header is believed."""

import json
import os
import pickle
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from weights import make_gguf

from llmcli.errors import ModelUnavailableError
from llmcli.models.store import gguf

SEED = 15
PROMPT = "the quick brown"
CODE = """
from pathlib import Path
Path({trace!r}).touch()
import transformers
class EvilConfig(transformers.LlamaConfig): model_type = "evil"
class EvilModel(transformers.LlamaForCausalLM): config_class = EvilConfig
class EvilTokenizer(transformers.PreTrainedTokenizerFast): pass
def generate(*args, **kwargs): Path({trace!r}).touch()
"""
AUTO_MAP = {
    "AutoConfig": "evil.EvilConfig",
    "AutoModel": "evil.EvilModel",
    "AutoModelForCausalLM": "evil.EvilModel",
    "AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"],
}
opened: list[str] | None = None  # paths that Python opened, while a test watches


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if opened is not None and event == "open" and isinstance(args[0], str | bytes):
        opened.append(os.path.realpath(os.fsdecode(args[0])))


@pytest.fixture
def watch() -> Iterator[Callable[[], list[str]]]:
    """`watch()` begins to note the files that are opened, and returns their list."""
    global opened

    def begin() -> list[str]:
        global opened
        if not hasattr(sys, "_llmcli_audited"):
            sys.addaudithook(_audit)
            sys._llmcli_audited = True  # type: ignore[attr-defined]  # A hook stays for good.
        opened = []
        return opened

    yield begin
    opened = None


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, with code beside it that leaves a trace."""
    folder = shutil.copytree(tiny, tmp_path / "model")
    code = CODE.format(trace=str(tmp_path / "trace"))
    for name in ("evil.py", "custom_generate/generate.py", "modeling_llama.py", "tokenization_llama.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(code)
    return folder


def edit(folder: Path, file: str, **changes: object) -> None:
    path = folder / file
    settings = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(settings | changes))


# ---- settings that choose code

REFUSED = {  # file and changes, and the key that the error names
    "attention internal": (
        "config.json",
        {"_attn_implementation_internal": "org/kernel"},
        "_attn_implementation_internal",
    ),
    "experts internal": ("config.json", {"_experts_implementation_internal": "x"}, "_experts_implementation_internal"),
    "attention kernel": ("config.json", {"attn_implementation": "org/kernel"}, "attn_implementation"),
    "private kernel": ("config.json", {"_attn_implementation": "org/kernel@main:f"}, "_attn_implementation"),
    "kernel by part": ("config.json", {"attn_implementation": {"text_config": "org/kernel"}}, "attn_implementation"),
    "experts kernel": ("config.json", {"experts_implementation": "org/kernel"}, "experts_implementation"),
    "nested internal": ("config.json", {"text_config": {"_attn_implementation_internal": "a/b"}}, "text_config"),
    "in a list": ("config.json", {"parts": [{"vision": [{"_attn_implementation_internal": None}]}]}, "parts.vision"),
    "nested trust": (
        "config.json",
        {"backbone_kwargs": {"trust_remote_code": True}},
        "backbone_kwargs.trust_remote_code",
    ),
    "trust": ("tokenizer_config.json", {"trust_remote_code": 1}, "trust_remote_code"),
    "trust in generation": ("generation_config.json", {"trust_remote_code": True}, "trust_remote_code"),
    "auto class": ("config.json", {"_auto_class": "AutoConfig"}, "_auto_class"),
    "class": ("config.json", {"__class__": "x"}, "__class__"),
    "dict": ("config.json", {"text_config": {"__dict__": {}}}, "__dict__"),
    "tokenizer that is a model": (
        "tokenizer_config.json",
        {"tokenizer_class": "AutoModelForCausalLM"},
        "tokenizer_class",
    ),
    "unknown type": ("config.json", {"model_type": "evil", "auto_map": AUTO_MAP}, "requires custom code"),
    "unknown type elsewhere": (
        "config.json",
        {"model_type": "evil", "auto_map": {"AutoConfig": "org/repo--evil.EvilConfig"}},
        "requires custom code",
    ),
}
IGNORED = {
    "auto_map": ("config.json", {"auto_map": AUTO_MAP}),
    "auto_map elsewhere": ("config.json", {"auto_map": {"AutoModelForCausalLM": "org/repo--evil.EvilModel"}}),
    "tokenizer": ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": AUTO_MAP["AutoTokenizer"]}}),
    "tokenizer list": ("tokenizer_config.json", {"auto_map": AUTO_MAP["AutoTokenizer"]}),
    "custom generate": ("generation_config.json", {"custom_generate": "custom_generate/generate.py"}),
    "custom generate elsewhere": ("generation_config.json", {"custom_generate": "org/repo"}),
    "custom pipelines": ("config.json", {"custom_pipelines": {"text-generation": {"impl": "evil.Evil", "pt": ["A"]}}}),
    "processor": ("processor_config.json", {"auto_map": {"AutoProcessor": "evil.Evil"}, "processor_class": "Evil"}),
    "preprocessor": ("preprocessor_config.json", {"auto_map": {"AutoImageProcessor": "evil.Evil"}}),
    "distrust": ("config.json", {"trust_remote_code": False}),
    "versions": ("config_sentence_transformers.json", {"__version__": {"pytorch": "2"}}),
    "eager": ("config.json", {"_attn_implementation": "eager"}),
    "name": ("config.json", {"_name_or_path": "org/evil", "_commit_hash": "abc"}),
}
EITHER = {  # refused or ignored by transformers, as it has the package or not
    "nested auto_map": ("config.json", {"text_config": {"auto_map": AUTO_MAP, "model_type": "evil"}}),
    "quantization": ("config.json", {"quantization_config": {"quant_method": "evil", "auto_map": AUTO_MAP}}),
    "quantizer of ours": ("config.json", {"quantization_config": {"quant_method": "llmcli-weight-only",
        "scheme": "int8", "layers": {"lm_head.evil": "evil"}, "processor": "x"}}),
    "torchao": ("config.json", {"quantization_config": {"quant_method": "torchao", "quant_type": "os.system"}}),
    "tokenizer class": ("tokenizer_config.json", {"tokenizer_class": "evil.EvilTokenizer"}),
    "contrastive search": ("generation_config.json", {"penalty_alpha": 0.6, "top_k": 4}),
    "method": ("config.json", {"to_dict": "x", "get_text_config": 1}),
}  # fmt: skip


def is_clean(ran: Any, tmp_path: Path) -> bool:
    """Whether nothing of the model ran, and llmcli said what it refuses."""
    lines = [line for line in ran.stderr.splitlines() if line.startswith("error: ")]
    has_said = ran.exit_status == 0 or (len(lines) == 1 and "unexpected" not in lines[0])
    return has_said and not (tmp_path / "trace").exists() and "Traceback" not in ran.stderr


@pytest.mark.parametrize("case", REFUSED)
def test_setting_that_chooses_code_is_refused(llmcli, model, tmp_path, case):
    file, changes, words = REFUSED[case]
    edit(model, file, **changes)
    ran = llmcli("generate", "-m", model, "--max-new-tokens", 2, PROMPT)
    assert ran.exit_status == 4
    assert words in ran.stderr
    assert "--trust-remote-code" in ran.stderr
    assert is_clean(ran, tmp_path)
    tokens = llmcli("inspect", "tokens", "-m", model, PROMPT)  # A tokenizer needs no code for a type that is unknown.
    assert tokens.exit_status == (0 if case.startswith("unknown") else 4)
    assert is_clean(tokens, tmp_path)


@pytest.mark.parametrize("case", IGNORED)
def test_setting_that_names_code_is_ignored(llmcli, model, tmp_path, case):
    file, changes = IGNORED[case]
    edit(model, file, **changes)
    ran = llmcli("generate", "-m", model, "--max-new-tokens", 2, PROMPT)
    assert (ran.exit_status, ran.stderr) == (0, "")
    assert is_clean(ran, tmp_path)


@pytest.mark.parametrize("case", EITHER)
def test_setting_that_transformers_judges_runs_nothing(llmcli, model, tmp_path, case):
    file, changes = EITHER[case]
    edit(model, file, **changes)
    ran = llmcli("generate", "-m", model, "--max-new-tokens", 2, PROMPT)
    assert is_clean(ran, tmp_path), ran.stderr


def test_trusted_code_runs(llmcli, model, tmp_path):
    edit(model, "config.json", auto_map=AUTO_MAP, model_type="evil")
    llmcli("generate", "-m", model, "--trust-remote-code", "--max-new-tokens", 2, PROMPT)
    assert (tmp_path / "trace").exists()


class Planted:
    """An object whose pickle leaves a trace when it is opened."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., None], tuple[Path]]:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("options", [(), ("--allow-pickle",)])
def test_pickle_that_runs_code_is_refused(llmcli, model, tmp_path, options):
    with zipfile.ZipFile(model / "pytorch_model.bin", "w") as archive:  # as torch.save writes it
        archive.writestr("archive/data.pkl", pickle.dumps(Planted(tmp_path / "trace")))
        archive.writestr("archive/version", "3\n")
    (model / "model.safetensors").unlink()
    ran = llmcli("generate", "-m", model, *options, PROMPT)
    assert ran.exit_status == 4
    assert is_clean(ran, tmp_path)


# ---- files outside


def link(path: Path, target: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def shard(model: Path, name: str) -> None:
    """Weights in one part of that name."""
    names = {"lm_head.weight": name, "model.norm.weight": name}
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    (model / "model.safetensors").unlink()
    (model / "model-00001-of-00001.safetensors").write_bytes(b"")


OUTSIDE: dict[str, Callable[[Path, Path], object]] = {
    "index": lambda model, secret: shard(model, f"../{secret.name}"),
    "index absolute": lambda model, secret: shard(model, str(secret)),
    "index by a directory": lambda model, secret: shard(model, f"custom_generate/../../{secret.name}"),
    "weights": lambda model, secret: link(model / "model.safetensors", secret),
    "config": lambda model, secret: link(model / "config.json", secret),
    "generation config": lambda model, secret: link(model / "generation_config.json", secret),
    "tokenizer": lambda model, secret: link(model / "tokenizer.json", secret),
    "relative": lambda model, secret: link(model / "tokenizer.json", Path("..", secret.name)),
    "chain": lambda model, secret: (link(model / "a", secret), link(model / "tokenizer.json", model / "a")),
    "template": lambda model, secret: link(model / "chat_template.jinja", secret),
    "templates": lambda model, secret: link(model / "additional_chat_templates", secret.parent / "templates"),
    "pooling": lambda model, secret: link(model / "1_Pooling", secret.parent / "templates"),
    "other settings": lambda model, secret: edit(model, "config.json", configuration_files=["../config.4.0.0.json"]),
    "other tokenizer": lambda model, secret: edit(
        model, "tokenizer_config.json", fast_tokenizer_files=["../tokenizer.4.0.0.json"]
    ),
    "vocabulary": lambda model, secret: edit(model, "tokenizer_config.json", vocab_file=str(secret)),
    "merges": lambda model, secret: edit(model, "tokenizer_config.json", merges_file=f"../{secret.name}"),
    "named weights": lambda model, secret: edit(model, "config.json", transformers_weights=f"../{secret.name}"),
}


@pytest.mark.parametrize("case", OUTSIDE)
def test_file_outside_is_not_read(llmcli, model, tmp_path, case, watch):
    secret = tmp_path / "secret.safetensors"
    shutil.copy(model / "model.safetensors", secret)
    (tmp_path / "templates").mkdir()
    for name in ("templates/config.json", "templates/x.jinja", "config.4.0.0.json", "tokenizer.4.0.0.json"):
        (tmp_path / name).write_text("{}")
    OUTSIDE[case](model, secret)
    before = watch()
    ran = llmcli("generate", "-m", model, "--max-new-tokens", 2, PROMPT)
    reads = [Path(path) for path in before if path.startswith(str(tmp_path.resolve()))]
    assert not [path for path in reads if not path.is_relative_to(model.resolve())]
    assert ran.exit_status == 4
    assert "outside the model's directory" in ran.stderr
    assert is_clean(ran, tmp_path)


def test_hub_snapshot_and_linked_directory_work(llmcli, tiny, tmp_path):
    home = tmp_path / "models--org--name"
    (home / "blobs").mkdir(parents=True)
    (home / "snapshots" / "abc").mkdir(parents=True)
    for file in tiny.iterdir():
        shutil.copy(file, home / "blobs" / f"0{file.name}")
        (home / "snapshots" / "abc" / file.name).symlink_to(f"../../blobs/0{file.name}")
    (tmp_path / "link").symlink_to(home / "snapshots" / "abc")
    (tmp_path / "own").symlink_to(tiny)
    for folder in (home / "snapshots" / "abc", tmp_path / "link", tmp_path / "own"):
        assert llmcli("generate", "-m", folder, "--max-new-tokens", 2, PROMPT).exit_status == 0


def test_snapshot_that_leads_to_another_repository_is_refused(llmcli, tiny, tmp_path):
    (tmp_path / "a" / "snapshots").mkdir(parents=True)
    folder = shutil.copytree(tiny, tmp_path / "a" / "snapshots" / "abc")
    (tmp_path / "b" / "blobs").mkdir(parents=True)
    shutil.move(folder / "config.json", tmp_path / "b" / "blobs" / "config")
    link(folder / "config.json", tmp_path / "b" / "blobs" / "config")
    ran = llmcli("generate", "-m", folder, PROMPT)
    assert "outside the model's directory" in ran.stderr


@pytest.mark.parametrize("target", ["nowhere", "/no/where", "itself"])
def test_dangling_link_that_is_not_needed_is_ignored(llmcli, model, target):
    (model / ("itself" if target == "itself" else "notes.txt")).symlink_to(target)
    (model / "preprocessor_config.json").symlink_to("nowhere")
    ran = llmcli("generate", "-m", model, "--max-new-tokens", 2, PROMPT)
    assert (ran.exit_status, ran.stderr) == (0, "")
    assert llmcli("models", "show", model).exit_status == 0
    quantized = ("--quantize", "int8", "--device", "cpu")
    assert llmcli("generate", "-m", model, *quantized, "--max-new-tokens", 2, PROMPT).exit_status == 0


def test_dangling_link_that_is_needed_is_refused(llmcli, model):
    link(model / "model.safetensors", Path("nowhere"))
    assert llmcli("generate", "-m", model, PROMPT).exit_status == 4


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "generation_config.json", "1_Pooling"])
@pytest.mark.parametrize("target", [None, "/dev/zero"])
def test_pipe_or_device_is_refused(llmcli, model, name, target):
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name) if target is None else (model / name).symlink_to(target)
    ran = llmcli("generate", "-m", model, PROMPT)
    assert (ran.exit_status, "is a pipe, a socket or a device" in ran.stderr) == (4, True)


@pytest.mark.parametrize(
    "name", ["config.json", "special_tokens_map.json", "chat_template.jinja", "1_Pooling/config.json"]
)
def test_huge_settings_are_refused_before_they_are_read(llmcli, model, name):
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).touch()
    os.truncate(model / name, 2**31)
    ran = llmcli("embed", "-m", model, PROMPT)
    assert (ran.exit_status, "has 2147483648 bytes" in ran.stderr) == (4, True)


ODD_SETTINGS = {  # file and content, and the commands that read them
    "eos_token_id": ("generation_config.json", {"eos_token_id": [[]]}, ("generate", "inspect next")),
    "num_beams": ("generation_config.json", {"num_beams": "x"}, ("generate", "inspect next")),
    "stop_strings": ("generation_config.json", {"stop_strings": 1}, ("generate", "inspect next")),
    "max_length": ("tokenizer_config.json", {"model_max_length": "x"}, ("generate", "embed", "inspect tokens")),
    "tokenizer": ("tokenizer_config.json", {"tokenizer_class": "RagTokenizer"}, ("generate", "inspect tokens")),
    "capacity": ("config.json", {"moe_eval_capacity_token_fraction": "x"}, ("generate the fox", "score the fox")),
    "architectures": ("config.json", {"architectures": 5, "is_encoder_decoder": True}, ("translate --to fr",)),
    "sequence": ("sentence_bert_config.json", {"max_seq_length": "x"}, ("embed",)),
    "settings": ("sentence_bert_config.json", [], ("embed",)),
    "pooling": ("1_Pooling/config.json", [], ("embed",)),
    "modules": ("modules.json", [1], ("embed",)),
    "weights": ("model.safetensors.index.json", {"weight_map": {"a": "x" * 5000}}, ("generate",)),
}


@pytest.mark.parametrize("case", ODD_SETTINGS)
def test_settings_of_a_wrong_type_are_one_error(llmcli, model, case):
    name, content, commands = ODD_SETTINGS[case]
    if case == "weights":
        (model / "model.safetensors").rename(model / "model-1.safetensors")
    (model / name).parent.mkdir(exist_ok=True)
    if isinstance(content, dict):
        edit(model, name, **content)
    else:
        (model / name).write_text(json.dumps(content))
    for command in commands:
        ran = llmcli(*command.split(), "-m", model, PROMPT)
        errors = [line for line in ran.stderr.splitlines() if line.startswith("error: ")]
        assert (ran.exit_status, len(errors), "unexpected" in ran.stderr) == (4, 1, False), ran.stderr


def test_directory_without_tokenizer_is_named(llmcli, model):
    for file in (*model.glob("token*"), *model.glob("*.jinja")):
        file.unlink()
    assert "has no tokenizer that can be read" in llmcli("generate", "-m", model, PROMPT).stderr


def test_adapter_beside_weights_is_ignored_with_a_warning(llmcli, model, monkeypatch):
    from transformers.models.auto import auto_factory

    options = ("generate", "-m", model, "--temperature", 0, "--max-new-tokens", 8, PROMPT)
    expected = llmcli(*options).stdout
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "org/evil", "r": 4, "target_modules": ["q_proj"]}
    (model / "adapter_config.json").write_text(json.dumps(adapter))
    (model / "adapter_model.safetensors").write_bytes(b"")
    monkeypatch.setattr(auto_factory, "is_peft_available", lambda: True)
    ran = llmcli(*options)
    assert (ran.exit_status, ran.stdout) == (0, expected)
    assert ran.stderr == f"warning: '{model}' has an adapter beside its weights, which is ignored\n"
    (model / "model.safetensors").unlink()
    assert llmcli(*options).exit_status == 4
    (model / "config.json").unlink()
    assert "has no config.json" in llmcli(*options).stderr


# ---- GGUF


@pytest.fixture(scope="session")
def header(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_gguf(tiny, tmp_path_factory.mktemp("gguf") / "real.gguf")


def mutate(rng: random.Random, data: bytes, size: int) -> bytes:
    """Change a header of `size` bytes in one to four places."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(4, size - 8)
        match rng.randrange(6):
            case 0:
                changed[place] ^= 1 << rng.randrange(8)
            case 1:
                changed[place] = rng.randrange(256)
            case 2:
                big = rng.choice([0, 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1, len(data)])
                changed[place : place + 8] = struct.pack("<Q", big)
            case 3:
                changed[place : place + 4] = struct.pack("<I", rng.choice([0, 8, 9, 10, 255, 2**32 - 1]))
            case 4:
                del changed[place : place + rng.randint(1, 64)]
            case 5:
                changed[place:place] = rng.randbytes(rng.randint(1, 64))
    return bytes(changed)


def mutations(header: Path, count: int) -> Iterator[bytes]:
    data, rng = header.read_bytes(), random.Random(SEED)
    size = data.rindex(b".weight") + 64
    for i in range(count):
        yield data[: rng.randrange(size)] if i % 25 == 0 else mutate(rng, data, size)


def test_mutated_headers_are_refused_or_fit_the_file(header, tmp_path):
    file, before = tmp_path / "mutated.gguf", psutil.Process().memory_info().rss
    assert gguf.measure(header) > 0
    accepted = 0
    for data in mutations(header, 500):
        file.write_bytes(data)
        try:
            assert gguf.measure(file) <= 4 * len(data)
            accepted += 1
        except (ValueError, LookupError, struct.error):
            pass
    assert 0 < accepted < 250
    assert psutil.Process().memory_info().rss - before < 200_000_000


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_mutated_files_are_refused_or_converted(llmcli, header, tmp_path):
    tried = 0
    for i, data in enumerate(mutations(header, 500)):
        file = tmp_path / f"mutated{i}.gguf"
        file.write_bytes(data)
        try:
            gguf.measure(file)
        except (ValueError, LookupError, struct.error):
            continue
        ran = llmcli("models", "pull", file)
        assert ran.exit_status in (0, 4), ran.stderr
        assert "Traceback" not in ran.stderr
        assert "unexpected" not in ran.stderr
        tried += 1
        if tried == 8:
            break
    assert tried == 8


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def made(values: bytes = b"", tensors: bytes = b"", *, counts: tuple[int, int] = (0, 0), version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, *counts) + values + tensors


def tensor(shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(b"t") + dimensions + struct.pack("<IQ", kind, offset)


HEADERS = {
    "tensors": made(counts=(2**63, 0)),
    "values": made(counts=(0, 2**63)),
    "key": made(struct.pack("<Q", 2**62), counts=(0, 1)),
    "string": made(text(b"k") + struct.pack("<IQ", 8, 2**62), counts=(0, 1)),
    "array": made(text(b"k") + struct.pack("<IIQ", 9, 4, 2**62), counts=(0, 1)),
    "array of bytes": made(text(b"k") + struct.pack("<IIQ", 9, 0, 5_000_000) + bytes(5_000_000), counts=(0, 1)),
    "array of strings": made(text(b"k") + struct.pack("<IIQ", 9, 8, 3_000_000), counts=(0, 1)),
    "nested array": made(text(b"k") + struct.pack("<IIQ", 9, 9, 1) * 1000, counts=(0, 1)),
    "array of unknown": made(text(b"k") + struct.pack("<IIQ", 9, 77, 1), counts=(0, 1)),
    "unknown value": made(text(b"k") + struct.pack("<I", 77), counts=(0, 1)),
    "alignment": made(text(b"general.alignment") + struct.pack("<II", 4, 3), counts=(0, 1)),
    "no alignment": made(text(b"general.alignment") + struct.pack("<II", 4, 0), counts=(0, 1)),
    "fractional alignment": made(text(b"general.alignment") + struct.pack("<If", 6, 32), counts=(0, 1)),
    "huge alignment": made(text(b"general.alignment") + struct.pack("<II", 4, 2**31), counts=(0, 1)),
    "layers": made(text(b"llama.block_count") + struct.pack("<II", 4, 2**32 - 1), counts=(0, 1)),
    "negative layers": made(text(b"llama.block_count") + struct.pack("<Ii", 5, -1), counts=(0, 1)),
    "dimensions": made(tensors=tensor((1,) * 5), counts=(1, 0)),
    "many dimensions": made(tensors=text(b"t") + struct.pack("<I", 2**32 - 1), counts=(1, 0)),
    "shape": made(tensors=tensor((2**40, 2**40)), counts=(1, 0)),
    "offset": made(tensors=tensor((1,), offset=2**60), counts=(1, 0)),
    "unaligned": made(tensors=tensor((1,), offset=3) + bytes(99), counts=(1, 0)),
    "kind": made(tensors=tensor((1,), kind=4711), counts=(1, 0)),
    "block": made(tensors=tensor((33,), kind=8) + bytes(999), counts=(1, 0)),
    "overlap": made(tensors=tensor((16,)) * 9 + bytes(99), counts=(9, 0)),
    "version": made(version=1),
    "magic": b"GGML" + made()[4:],
    "empty": b"",
    "short": b"GGUF\3",
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
def test_impossible_header_is_refused_before_it_is_read(llmcli, tmp_path, case):
    file = tmp_path / "bad.gguf"
    file.write_bytes(HEADERS[case])
    started = time.monotonic()
    ran = llmcli("generate", "-m", file, PROMPT)
    assert ran.exit_status == 4
    assert "error: cannot read bad.gguf: " in ran.stderr
    assert ran.stderr.count("\n") == 3  # a note, an error and a hint
    assert time.monotonic() - started < 5


def test_big_endian_header_is_read(tmp_path):
    import gguf as package
    import numpy

    writer = package.GGUFWriter(tmp_path / "big.gguf", "llama", endianess=package.GGUFEndian.BIG)
    writer.add_block_count(1)
    writer.add_custom_alignment(64)
    writer.add_array("names", ["a", "b"])
    writer.add_tensor("t", numpy.ones((3, 4), "f4"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert gguf.measure(tmp_path / "big.gguf") == 48


@pytest.mark.slow
def test_child_converts_and_reads_no_other_file(llmcli, header, tmp_path, model):
    file = tmp_path / "model" / "MINE.GGUF"  # beside a config.json and code
    shutil.copy(header, file)
    edit(model, "config.json", auto_map=AUTO_MAP, model_type="evil")
    edit(model, "tokenizer_config.json", auto_map=AUTO_MAP)
    ran = llmcli("generate", "-m", file, "--temperature", 0, "--dtype", "float32", "--max-new-tokens", 4, PROMPT)
    assert ran.exit_status == 0
    assert ran.stdout.startswith(PROMPT)
    assert ran.stderr == "note: converting MINE.GGUF to safetensors, once\n"
    assert not (tmp_path / "trace").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("limit", "words"), [("memory", "memory"), ("seconds", "more than 2 seconds of CPU time")])
def test_child_over_its_limit_is_one_error(header, tmp_path, limit, words):
    limits = {"memory": 10**9, "seconds": 100} | ({"memory": 10**6} if limit == "memory" else {"seconds": 2})
    with pytest.raises(ModelUnavailableError) as error:
        gguf.run_child(header, tmp_path / "ready", **limits)
    assert words in f"{error.value.message} {error.value.hint}"
    assert "\n" not in error.value.message


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_child_that_is_killed_is_one_error(header, tmp_path, number):
    others = set(psutil.Process().children())  # of earlier tests, such as the one that checks constraints

    def kill() -> None:
        while not (children := set(psutil.Process().children()) - others):
            time.sleep(0.01)
        children.pop().send_signal(number)

    threading.Thread(target=kill, daemon=True).start()
    with pytest.raises(ModelUnavailableError, match=f"the conversion failed: exit status -{number.value}"):
        gguf.run_child(header, tmp_path / "ready", 10**9, 100)


@pytest.mark.slow
def test_child_ends_with_its_parent(header, tmp_path):
    code = f"import sys; from pathlib import Path; from llmcli.models.store import gguf\n\
gguf.run_child(Path({str(header)!r}), Path({str(tmp_path / 'ready')!r}), 10**9, 100)"
    parent = subprocess.Popen([sys.executable, "-c", code])
    while not (children := psutil.Process(parent.pid).children()):
        time.sleep(0.01)
    parent.kill()
    assert not psutil.wait_procs(children, timeout=20)[1]
    parent.wait()


def test_security_page_names_existing_tests():
    root = Path(__file__).parent
    rows = [line for line in (root.parent / "SECURITY.md").read_text().splitlines() if ".py::" in line]
    assert len(rows) >= 15
    for row in rows:
        file, names = re.search(r"`(test_\w+\.py)::", row)[1], re.findall(r"\b(test_\w+)`", row)
        assert names
        if (root / file).exists():
            text = (root / file).read_text()
            assert [name for name in names if f"def {name}(" not in text] == []
