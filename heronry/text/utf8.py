"""Text as the bytes of UTF-8, and back while the bytes arrive."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from ..errors import InputError, count


def encode_utf8(text: str) -> bytes:
    """The bytes of `text`; InputError for a lone surrogate, which UTF-8 cannot express.

    U+DC80 to U+DCFF is how Python passes bytes of standard input and of arguments on that are not UTF-8.
    """
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        if 0xDC80 <= code <= 0xDCFF:
            before = count(error.start, "character")
            raise InputError(
                f"the text is not UTF-8: byte 0x{code - 0xDC00:02x} (U+{code:X}) after {before}"
            ) from error
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
