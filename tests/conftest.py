"""One helper runs the real main(), as a person would; tiny models with random weights stand in for big ones."""

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job, and all it starts, would ignore it
# The cache that the suite shares with the user for the default model; tests of the cache itself make their own.
REAL_CACHE = os.environ.get("LLMCLI_CACHE")
WORDS = (
    "the",
    "quick",
    "brown",
    "fox",
    "a",
    "lazy",
    "dog",
    "and",
    "then",
    "sleeps",
    "in",
    "warm",
    "sun",
    "once",
    "upon",
)


@dataclass
class Ran:
    """What a command line did."""

    stdout: str
    stderr: str
    exit_status: int

    @property
    def records(self) -> list[dict[str, Any]]:
        """stdout as JSON Lines."""
        return [json.loads(line) for line in self.stdout.split("\n") if line]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration, a cache and a hub cache of the test's own; and no settings from outside."""
    from llmcli import config, console
    from llmcli.models import registry
    from llmcli.tasks import prompting, translate

    # GNU readline, which pytest plugins import, sets LINES and COLUMNS.
    for name in [name for name in os.environ if name.startswith(("LLMCLI_", "HF_")) or name in ("LINES", "COLUMNS")]:
        monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("LLMCLI_CACHE", str(home / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "config"))
    monkeypatch.setenv("HF_HOME", str(home / "huggingface"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(home / "run"))  # which is not there, so no worker is
    config.settings.cache_clear()
    registry.models.cache_clear()
    prompting.load_prompts.cache_clear()
    translate.load_examples.cache_clear()
    console.quiet = console.verbose = False
    return home


@pytest.fixture
def llmcli(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """`llmcli("generate", "Hello", stdin=b"...")` runs main() in this process."""
    from llmcli import cli

    def run(*args: object, stdin: bytes | None = None, is_terminal: bool = False) -> Ran:
        out, err = _stream(is_terminal), _stream(is_terminal, errors="backslashreplace")  # as Python opens them
        monkeypatch.setattr(sys, "stdin", _stream(stdin is None, stdin or b""))
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        status = cli.main([str(arg) for arg in args])
        for stream in (out, err):
            stream.flush()
        return Ran(out.buffer.getvalue().decode(), err.buffer.getvalue().decode(), status)

    return run


def _stream(is_terminal: bool, data: bytes = b"", errors: str = "strict") -> io.TextIOWrapper:
    stream = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8", errors=errors, newline="")
    stream.isatty = lambda: is_terminal  # type: ignore[method-assign]
    return stream


@pytest.fixture
def process() -> Callable[..., subprocess.CompletedProcess[bytes]]:
    """`process("generate", "Hello")` runs llmcli in a process of its own."""

    def run(*args: object, **settings: Any) -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "-m", "llmcli", *map(str, args)]
        return subprocess.run(command, capture_output=True, timeout=120, **settings)

    return run


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for a worker of the test's own, which ends with it; a socket's path must be short."""
    import workers

    folder = Path(tempfile.mkdtemp(prefix="llmcli"))
    workers.settle(folder, monkeypatch)
    yield folder
    workers.end()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def speaker(tmp_path: Path) -> Callable[..., Path]:
    """`speaker(["Rome."])` is a chat model that says these tokens."""
    from speakers import make_speaker

    return lambda *args, **settings: make_speaker(tmp_path / "speaker", *args, **settings)


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tokens of the prompts that models get, as text with special tokens marked by «»."""
    from llmcli.pipelines.causal import CausalPipeline

    seen: list[str] = []
    preprocess = CausalPipeline.preprocess

    def spy(self: Any, *args: object, **settings: object) -> Any:
        inputs = preprocess(self, *args, **settings)
        special = set(self.tokenizer.all_special_ids) | set(self.tokenizer.added_tokens_decoder)
        texts = [(id in special, self.tokenizer.decode([id])) for id in inputs["input_ids"]]
        prompt = "".join(f"«{text}»" if is_special else text for is_special, text in texts)
        seen.append(prompt.replace("«assistant\n»", "assistant\n"))
        return inputs

    monkeypatch.setattr(CausalPipeline, "preprocess", spy)
    return seen


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers that knows a few words, with a chat template; context of 64 tokens."""
    return make_tiny(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with room for the prompts of tasks."""
    return make_tiny(tmp_path_factory.mktemp("models") / "tiny-chatty", context=2048)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without a chat template."""
    return make_tiny(tmp_path_factory.mktemp("models") / "tiny-base", context=2048, chat=False)


@pytest.fixture(scope="session")
def encoder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers with the tiny Llama's words; 64 positions, no pooler."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def shared_cache() -> Path:
    """Where the user's own models lie, pulled at first use."""
    import platformdirs

    return Path(REAL_CACHE) if REAL_CACHE else platformdirs.user_cache_path("llmcli", appauthor=False)


@pytest.fixture
def real_cache(shared_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real models by their names, from the user's own cache."""
    monkeypatch.setenv("LLMCLI_CACHE", str(shared_cache))


@pytest.fixture(scope="session")
def smollm2(shared_cache: Path) -> Path:
    """The default model's folder, pulled once into the user's own cache."""
    command = [sys.executable, "-m", "llmcli", "models", "pull", "smollm2"]
    environment = os.environ | {"LLMCLI_CACHE": str(shared_cache)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


def make_tiny(folder: Path, words: Sequence[str] = WORDS, *, chat: bool = True, context: int = 64) -> Path:
    """Save a tiny Llama with fixed random weights, float32, to `folder`."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    # Byte-level: any text has tokens, and none is lost.
    special = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([f" {word}" for word in words] * 20, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    if chat:
        fast.chat_template = (
            "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '\n' }}{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}"
        )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=context, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    torch.nn.init.normal_(model.lm_head.weight, std=1.0)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def many_lines(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """`many_lines(500)` is a file of so many records of mixed length, of which every 50th lacks its text."""

    def write(count: int) -> Path:
        choose = random.Random(1)
        records = [
            {"id": i, "text": " ".join(choose.choices(WORDS, k=choose.randint(1, 30)))} if i % 50 else {"id": i}
            for i in range(count)
        ]
        path = tmp_path_factory.mktemp("many") / "in.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path

    return write
