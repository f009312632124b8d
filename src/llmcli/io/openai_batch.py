"""OpenAI batch files: read a line as a request with settings, and write its response."""

import os
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace

from llmcli import console
from llmcli.errors import RecordError, UsageError
from llmcli.job import Failure, Job, JsonObject, Record, Result

CHATS, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
INPUTS = {CHATS: "messages", COMPLETIONS: "prompt", EMBEDDINGS: "input"}  # in a body, what the model reads
SETTINGS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "max_completion_tokens",
            "min_tokens", "stop", "seed")  # fmt: skip
LIMITS = {"n": (1, 128), "top_logprobs": (0, 20), "logprobs": (0, 20)}
UNUSED = ("model", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key",
          "stream_options", "tool_choice", "parallel_tool_calls")  # fmt: skip
DEFAULTS: tuple[object, ...] = (None, False, 0, "", [], {}, ["text"], "float")  # of fields that are unsupported
SERVER_ERRORS = ("internal_error", "out_of_memory", "not_finite", "invalid_answer", "server_error",
                 "server_unreachable", "invalid_response")  # fmt: skip


def read_requests(job: Job, records: Iterable[Record]) -> tuple[Job, Iterator[Record]]:
    """Return the job that runs requests, and these as its records."""
    roles, given = job.parameters.get("fields", {}), {f"--{kind}": True for kind in job.constraint or ()}
    given |= {"--prompt or --preset": "prompt" in job.parameters, "--field": [*roles] != [*roles.values()],
              "--system": bool(job.endpoint and job.parameters.get("system")),
              "--logprobs": bool(job.endpoint and job.logprobs is not None),
              "-n": "num_return_sequences" in job.generation, "--num-beams": "num_beams" in job.generation}  # fmt: skip
    if conflict := next(filter(given.get, given), None):
        raise UsageError(f"{conflict} cannot be used with --openai-batch", hint="requests have fields of their own")
    job = replace(job, task="serve_requests", settings_field=None if job.endpoint else "body")
    return job, _read_requests(job, records)


def _read_requests(job: Job, records: Iterable[Record]) -> Iterator[Record]:
    seen, has_noticed = set[int](), False  # The hash of an ID is smaller than the ID.
    for record in records:
        try:
            if not record.failure:
                fields = _check_line(record.fields)
                if (digest := hash(fields["custom_id"])) in seen:
                    raise RecordError("invalid_request", f"custom_id {fields['custom_id']!r:.200} is not unique")
                seen.add(digest)
                if not has_noticed and (name := fields["body"].get("model")) not in (None, job.model):
                    has_noticed = True
                    console.notice(f"requests name the model {name!r:.200}; {job.model} answers all of them")
                record = replace(record, fields=fields if job.endpoint else _read_body(fields))
        except RecordError as exc:
            record = replace(record, failure=Failure.from_error(exc))
        yield record


def _check_line(fields: JsonObject) -> JsonObject:
    """Return the fields of a line. Raises RecordError if it is not a request with a known URL."""
    name, url = fields.get("custom_id"), fields.get("url")
    checks = {
        "custom_id must be a string that is not empty": isinstance(name, str) and name,
        "method must be POST": fields.get("method") == "POST",
        "url must be a string": isinstance(url, str),
        "body must be a JSON object": isinstance(fields.get("body"), dict),
    }
    if wrong := next((message for message, is_valid in checks.items() if not is_valid), None):
        raise RecordError("invalid_request", wrong)
    if url not in INPUTS:
        raise RecordError("unknown_url", f"unknown url {url!r:.200}: expected {', '.join(INPUTS)}")
    return {name: fields[name] for name in ("custom_id", "url", "body")}


def _read_body(fields: JsonObject) -> JsonObject:
    """Return a request with what the model reads as `input`, and with settings of a record as its body."""
    url, body = fields["url"], {name: value for name, value in fields["body"].items() if value not in (None, [])}
    known = {INPUTS[url], *UNUSED, *(() if url == EMBEDDINGS else (*SETTINGS, *LIMITS, "response_format"))}
    for name in [name for name in body if name not in known and body[name] not in DEFAULTS]:
        raise RecordError("invalid_request", f"{name[:100]} {body[name]!r:.60} is not supported")
    if url == CHATS:  # Completions have the number as `logprobs`.
        body["logprobs"] = body.get("top_logprobs", 0) if body.get("logprobs") else None
    for name, (minimum, maximum) in LIMITS.items():
        value = body.get(name)
        if value is not None and not (type(value) is int and minimum <= value <= maximum):
            message = f"invalid {name} {value!r:.60}: expected an integer from {minimum} to {maximum}"
            raise RecordError("invalid_request", message)
    settings = {name: body[name] for name in SETTINGS if name in body}
    if type(settings.get("seed")) is int:  # OpenAI's may be negative, and has 64 bits.
        settings["seed"] %= 2**32
    match body.get("response_format"):
        case {"type": "json_object"}:
            settings["schema"] = {"type": "object"}
        case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
            settings["schema"] = schema
        case form if form not in (None, {"type": "text"}):
            expected = "the type json_object, or json_schema with a schema"
            raise RecordError("invalid_request", f"invalid response_format {form!r:.60}: expected {expected}")
    read = {name: body.get(name) for name in ("n", "logprobs")}
    return {**fields, "body": settings, "input": body.get(INPUTS[url]), **read}


def make_response(result: Result, model: str) -> JsonObject:
    """Return the line of an output file. A failure has the status that a server gave it, or would give it."""
    number, status, error, body = os.urandom(12).hex(), 200, None, result.output.get("body", {})
    if failure := result.failure:
        served = re.match(r"server returned HTTP (\d{3})", failure.message)
        own = 404 if failure.type == "unknown_url" else 500 if failure.type in SERVER_ERRORS else 400
        status = int(served[1]) if served else own
        error = {"code": failure.type, "message": failure.message}
        kind = "invalid_request_error" if status < 500 else "server_error"
        body = {"error": {**error, "type": kind, "param": None}}
    else:
        body = {"id": f"cmpl-{number}", "created": int(time.time()), "model": model, **body}
    name = result.record.fields.get("custom_id")
    return {
        "id": f"batch_req_{number}",
        "custom_id": name if isinstance(name, str) else None,
        "response": {"status_code": status, "request_id": f"req_{number}", "body": body},
        "error": error,
    }
