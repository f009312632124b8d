"""What the files of sentence-transformers say about an encoder: its modules, prompts and limits."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmcli.errors import ModelUnavailableError
from llmcli.job import JsonObject
from llmcli.models import loading

DEFAULT_TOKENS = 512  # of a text, for an encoder that states no limit
MODULES = {"Pooling", "Dense", "Normalize", "Dropout"}
# Settings of the transformer: those that change nothing here, or are read, and the only values of others.
SETTINGS = {"max_seq_length", "do_lower_case", "model_args", "model_kwargs", "unpad_inputs"}
ONLY = {
    "transformer_task": "feature-extraction",
    "module_output_name": "token_embeddings",
    "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
}
Module = tuple[str, JsonObject, Path]  # its class in sentence-transformers, its configuration and its directory


class Encoder:
    """How an encoder reads a text, by the files in its directory. Raises ModelUnavailableError if llmcli cannot."""

    def __init__(self, folder: Path) -> None:
        with loading.translated_errors(folder):
            settings, listed = read_settings(folder), _read_json(folder / "modules.json", list)
            if (kind := settings.get("model_type", "SentenceTransformer")) != "SentenceTransformer":
                raise _unsupported(folder, kind)
            transformer, tokenizer = _read_transformer(folder), _read_json(folder / "tokenizer_config.json")
            self.modules = _read_modules(folder, listed) if listed else _default_modules(folder)
            self.prompts = read_prompts(settings)
            self.dimensions: int | None = settings.get("truncate_dim")  # of vectors that are kept; None: all
            self._lowers_case = bool(transformer.get("do_lower_case"))
            stated = transformer.get("max_seq_length") or tokenizer.get("model_max_length")
            limits = stated, loading.max_positions(_read_json(folder / "config.json").get)
            # Maximum tokens of a text with its prompt, special tokens included.
            self.context_length = int(min((limit for limit in limits if limit and limit > 0), default=DEFAULT_TOKENS))

    def add_prompt(self, text: str, role: str | None) -> str:
        """Return a text with the prompt for its role, in lower case if the encoder requires it."""
        text = self.prompts[role] + text
        return "".join(map(str.lower, text)) if self._lowers_case else text


def read_settings(folder: Path) -> JsonObject:
    """Return the settings of an encoder or a cross-encoder; none if the model has no such file."""
    return _read_json(folder / "config_sentence_transformers.json")  # type: ignore[no-any-return]


def read_prompts(settings: JsonObject) -> dict[str | None, str]:
    """Return the prompt, which may be empty, for each role of a text: query, document and None."""
    prompts = settings.get("prompts") or {}
    names = {None: settings.get("default_prompt_name"), "query": "query", "document": "document"}
    return {role: prompts.get(name) or "" for role, name in names.items()}


def _read_transformer(folder: Path) -> JsonObject:
    files = [folder / "sentence_bert_config.json", *sorted(folder.glob("sentence_*_config.json"))]  # older names
    settings: JsonObject = next((_read_json(file) for file in files if file.is_file()), {})
    for setting, value in settings.items():
        if value and setting not in SETTINGS and value != ONLY.get(setting):
            raise _unsupported(folder, f"setting {setting}")
    return settings


def _read_modules(folder: Path, listed: Sequence[JsonObject]) -> list[Module]:
    """Return the modules that follow the transformer, which has to be the first, in the directory itself."""
    modules = []
    for number, module in enumerate(listed):
        (package, _, name), path = module["type"].rpartition("."), module["path"]
        if not package.startswith("sentence_transformers."):
            raise _unsupported(folder, f"module {module['type']}, which is custom code,")
        if name not in (MODULES if number else {"Transformer"}):
            raise _unsupported(folder, f"module {name}")
        if not re.fullmatch(r"\d[\w.-]*" if number else "", path):
            raise _unsupported(folder, f"module {name} in directory {path!r}")
        modules.append((name, _read_json(folder / path / "config.json"), folder / path))
    if "Pooling" not in [name for name, _, _ in modules]:
        raise _unsupported(folder, "modules.json without Pooling")
    return modules[1:]


def _default_modules(folder: Path) -> list[Module]:
    """Return the modules of a directory that does not list them: vectors are pooled and normalized."""
    pooling, config = _read_json(folder / "1_Pooling" / "config.json"), _read_json(folder / "config.json")
    is_causal = (config.get("architectures") or [""])[0].endswith("ForCausalLM") and config.get("is_causal", True)
    default = {"pooling_mode": "lasttoken" if is_causal else "mean"}
    return [("Pooling", pooling or default, folder), ("Normalize", {}, folder)]


def _unsupported(folder: Path, what: str) -> ModelUnavailableError:
    hint = "rank texts with it: `llmcli rerank`" if what == "CrossEncoder" else "use another model: -m NAME"
    return ModelUnavailableError(f"{folder}: {what} of sentence-transformers is not supported", hint)


def _read_json(file: Path, kind: type = dict) -> Any:
    value = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else kind()
    if not isinstance(value, kind):
        raise ValueError(f"{file.name} is no JSON {'object' if kind is dict else 'array'}")
    return value
