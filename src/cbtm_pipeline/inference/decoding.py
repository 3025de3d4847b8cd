"""From tokens to text that can be shown at once: whole characters, and nothing that may be a stop text."""

import functools
import re
from collections.abc import Sequence
from typing import Any

N_BEFORE = 6  # tokens of the prompt that are decoded along, because the first word's space may depend on them
BYTES = "bytes:"  # begins the name of a token that is no text
MAX_HELD = 16  # tokens; no character needs so many
BROKEN = "\N{REPLACEMENT CHARACTER}"  # what a decoder writes for bytes that are no character


class Decoder:
    """Text by token. A token within a character adds nothing; the last one of it adds the character."""

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()):
        self.tokenizer, self.ids = tokenizer, list(before[-N_BEFORE:])
        self.begin, self.shown = 0, len(self.ids)  # tokens up to `shown` have been shown

    def _text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def add(self, token: int) -> str:
        """The text that this token adds."""
        self.ids.append(token)
        return self._more(is_last=False)

    def end(self) -> str:
        """What was held back: bytes that have become no character."""
        return self._more(is_last=True)

    def _more(self, is_last: bool) -> str:
        before, whole = self._text(self.ids[self.begin : self.shown]), self._text(self.ids[self.begin :])
        is_open = whole.endswith(BROKEN) and len(self.ids) - self.shown < MAX_HELD
        if len(whole) <= len(before) or (is_open and not is_last):
            return ""
        self.begin, self.shown = self.shown, len(self.ids)
        self.ids, self.begin, self.shown = self.ids[self.begin :], 0, self.shown - self.begin
        return whole[len(before) :]


class StopFinder:
    """Lets text through up to the stop text that is complete first. `found` says whether one has come."""

    def __init__(self, stops: Sequence[str]):
        self.stops, self.held, self.found = list(stops), "", False

    def add(self, text: str) -> str:
        """The text that can be shown now. An end that may become a stop text is held back."""
        if self.found:
            return ""
        self.held += text
        places = [(place + len(stop), place) for stop in self.stops if (place := self.held.find(stop)) >= 0]
        if places:
            shown, self.held, self.found = self.held[: min(places)[1]], "", True
            return shown
        n_held = max((_overlap(self.held, stop) for stop in self.stops), default=0)
        n_shown = len(self.held) - n_held
        shown, self.held = self.held[:n_shown], self.held[n_shown:]
        return shown

    def end(self) -> str:
        """What was held back."""
        shown, self.held = self.held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def name(tokenizer: Any, token: int) -> str:
    """How lists of log-probabilities write a token: its text; `bytes:\\xe2` if that is no whole character."""
    text = tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if text and BROKEN not in text:
        return text
    entry = str(tokenizer.convert_ids_to_tokens(token))
    if found := re.fullmatch(r"<0x([0-9A-F]{2})>", entry):
        return f"{BYTES}\\x{found[1].lower()}"
    known = _byte_of_character()
    if not all(character in known for character in entry):
        return entry
    return BYTES + "".join(f"\\x{known[character]:02x}" for character in entry)


def as_bytes(name: str) -> bytes:
    """The bytes of a token with this name."""
    is_bytes = re.fullmatch(rf"{BYTES}(\\x[0-9a-f]{{2}})+", name)
    return bytes.fromhex(name.removeprefix(BYTES).replace("\\x", "")) if is_bytes else name.encode()


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """How byte-level tokenizers write each byte as a character, the other way round."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {character: byte for byte, character in bytes_to_unicode().items()}
