"""Texts and models that the parts run on. BENCH_MODELS is where models with random weights are kept."""

import json
import os
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from measure import execute, pull

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
MODELS = Path(os.environ.get("BENCH_MODELS", Path(tempfile.gettempdir(), "llmcli-benchmarks")))
VOCABULARY = 49_152  # as SmolLM2 has
SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
BILLION = (2048, 22, 32, 4, 5632)  # see SHAPE


def words() -> list[str]:
    return ROOT.joinpath("LICENSE").read_text().split()


def prompts(count: int, maximum: int = 200, minimum: int = 4, seed: int = 7) -> list[str]:
    """Runs of `minimum` to `maximum` words, from the project's license."""
    known, chance = words(), random.Random(seed)
    lengths = [chance.randint(minimum, maximum) for _ in range(count)]
    starts = [chance.randrange(len(known) - length) for length in lengths]
    return [" ".join(known[start : start + length]) for start, length in zip(starts, lengths, strict=True)]


def lines(count: int, seed: int = 7) -> list[str]:
    """Runs of 3 to 15 words from the project's license, all different; beyond 10,000, of shuffled words."""
    known, chance, found = words(), random.Random(seed), dict[str, None]()
    if count > 10_000:
        known = chance.choices(known, k=count)
    while len(found) < count:
        length = chance.randint(3, 15)
        start = chance.randrange(len(known) - length)
        found[" ".join(known[start : start + length])] = None
    return list(found)


def sentences(count: int) -> list[str]:
    """Lines without punctuation, which nothing splits."""
    return [re.sub(r"[^\w ]+", "", line) or "word" for line in lines(count)]


def text() -> str:
    """The project's own pages, and its license."""
    pages = ["LICENSE", "README.md", "CONTRIBUTING.md", *sorted(f"docs/{page.name}" for page in ROOT.glob("docs/*.md"))]
    return "\n\n".join((ROOT / page).read_text(encoding="utf-8") for page in pages)


def write_records(path: Path, texts: Iterable[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def pseudowords() -> list[str]:
    """60,000 of them, so that a tokenizer of any size can be trained."""
    chance, letters = random.Random(7), "aabcdeefghiijklmnooprstuvwyz"
    return [" " + "".join(chance.choices(letters, k=chance.randint(3, 9))) for _ in range(60_000)]


def train_bpe(special: list[str], size: int = VOCABULARY) -> Any:
    from tokenizers import ByteLevelBPETokenizer

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([text(), *pseudowords()], size, 0, False, special)
    return trained


def random_model(config: Any, auto: str = "AutoModelForCausalLM", dtype: str = "float32", device: str = "cpu") -> Any:
    import torch
    import transformers

    torch.manual_seed(0)
    with torch.device(device):
        return getattr(transformers, auto).from_config(config, dtype=getattr(torch, dtype))


def random_llama(shape: tuple[int, ...], dtype: str, device: str = "cpu") -> Any:
    from transformers import LlamaConfig

    config = LlamaConfig(
        **dict(zip(SHAPE, shape, strict=True)), vocab_size=VOCABULARY, max_position_embeddings=8192,
        bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    return random_model(config, dtype=dtype, device=device)


def make_llama(folder: Path) -> None:
    """A Llama of 1.1 billion parameters with SmolLM2's tokenizer, which llama.cpp's converter knows."""
    random_llama(BILLION, "bfloat16").save_pretrained(folder)
    for file in Path(pull("smollm2")).glob("*token*"):
        shutil.copy(file, folder)


def make_marian(folder: Path, size: int = 59_514) -> None:
    """A Marian of the size of OPUS-MT from English to French, with the tokenizer of the tests."""
    from transformers import GenerationConfig, MarianConfig

    shutil.copytree(GOLDEN / "marian", folder, dirs_exist_ok=True)
    settings, pad = json.loads((folder / "tokenizer_config.json").read_text()), size - 1
    known = json.loads((folder / "vocab.json").read_text())
    old = str(known.pop("<pad>"))
    fillers = {f"<filler{i}>": i for i in range(len(known), pad)}
    (folder / "vocab.json").write_text(json.dumps(known | fillers | {"<pad>": pad}))
    settings["added_tokens_decoder"][str(pad)] = settings["added_tokens_decoder"].pop(old)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    special = {"pad_token_id": pad, "eos_token_id": 0, "decoder_start_token_id": pad}
    config = MarianConfig(
        vocab_size=size, decoder_vocab_size=size, d_model=512, encoder_layers=6, decoder_layers=6,
        encoder_attention_heads=8, decoder_attention_heads=8, encoder_ffn_dim=2048, decoder_ffn_dim=2048,
        activation_function="swish", max_position_embeddings=512, scale_embedding=True, init_std=0.05,
        share_encoder_decoder_embeddings=True, bos_token_id=0, **special,
    )  # fmt: skip
    model = random_model(config, "AutoModelForSeq2SeqLM")
    model.generation_config = GenerationConfig(bad_words_ids=[[pad]], max_length=512, bos_token_id=0, **special)
    model.save_pretrained(folder)


def make_bart(folder: Path) -> None:
    """A BART with 6 and 6 layers, as a distilled one has for summaries."""
    from transformers import BartConfig

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trained = train_bpe(special)
    trained.save_model(str(folder))
    names = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
    }
    settings = {"tokenizer_class": "BartTokenizer", "model_max_length": 1024, "sep_token": "</s>", "cls_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | names))
    config = BartConfig(
        vocab_size=VOCABULARY, d_model=768, encoder_layers=6, decoder_layers=6, encoder_attention_heads=12,
        decoder_attention_heads=12, encoder_ffn_dim=3072, decoder_ffn_dim=3072, init_std=0.05,
        forced_bos_token_id=None, forced_eos_token_id=None, normalize_before=False, normalize_embedding=True,
    )  # fmt: skip
    random_model(config, "AutoModelForSeq2SeqLM").save_pretrained(folder)


def make_bert(folder: Path, size: int = 30_522) -> None:
    """A BERT base with a head that answers questions."""
    from tokenizers import BertWordPieceTokenizer
    from transformers import BertConfig

    trained = BertWordPieceTokenizer()
    trained.train_from_iterator([text(), *pseudowords()], size, 0, show_progress=False)
    trained.save_model(str(folder))
    settings = {"tokenizer_class": "BertTokenizer", "model_max_length": 512, "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    random_model(BertConfig(vocab_size=size), "AutoModelForQuestionAnswering").save_pretrained(folder)


MAKERS: dict[str, Callable[[Path], None]] = {
    "llama-1b": make_llama, "marian": make_marian, "bart": make_bart, "bert-qa": make_bert,
}  # fmt: skip


def model(name: str) -> str:
    """The folder of a model, made or fetched if need be, in another process, so that this one stays small."""
    if name not in MAKERS:
        return pull(name)
    if not (folder := MODELS / name).exists():
        execute([sys.executable, __file__, name])
    return str(folder)


def main() -> None:
    MODELS.mkdir(parents=True, exist_ok=True)
    for name in sys.argv[1:] or MAKERS:
        if not (MODELS / name).exists():
            with tempfile.TemporaryDirectory(dir=MODELS) as scratch:
                MAKERS[name](Path(scratch))
                shutil.copytree(scratch, MODELS / name)


if __name__ == "__main__":
    main()
