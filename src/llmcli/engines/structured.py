"""Structured output, log-probabilities and thoughts, as servers are asked for them and as they answer."""

import json
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

from llmcli.errors import RecordError
from llmcli.job import JsonObject
from llmcli.text.constraints import accepts, parse_json


def constraint_options(constraint: JsonObject, owner: str) -> dict[str, Any]:
    """Return the fields of a request that constrain its answer, as the server that owns the model names them."""
    ((kind, value),) = constraint.items()
    if kind == "schema":
        format = {"type": "json_schema", "json_schema": {"name": "answer", "schema": value, "strict": True}}
        # llama-server reads response_format only in chats.
        return {"response_format": format} | ({"json_schema": value} if owner == "llamacpp" else {})
    if owner == "llamacpp" and kind == "choice":
        return {"grammar": f"root ::= {' | '.join(json.dumps(text, ensure_ascii=False) for text in value)}"}
    if owner == "llamacpp":
        raise RecordError("request_rejected", f"llama-server does not support {kind}", hint="use a schema")
    if owner == "sglang":
        pattern = "|".join(map(re.escape, value)) if kind == "choice" else value
        return {"ebnf" if kind == "grammar" else "regex": pattern}
    return {"structured_outputs": {kind: value}}


def check_answer(constraint: JsonObject, text: str, finish_reason: str | None) -> None:
    """Raise RecordError if an answer is not as its constraint says: not every server obeys."""
    if finish_reason == "length":
        raise RecordError("incomplete", "answer was cut before it was complete", hint="increase --max-new-tokens")
    try:
        is_valid = accepts(constraint, text) or ("schema" in constraint and _is_valid(constraint["schema"], text))
    except (ValueError, RecursionError):
        is_valid = False
    if not is_valid:
        message = f"answer does not match the {next(iter(constraint))}: the server may not support it"
        raise RecordError("invalid_response", message)


def _is_valid(schema: Any, text: str) -> bool:
    """Return whether JSON text is valid by a schema: properties may come in another order than llguidance's."""
    from jsonschema import Draft202012Validator, ValidationError
    from jsonschema.validators import extend, validator_for
    from referencing import Registry

    # Python's `re` may take for ever with the pattern of a stranger: llguidance does not.
    def check(keyword: str, _: object, expected: object, value: object, __: object) -> Iterator[ValidationError]:
        if isinstance(value, str) and not accepts({"schema": {"type": "string", keyword: expected}}, json.dumps(value)):
            yield ValidationError(keyword)

    if '"patternProperties"' in json.dumps(schema):
        return False
    checks = {keyword: partial(check, keyword) for keyword in ("pattern", "format")}
    validator = extend(validator_for(schema, Draft202012Validator), checks)
    return bool(validator(schema, registry=Registry()).is_valid(parse_json(text)))


def read_logprobs(choice: Any) -> JsonObject:
    """Return the log-probabilities of a choice in the form of chats, and their mean; nothing if there are none."""
    given = choice.logprobs.to_dict() if getattr(choice, "logprobs", None) else {}
    if not (content := given.get("content")) and given.get("tokens"):
        alternatives = given.get("top_logprobs") or [{}] * len(given["tokens"])
        content = [
            {**_name_token(token, logprob), "top_logprobs": [_name_token(*pair) for pair in (top or {}).items()]}
            for token, logprob, top in zip(given["tokens"], given["token_logprobs"], alternatives, strict=True)
        ]
    if not content:
        return {}
    mean = sum(token["logprob"] for token in content) / len(content)
    return {"logprobs": {"content": content}, "mean_logprob": mean}


def read_text(choice: Any) -> str | None:
    """Return the text of a choice, or of a piece of one. Some servers send the content of messages in parts."""
    message = _message(choice)
    content = message.content if message else choice.text
    if isinstance(content, list):
        content = "".join(part.get("text") or "" for part in content) or None
    return content if isinstance(content, str) else None


def read_thought(choice: Any) -> str:
    """Return what the model thought in a choice, or in a piece of one, by either name that servers use."""
    thoughts = [getattr(_message(choice), name, None) for name in ("reasoning_content", "reasoning")]
    return next((thought for thought in thoughts if thought and isinstance(thought, str)), "")


def _message(choice: Any) -> Any:
    """Return the message of a choice, or the piece of one; None if the choice is of plain text."""
    return getattr(choice, "message", None) or getattr(choice, "delta", None)


def _name_token(token: str, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": [*token.encode()]}
