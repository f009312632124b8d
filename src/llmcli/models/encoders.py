"""What the files of sentence-transformers say about an encoder or a cross-encoder: modules, prompts and limits."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmcli.errors import ModelUnavailableError
from llmcli.job import JsonObject
from llmcli.models import loading

DEFAULT_TOKENS = 512  # of a text, for an encoder that states no limit
SETTINGS = "config_sentence_transformers.json"
MODULES = ("Pooling", "Dense", "Normalize", "LayerNorm", "Dropout")  # that may follow the transformer
POOLING_MODES = {  # names in older files, in the order in which sentence-transformers joins their vectors
    "cls_token": "cls", "max_tokens": "max", "mean_tokens": "mean", "mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "weightedmean_tokens": "weightedmean", "lasttoken": "lasttoken",
}  # fmt: skip
PROMPT_NAMES = {"query": ("query",), "document": ("document", "passage", "corpus")}  # by the role of a text
# Of the transformer module: what would change vectors, and arguments that change none.
REFUSED = ("processing_kwargs", "query_length", "document_length", "query_expansion", "tokenizer_name_or_path")
ARGUMENTS = ("model_args", "model_kwargs", "tokenizer_args", "processor_kwargs", "config_args", "config_kwargs")
HARMLESS = {"add_pooling_layer", "attn_implementation", "dtype", "padding_side", "torch_dtype", "use_cache"}


@dataclass(frozen=True, slots=True)
class EncoderModule:
    """A module that follows the transformer: its class in sentence-transformers, its configuration, its directory."""

    type: str
    config: JsonObject
    folder: Path


@dataclass(frozen=True, slots=True)
class Encoder:
    """How an encoder reads a text, or a cross-encoder a pair of texts."""

    modules: Sequence[EncoderModule]
    prompts: Mapping[str | None, str]  # by the role of a text: query, document, or None
    context_length: int  # of a text with its prompt, special tokens included
    lowers_case: bool = False
    dimensions: int | None = None  # that vectors keep; None: all
    activation: str | None = None  # of a cross-encoder; None: as its config.json says


def read_encoder(folder: Path) -> Encoder:
    """Return how a sentence encoder reads a text. Raises ModelUnavailableError if llmcli cannot."""
    with loading.translated_errors(folder):
        settings, modules = _read_json(folder / SETTINGS), _read_json(folder / "modules.json")
        if (kind := settings.get("model_type", "SentenceTransformer")) != "SentenceTransformer":
            raise _unsupported(folder, kind, "to rank texts: `llmcli rerank`" if kind == "CrossEncoder" else None)
        transformer = _read_transformer(folder, "feature-extraction", "last_hidden_state")
        following = _read_modules(folder, modules) if modules else _default_modules(folder)
        limits = _limit(folder, transformer), loading.max_positions(_read_json(folder / "config.json").get)
        length = int(min((limit for limit in limits if limit and limit > 0), default=DEFAULT_TOKENS))
        lowers_case = bool(transformer.get("do_lower_case"))
        return Encoder(following, _read_prompts(settings), length, lowers_case, settings.get("truncate_dim"))


def read_cross_encoder(folder: Path) -> Encoder:
    """Return how a cross-encoder reads a pair of texts. Raises ModelUnavailableError if llmcli cannot."""
    with loading.translated_errors(folder):
        settings, modules = _read_json(folder / SETTINGS), _read_json(folder / "modules.json")
        if settings.get("model_type") != "CrossEncoder" or not modules:
            return Encoder((), {}, 0)
        transformer = _read_transformer(folder, "sequence-classification", "logits")
        if others := _read_modules(folder, modules):
            raise _unsupported(folder, f"module {others[0].type}")
        prompts, length = _read_prompts(settings), transformer.get("max_seq_length") or 0
        return Encoder((), prompts, length, bool(transformer.get("do_lower_case")), None, settings.get("activation_fn"))


def read_pooling_modes(config: JsonObject) -> list[str]:
    """Return how a pooling module makes vectors of the states of tokens; it joins them if there are several."""
    if modes := config.get("pooling_mode"):
        return [modes] if isinstance(modes, str) else modes
    prefix = "pooling_mode_"
    on = {name.removeprefix(prefix) for name, is_on in config.items() if name.startswith(prefix) and is_on is True}
    return [mode for name, mode in POOLING_MODES.items() if name in on] + sorted(on - POOLING_MODES.keys()) or ["mean"]


def lower(text: str) -> str:
    """Return a text in lower case as tokenizers write it, whatever surrounds a letter."""
    return "".join(map(str.lower, text))


def _read_transformer(folder: Path, task: str, output: str) -> JsonObject:
    files = [folder / "sentence_bert_config.json", *sorted(folder.glob("sentence_*_config.json"))]  # older names
    settings: JsonObject = next(filter(None, map(_read_json, files)), {})
    plain = {"method": "forward", "method_output_name": output}
    modalities = settings.get("modality_config") or {"text": plain}
    if modalities.get("text") != plain or "message" in modalities:
        raise _unsupported(folder, "modality_config for other inputs than texts")
    changed = [name for name in REFUSED if settings.get(name)]
    changed += sorted({key for name in ARGUMENTS for key in settings.get(name) or ()} - HARMLESS)
    changed += ["transformer_task"] * (settings.get("transformer_task", task) != task)
    if changed:
        raise _unsupported(folder, f"setting {changed[0]}")
    return settings


def _read_modules(folder: Path, modules: Sequence[JsonObject]) -> list[EncoderModule]:
    """Return the modules that follow the transformer, which must be the first and in the directory itself."""
    read = []
    for number, module in enumerate(modules):
        package, _, name = module["type"].rpartition(".")
        if not package.startswith("sentence_transformers."):
            raise _unsupported(folder, f"module {module['type']}, which is custom code,")
        if name not in (MODULES if number else ["Transformer"]):
            raise _unsupported(folder, f"module {name}")
        path = module["path"]
        if not re.fullmatch(r"\d[\w.-]*" if number else "", path):
            raise _unsupported(folder, f"module {name} in directory {path!r}")
        if number:
            read.append(EncoderModule(name, _read_json(folder / path / "config.json"), folder / path))
    return read


def _default_modules(folder: Path) -> list[EncoderModule]:
    """Return the modules of a directory that does not list them: vectors are pooled and normalized."""
    pooling, config = _read_json(folder / "1_Pooling" / "config.json"), _read_json(folder / "config.json")
    is_causal = (config.get("architectures") or [""])[0].endswith("ForCausalLM") and config.get("is_causal", True)
    pooling = pooling or {"pooling_mode": "lasttoken" if is_causal else "mean"}
    return [EncoderModule("Pooling", pooling, folder), EncoderModule("Normalize", {}, folder)]


def _read_prompts(settings: JsonObject) -> Mapping[str | None, str]:
    prompts, default = settings.get("prompts") or {}, settings.get("default_prompt_name")
    if default and default not in {"query", "document", *prompts}:
        raise ValueError(f"{SETTINGS} has no prompt {default!r}")
    names = {None: (default,), **PROMPT_NAMES}
    return {role: next((prompts[name] or "" for name in known if name in prompts), "") for role, known in names.items()}


def _limit(folder: Path, transformer: JsonObject) -> float | None:
    stated: float | None = transformer.get("max_seq_length")
    return stated or _read_json(folder / "tokenizer_config.json").get("model_max_length")


def _unsupported(folder: Path, what: str, hint: str | None = None) -> ModelUnavailableError:
    message = f"{folder}: {what} of sentence-transformers is not supported"
    return ModelUnavailableError(message, hint or "use another model: -m NAME")


def _read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
