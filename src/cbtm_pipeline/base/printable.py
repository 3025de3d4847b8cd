"""Text that a terminal shows as it is: nothing in it moves the cursor, sets colours or turns lines around."""

import os
import re
import sys

# Control characters, separators of lines and paragraphs, what changes the direction of text, and surrogates,
# which are halves of characters that no encoding can write.
UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str, keep: str = "\n\t") -> str:
    """The text with each unsafe character as its escape: `\\x1b`. Those in `keep` stay."""
    return UNSAFE.sub(lambda found: found[0] if found[0] in keep else _escape(found[0]), text)


def _escape(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def shortened(text: str, limit: int = 4000) -> str:
    """The text; if it has more than `limit` characters, its start and its end."""
    if len(text) <= limit:
        return text
    n_end = limit // 4
    left_out = f" ... ({len(text) - limit} characters left out) ... "
    return text[: limit - n_end] + left_out + text[-n_end:]


def show(text: str, end: str = "") -> None:
    """Write text of any origin to stdout at once: on a terminal printable, elsewhere as it is.

    Nothing happens if the reader, such as head, has ended.
    """
    write((printable(text) if sys.stdout.isatty() else text) + end)


def write(text: str) -> None:
    """Write text to stdout as it is, with `?` for what its encoding lacks. A reader may end, as in `show`."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
