"""Text as the bytes of UTF-8, and back while the bytes arrive."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from ..errors import InputError


def encode_utf8(text: str) -> bytes:
    """The bytes of `text`; InputError for a lone surrogate, which UTF-8 cannot express."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the text has a lone surrogate at character {error.start}; expected valid Unicode") from error


class ByteStream:
    """Turns ids into text one by one, for tokenizers whose tokens are plain bytes (see `tokenizers.Stream`)."""

    def __init__(self, vocabulary: Sequence[bytes]):
        """vocabulary: the bytes of each id."""
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    @property
    def whole(self) -> bool:
        return not self._decoder.getstate()[0]

    def push(self, token: int) -> str:
        return self._decoder.decode(self._vocabulary[token]) if 0 <= token < len(self._vocabulary) else ""

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)
