"""GGUF -> safetensors, through transformers' own reader."""

import io
from contextlib import nullcontext, redirect_stderr
from pathlib import Path

from llmcli import console
from llmcli.errors import ModelUnavailableError


def convert(file: Path, folder: Path) -> None:
    """Write the model of a GGUF file to `folder`, dequantized to float32, with its tokenizer."""
    console.notice(f"converting {file.name} to safetensors, once")
    from llmcli.models.loading import quiet_libraries

    quiet_libraries()
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Versions of transformers that can keep GGUF weights quantized have to be told not to.
    can_keep = hasattr(transformers, "GgufConfig")
    plain = {"quantization_config": transformers.GgufConfig(dequantize=True)} if can_keep else {}
    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    # transformers draws a progress bar even if stderr is no terminal.
    bar = nullcontext() if console.is_watched() else redirect_stderr(io.StringIO())
    try:
        with bar:
            tokenizer = AutoTokenizer.from_pretrained(**where)
            model, report = AutoModelForCausalLM.from_pretrained(**where, **plain, output_loading_info=True)
    except MemoryError as exc:
        raise ModelUnavailableError(f"{file.name} does not fit in memory", hint="use a smaller model") from exc
    except Exception as exc:
        reason = str(exc).splitlines()[0] if str(exc) else type(exc).__name__
        raise ModelUnavailableError(
            f"cannot read {file.name}: {reason}", hint="the file is damaged, or its architecture is not supported"
        ) from exc
    if missing := sorted(report["missing_keys"]):
        raise ModelUnavailableError(f"{file.name} is incomplete: missing {missing[0]}", hint="the file is damaged")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
