"""Qualcomm's own client (qai-hub) with its failures as ours: what may pass, what will not, and what the user must do.

The client repeats requests by itself, with backoff. One that creates something must not be repeated where its answer
was lost: `created_once`."""

from __future__ import annotations

import contextlib
import importlib.metadata
import re
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from edgeforge.errors import BackendFailed, InvalidInput, MissingDependency

VERSION = "0.56.0"


class Passing(Exception):
    """A failure that may be over at the next try."""


class Refused(Exception):
    """A failure of one task that no later try will mend; all others go on."""


def open_client() -> Any:
    """The configured client. Raises MissingDependency without the tried version, InvalidInput without a token."""
    try:
        found = importlib.metadata.version("qai-hub")
    except importlib.metadata.PackageNotFoundError:
        raise MissingDependency("qai-hub is not installed -> pip install 'edgeforge[hub]'") from None
    if found != VERSION:
        raise MissingDependency(f"qai-hub {found} is installed, {VERSION} is needed -> pip install qai-hub=={VERSION}")
    import qai_hub
    from qai_hub.public_rest_api import APIException

    client = qai_hub.Client()
    try:
        client.config.verbose = False
    except (qai_hub.client.Error, APIException) as error:
        why = plain(str(error)).partition("Please")[0].strip()
        raise InvalidInput(f"{why} -> qai-hub configure --api_token TOKEN (from your account's page)") from None
    return client


def asked(ask: Callable[[], Any], token: str) -> Any:
    """``ask()`` with the client's failures as ours; the token never gets into a text."""
    import qai_hub.client
    import requests
    from google.protobuf.message import DecodeError
    from qai_hub.public_rest_api import APIException

    def text(error: Exception) -> str:
        return plain(str(error).replace(token, "***"))

    try:
        return ask()
    except qai_hub.client.RateLimitedError as error:
        raise Passing(f"the hub asks to slow down: {text(error)}") from None
    except qai_hub.client.UserError as error:
        raise _refusal(text(error)) from None
    except (qai_hub.client.InternalError, requests.RequestException, DecodeError) as error:
        raise Passing(f"the hub did not answer as it should: {text(error)}") from None
    except APIException as error:
        if error.status_code == 429:
            raise Passing(f"the hub asks to slow down: {text(error)}") from None
        if error.status_code is not None and 400 <= error.status_code < 500:
            raise _refusal(text(error), error.status_code) from None
        raise Passing(f"the hub did not answer as it should: {text(error)}") from None
    except (AssertionError, OSError) as error:
        # An upload whose answer lacks its ETag; a download that broke off inside the file.
        raise Passing(f"a transfer failed: {text(error)}") from None
    except ValueError as error:
        raise Refused(f"the hub refused: {text(error)}") from None


REMEDIES = {
    "authenticat": "qai-hub configure --api_token TOKEN (from your account's page)",
    "quota": "wait for running jobs, or ask the hub's support for more",
    "not available": "choose another --device (edgeforge bench --on hub --device NAME)",
    "could not be found": "run this again: what is gone is made anew",
}


def _refusal(text: str, status: int | None = None) -> Exception:
    """With a remedy. Without a valid token nothing can go on, and nothing is given up: jobs wait for the next run."""
    known = (remedy for words, remedy in REMEDIES.items() if words in text.lower())
    if status == 401 or "authenticat" in text.lower():
        return BackendFailed(f"{text} -> {REMEDIES['authenticat']}, then run this again: it goes on where it was")
    return Refused(f"{text} -> {next(known, 'see the job on the hub')}")


@contextlib.contextmanager
def created_once() -> Iterator[None]:
    """Without the client's own repetitions: a POST whose answer is lost would create a second job."""
    from qai_hub.util import session

    kept, session.MAX_RETRIES = session.MAX_RETRIES, 0
    try:
        yield
    finally:
        session.MAX_RETRIES = kept


@contextlib.contextmanager
def tidied() -> Iterator[None]:
    """The client's temporary files go with the block: it leaves one per download, and those of failed transfers."""
    kept = tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix="edgeforge-") as folder:
        tempfile.tempdir = folder
        try:
            yield
        finally:
            tempfile.tempdir = kept


def plain(text: str) -> str:
    """A text of the hub as one line without markup, frames and control characters."""
    return " ".join(re.sub(r"[<>\x00-\x1f\x7f-\x9f|\u2500-\u257f]", " ", text).split())[:400]
