"""Sends requests of batch files to a server as they are."""

from typing import TYPE_CHECKING, Any

from llmcli.errors import RecordError
from llmcli.job import JsonObject

if TYPE_CHECKING:
    from openai import OpenAI


def forward(client: "OpenAI", url: str, body: JsonObject) -> JsonObject:
    """Return the server's response, and its usage. A server that lacks the URL may have those of other requests."""
    import openai

    try:
        response: Any = client.post(url.removeprefix("/v1"), body={**body, "stream": False}, cast_to=object)
    except openai.NotFoundError as exc:
        message = f"server returned HTTP 404: {error_text(exc.body or exc.message)}"
        raise RecordError("request_rejected", message) from exc
    usage = response.get("usage") or {}
    return {"body": response, "usage": {name: count for name, count in usage.items() if isinstance(count, int)}}


def error_text(body: object) -> str:
    """Return the message of the body of an error."""
    while isinstance(body, dict):
        body = next((body[key] for key in ("error", "message", "detail") if key in body), str(body))
    return " ".join(str(body).split())[:500]
