"""Connections to OpenAI-compatible servers, and what their errors mean."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from llmcli.errors import ModelUnavailableError, RecordError, UsageError
from llmcli.job import JsonObject

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types import Model

MAX_RETRIES = 10  # with pauses of 0.5 to 8 seconds, or as long as the server says: about a minute
TIMEOUT_S = 600  # for an answer
CONNECT_TIMEOUT_S = 20


def make_client(endpoint: str) -> "OpenAI":
    """Return a client of a server. Raises UsageError for an invalid URL, or if the openai package is missing."""
    try:
        url = urlsplit(endpoint)
        is_valid = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0 and endpoint.isprintable()
    except ValueError:  # an invalid port, or brackets without an IPv6 address
        is_valid = False
    if not is_valid:
        raise UsageError(f"invalid --endpoint {endpoint!r}: expected a URL", hint="e.g. http://localhost:8000/v1")
    try:
        import jsonschema  # noqa: F401  # needed for answers to schemas
        import openai
    except ImportError as exc:
        hint = "run `pip install 'llmcli[openai]'`"
        raise UsageError(f"--endpoint requires the {exc.name} package", hint) from exc
    openai_key = os.environ.get("OPENAI_API_KEY") if url.scheme == "https" else None  # not to be sent unencrypted
    key = os.environ.get("LLMCLI_API_KEY") or openai_key or "none"
    base_url = endpoint if url.path.strip("/") else f"{endpoint.rstrip('/')}/v1"
    timeout = openai.Timeout(TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
    return openai.OpenAI(base_url=base_url, api_key=key, max_retries=MAX_RETRIES, timeout=timeout)


def list_models(client: "OpenAI") -> "list[Model]":
    """Return the server's models, if it lists them. Raises ModelUnavailableError if the server is unreachable."""
    import openai

    try:
        return list(client.with_options(max_retries=2).models.list())
    except openai.APIConnectionError as exc:
        raise ModelUnavailableError(f"cannot reach {client.base_url}", hint="check that the server is running") from exc
    except (openai.OpenAIError, ValueError):
        return []


def only_model(endpoints: Sequence[str]) -> str:
    """Return the name of the only model of the first server that answers. Raises UsageError if there are several."""
    for endpoint in endpoints:
        try:
            names = [model.id for model in list_models(make_client(endpoint))]
            break
        except ModelUnavailableError:
            if endpoint == endpoints[-1]:
                raise
    if len(names) != 1:
        several = f"the server has {len(names)} models: {', '.join(names[:5])}"
        raise UsageError(several if names else "the server lists no model", hint="choose one with -m NAME")
    return names[0]


@contextmanager
def translated_errors(client: "OpenAI") -> Iterator[None]:
    """Raise RecordError for what is wrong with one request, ModelUnavailableError for what is wrong with all."""
    import openai

    try:
        yield
    except openai.APIStatusError as exc:
        code = exc.status_code
        message = f"server returned HTTP {code}: {error_text(exc.body or exc.message)}"
        if code in (401, 403):
            raise ModelUnavailableError(message, hint="set LLMCLI_API_KEY to the server's key") from exc
        if code == 404:
            hint = "check -m NAME; if the server lacks /v1/completions, use `llmcli chat`"
            raise ModelUnavailableError(message, hint) from exc
        is_temporary = code >= 500 or code in (408, 409, 429)
        raise RecordError("server_error" if is_temporary else "request_rejected", message) from exc
    except openai.APIConnectionError as exc:
        list_models(client)  # raises if the server cannot be reached at all
        what = "timed out" if isinstance(exc, openai.APITimeoutError) else "closed the connection"
        raise RecordError("server_unreachable", f"server {what} after {client.max_retries + 1} attempts") from exc
    except (openai.OpenAIError, ValueError) as exc:
        raise RecordError("invalid_response", f"invalid response from server: {exc}") from exc
    except (AttributeError, TypeError) as exc:
        raise RecordError("invalid_response", "invalid response from server: not as in the protocol") from exc


def forward(client: "OpenAI", url: str, body: JsonObject) -> JsonObject:
    """Return the server's response, and its usage. A server that lacks the URL may have those of other requests."""
    import openai

    try:
        response: Any = client.post(url.removeprefix("/v1"), body={**body, "stream": False}, cast_to=object)
    except openai.NotFoundError as exc:
        names = set[str]()
        with suppress(ModelUnavailableError):  # It has just answered.
            names = {model.id for model in list_models(client)}
        if names and body["model"] not in names:
            raise  # All requests would fail there.
        message = f"server returned HTTP 404: {error_text(exc.body or exc.message)}"
        raise RecordError("request_rejected", message) from exc
    usage = response.get("usage") or {}
    return {"body": response, "usage": {name: count for name, count in usage.items() if isinstance(count, int)}}


def error_text(body: object) -> str:
    """Return the message in an error of a server."""
    while isinstance(body, dict):
        body = next((body[key] for key in ("error", "message", "detail") if key in body), str(body))
    return " ".join(str(body).split())[:500]
