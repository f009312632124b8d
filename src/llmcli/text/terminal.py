"""Text that cannot control a terminal: control characters and escape sequences become U+FFFD."""

import re
from collections.abc import Iterable
from typing import TextIO

REPLACEMENT = "\ufffd"
MAX_SEQUENCE = 4096  # characters of a sequence; what follows is text again
PARAMETERS = rf"[ -?]{{0,{MAX_SEQUENCE}}}+"
PAYLOAD = rf"[^\n\x07\x18\x1a\x1b\x80-\x9f]{{0,{MAX_SEQUENCE}}}+"
ESCAPE = rf"\x1b[ -/]{{0,{MAX_SEQUENCE}}}+"
CSI, STRING = r"(?:\x1b\[|\x9b)", r"(?:\x1b[\]PX^_]|[\x90\x98\x9d-\x9f])"  # STRING: OSC, DCS, SOS, PM, APC
CONTROLS = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\udc80-\udc9f]"
# Of a string without its end, only the introducer is replaced: the rest of an answer must not be lost with it.
UNSAFE = re.compile(rf"{CSI}{PARAMETERS}[@-~]?|{STRING}(?:{PAYLOAD}(?:\x07|\x9c|\x1b\\))?|{ESCAPE}[0-~]?|{CONTROLS}")
UNFINISHED = re.compile(rf"(?:{CSI}{PARAMETERS}|{STRING}{PAYLOAD}\x1b?|{ESCAPE}|\r)\Z")
LIBRARY_PROGRESS = re.compile(r"(\r|\x1b\[A)")  # how tqdm moves the cursor


def sanitize(text: str) -> str:
    """Return the text without control characters, except line ends and tabs, and without escape sequences."""
    return UNSAFE.sub(REPLACEMENT, text.replace("\r\n", "\n"))


class Sanitizer:
    """Sanitizes a text that comes in pieces: the result does not depend on where the text is split."""

    def __init__(self) -> None:
        self._pending = ""  # a sequence that may go on

    def feed(self, piece: str) -> str:
        """Return what is known of the text by now, and was not returned yet."""
        text = self._pending + piece
        unfinished = UNFINISHED.search(text)
        end = unfinished.start() if unfinished else len(text)
        self._pending = text[end:]
        return sanitize(text[:end])

    def flush(self) -> str:
        """Return the rest; the next piece begins a new text."""
        rest, self._pending = sanitize(self._pending), ""
        return rest


class SanitizedStream:
    """A terminal that anything can write text to. `shows_progress` lets tqdm redraw its line."""

    shows_progress = False

    def __init__(self, terminal: TextIO) -> None:
        self._terminal = terminal

    def write(self, text: str) -> int:
        parts = LIBRARY_PROGRESS.split(text) if self.shows_progress else [text]
        self._terminal.write("".join(part if i % 2 else sanitize(part) for i, part in enumerate(parts)))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def __getattr__(self, name: str) -> object:
        if name == "buffer":  # Click would write to it if the encoding is ASCII.
            raise AttributeError(name)
        return getattr(self._terminal, name)
