"""What a person reads of an error or an address: on one line, cut between words, and without anybody's password."""

from __future__ import annotations

import re

# The user information of a URI, up to the last @ of the word: a password may have a sign that should be %-encoded.
_USER = re.compile(r"://(?:[^\s/?#@]*:\S*|[^\s/?#]*)@")


_PARAMETER = re.compile(
    r"([?&;][^=&;\s#]*(?:token|key|secret|pass|pwd|auth|sig|credential)[^=&;\s#]*=)[^&;\s#\"']+", re.IGNORECASE
)


def masked(text: str) -> str:
    """The text with `***` for the user information of every URI, and for the tokens and passwords of its query."""
    return _PARAMETER.sub(r"\1***", _USER.sub("://***@", text))


def shortened(text: str, limit: int = 300) -> str:
    """The text on one line and masked; what is longer than about `limit` characters ends after a whole word."""
    text = masked(" ".join(text.split()))
    if len(text) <= limit:
        return text
    end = text.rfind(" ", 0, limit)
    if end <= 0:  # one very long word, a path perhaps: all of it
        end = text.find(" ", limit)
    return text if end < 0 else f"{text[:end]} …"
