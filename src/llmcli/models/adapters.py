"""Adapters: what may be merged, the models that they belong to, and the merge while a model is loaded."""

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from llmcli import console
from llmcli.errors import ModelUnavailableError, first_line
from llmcli.job import LoadOptions
from llmcli.models import registry, store
from llmcli.models.folder_check import check_folder, read_json
from llmcli.models.store.hub import ADAPTER, ADAPTER_CONFIG

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

PREFIX = "base_model.model."  # of the names of weights
TYPES = ("LORA", "ADALORA", "IA3", "LOHA", "LOKR", "OFT", "LN_TUNING", "TRAINABLE_TOKENS")
# Settings of LoRA that depend on the input, repeat layers, or choose code.
UNSUPPORTED = ("alora_invocation_tokens", "arrow_config", "layer_replication", "megatron_config", "use_qalora")
HEADS = {"SEQ_CLS": "SequenceClassification", "TOKEN_CLS": "TokenClassification", "QUESTION_ANS": "QuestionAnswering"}
LABELS = re.compile(r"\b(classifier|score|classification_head|qa_outputs)(\.out_proj)?\.weight$")  # a row for each


def find_weights(model: str, adapter: str | None, options: LoadOptions) -> tuple[Path, LoadOptions]:
    """Return the directory of a model, and the options with that of its adapter. Both are fetched if needed."""
    spec = registry.resolve(model)
    if merged := spec.adapter if adapter is None else registry.resolve_adapter(adapter):
        options = replace(options, adapter=str(_find(merged, options)))
    folder = store.pull(spec, offline=options.offline, allow_pickle=options.allow_pickle)
    check_folder(folder, trusts_code=options.trust_remote_code)
    if (folder / ADAPTER_CONFIG).is_file() and options.adapter != str(folder):
        console.warning(f"'{folder}' has an adapter beside its weights, which is ignored")
    return folder, options


def find_base(name: str, options: LoadOptions) -> str:
    """Return the name of the model that an adapter says it was trained on."""
    settings = read_json(_find(registry.resolve_adapter(name), options) / ADAPTER_CONFIG)
    base, revision = str(settings.get("base_model_name_or_path") or ""), settings.get("revision")
    try:
        spec = registry.resolve(base)
    except ModelUnavailableError as exc:
        raise ModelUnavailableError(f"base model {base!r} of the adapter not found", hint="pass it: -m NAME") from exc
    base = f"{base}@{revision}" if revision and spec.source == registry.HubSource(base) else base
    console.notice(f"base model of the adapter: {base}")
    return base


def _find(spec: registry.ModelSpec, options: LoadOptions) -> Path:
    """Return the directory of an adapter, fetched if needed. Raises ModelUnavailableError if it cannot be merged."""
    folder = store.pull(spec, offline=options.offline)
    if not (folder / ADAPTER).is_file():
        raise ModelUnavailableError(f"{spec.name} has no {ADAPTER}", hint="pickled weights are not read")
    check_folder(folder, trusts_code=options.trust_remote_code)
    settings = read_json(folder / ADAPTER_CONFIG)
    if (kind := settings.get("peft_type")) not in TYPES:
        raise ModelUnavailableError(f"adapters of the type {kind} are not supported", f"expected {', '.join(TYPES)}")
    for name in filter(settings.get, UNSUPPORTED):
        raise ModelUnavailableError(f"adapter {spec.name} has a setting that is not supported: {name}")
    return folder


def read_shapes(options: LoadOptions) -> dict[str, list[int]]:
    """Return the shapes of the weights of the adapter, if there is one, by their names in the model."""
    from safetensors import SafetensorError, safe_open

    if not options.adapter:
        return {}
    try:
        with safe_open(Path(options.adapter, ADAPTER), "pt") as file:
            return {name.removeprefix(PREFIX): file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as exc:
        raise ModelUnavailableError(f"weights in {options.adapter} are damaged: {first_line(exc)}") from exc


def tokenizer_folder(folder: Path, options: LoadOptions) -> Path:
    """Return the directory of the tokenizer: that of the adapter if it has one of its own."""
    adapter = Path(options.adapter or folder)
    return adapter if (adapter / "tokenizer_config.json").is_file() else folder


def adapt_config(config: "PreTrainedConfig", options: LoadOptions) -> "PreTrainedConfig":
    """Give a configuration the head, and the number of labels, that the adapter brings."""
    task = read_json(Path(options.adapter, ADAPTER_CONFIG)).get("task_type") if options.adapter else None
    if head := HEADS.get(str(task)):
        if not any(name.endswith(f"For{head}") for name in config.architectures or ()):
            config.architectures = [f"AutoModelFor{head}"]
        labels = [shape[0] for name, shape in read_shapes(options).items() if LABELS.search(name)]
        if labels and labels[0] != config.num_labels:
            config.num_labels = labels[0]
    return config


def merge(model: "PreTrainedModel", options: LoadOptions) -> "PreTrainedModel":
    """Return a model with its adapter merged, if the options name one."""
    if not options.adapter:
        return model
    from llmcli.compat.peft import merge_adapter
    from llmcli.models.loading import translated_errors

    folder, embeddings = Path(options.adapter), model.get_input_embeddings()
    shapes = read_shapes(options)
    with translated_errors(folder):
        for name in [name for name, module in model.named_modules() if module is embeddings]:
            shape = shapes.get(f"{name}.weight") or shapes.get(f"{name}.base_layer.weight")
            if shape and shape[0] != embeddings.weight.shape[0]:  # Tokens were added, or padding was cut.
                model.resize_token_embeddings(shape[0], mean_resizing=False)
        return merge_adapter(model, folder, read_json(folder / ADAPTER_CONFIG))
