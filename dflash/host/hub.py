"""The Hugging Face hub: whether it answers, and what must not be shown of a request."""

import contextlib
import os
import re
import threading

from dflash.config import UserError

# How long it may take to answer at all, before it counts as out of reach.
REACH_S = 4.0


class HubError(UserError, ValueError):
    """A name of the hub that leads to no snapshot: the rule, what came, and what to do."""


def reachable() -> bool:
    """Whether the hub answers: asked in a thread, because a name lookup has no time limit."""
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        return False
    answered = []

    def ask() -> None:
        import httpx
        from huggingface_hub import constants

        # Proxy and certificate settings in the environment may be broken too, in many ways.
        with contextlib.suppress(Exception):
            answered.append(httpx.head(constants.ENDPOINT, timeout=REACH_S))

    asker = threading.Thread(target=ask, daemon=True)
    asker.start()
    asker.join(REACH_S)
    return bool(answered)


def without_tokens(text: str) -> str:
    """The text with the user's tokens of Hugging Face as ***."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if token := os.environ.get(name, "").strip():
            text = text.replace(token, "***")
    return re.sub(r"hf_[A-Za-z0-9]{8,}", "***", text)


def described(fault: Exception) -> str:
    """An error from its many layers in one line; some quote the request with the user's token in it."""
    return f"{type(fault).__name__}: {without_tokens(' '.join(str(fault).split()))[:300]}"
