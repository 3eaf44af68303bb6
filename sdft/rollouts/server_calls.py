"""Calls of a vLLM server: JSON over HTTP, and what it means that one fails."""

from __future__ import annotations

import contextlib
import http.client
import json
import urllib.error
import urllib.request
from typing import Any

from sdft.errors import UsageError

LONGEST_ANSWER = 3600.0  # seconds without a word from the server, after which it counts as away
FIRST_ANSWER = 30.0  # the same before training

START = (
    "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs "
    "--worker-extension-cls sdft.rollouts.vllm_worker.StudentWeights"
)


class Away(Exception):
    """The server does not answer, or only that it cannot now."""


class Refused(Exception):
    """The server has answered that a request cannot be had."""


def describe(url: str) -> dict[str, Any]:
    """What the server says of its model; UsageError where there is none that takes a student's weights."""
    try:
        return dict(call(url, "describe_student", timeout=FIRST_ANSWER)[0])
    except Away as error:
        if "describe_student" not in str(error):
            raise UsageError(f"rollout_server is {url!r}, which does not answer: {error}") from error
    except (Refused, LookupError, TypeError):
        pass
    raise UsageError(f"rollout_server is {url!r}, which takes no weights; it must be started by {START}")


def call(url: str, method: str, *args: str, timeout: float = LONGEST_ANSWER) -> list[Any]:
    """What each worker of the server gives for this call."""
    results: list[Any] = ask(f"{url}/collective_rpc", {"method": method, "args": args}, timeout)["results"]
    return results


def ask(url: str, body: dict[str, Any] | None = None, timeout: float = LONGEST_ANSWER) -> Any:
    """The server's answer to what is sent to it as JSON; Away where there is none, Refused where that is its answer."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        said = _said(error)
        raise (Away if error.code >= 500 else Refused)(said) from error
    except (OSError, http.client.HTTPException, ValueError) as error:  # it broke off, too
        raise Away(str(getattr(error, "reason", error)) or type(error).__name__) from error


def _said(error: urllib.error.HTTPError) -> str:
    """What the server says of an error, of which vLLM has a message in its JSON."""
    text = error.read().decode(errors="replace")
    with contextlib.suppress(ValueError, LookupError, TypeError):
        text = json.loads(text)["error"]["message"]
    return f"{error.code} {' '.join(text.split())[:300] or error.reason}"


def name_of_model(url: str) -> str:
    """What the server calls its model."""
    try:
        return str(ask(f"{url}/v1/models")["data"][0]["id"])
    except (Away, Refused, LookupError, TypeError) as error:
        raise UsageError(f"rollout_server is {url!r}, which does not name its model: {error}") from error
