"""Signs that a text was damaged on its way or was not meant for training: encoding, scripts, left-over templates.

Pure functions of one text. Each sign is a hint for a person: none of them stops a run.
"""

import re

ARTEFACTS = re.compile(
    r"### ?(?:Response|Instruction|Input|Human|Assistant|User)\b ?:?|<\|[a-z_]{2,40}\|>|\[/?INST\]|<</?SYS>>"
    r"|</?s>|<(?:start|end)_of_turn>|<(?:human|bot)>:|(?:^|\n)(?:USER|ASSISTANT|HUMAN|BOT): "
    r"|(?:^|\n\n)(?:Human|Assistant): ",
)
"""Words of templates. In the data they teach the model to speak for the user, or to end where it should not."""

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f]")
_INVISIBLE = re.compile("[\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff\ufff9-\ufffb]")
_PRIVATE = re.compile("[\ue000-\uf8ff]")
_LATIN = "A-Za-z\u00c0-\u024f"
_CYRILLIC = "\u0400-\u052f"
_GREEK_TWINS = "ΑΒΕΖΗΙΚΜΝΟΡΤΥΧανορτυχκι"
_MIXED = re.compile(
    f"[{_LATIN}][{_CYRILLIC}]|[{_CYRILLIC}][{_LATIN}]|[A-Za-z][{_GREEK_TWINS}][A-Za-z]|[{_CYRILLIC}][{_GREEK_TWINS}]"
)
_CP1252 = "€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ"
_HIGH = re.compile(f"[\u0080-\u00ff{_CP1252}]{{2,}}")
_CLASSIC_MOJIBAKE = ("锟斤拷", "烫烫烫", "屯屯屯")

_ENDS = tuple(".!?…。！？；;:：)）]】}」』》>\"'”’`*~|_-=$%/\\")
_LONG_ANSWER = 200
"""Characters from which an answer is expected to end like a sentence."""

MEANINGS = {
    "replacement characters": "U+FFFD stands where a character was lost; the file was decoded with the wrong encoding",
    "mojibake": "UTF-8 that was read as another encoding; read the original file again",
    "control characters": "characters that no keyboard writes; they take tokens and mean nothing",
    "invisible characters": "zero-width or direction marks; they change tokens without being seen",
    "private-use characters": "characters without a meaning outside one font",
    "mixed scripts in a word": "Latin, Cyrillic or Greek letters in one word: look-alikes or scanning errors",
    "template artefacts": "words of a prompt template in the text: the row was probably rendered once before",
    "special tokens of the tokenizer": "spelled out in the text; they are read as plain characters, not as the token",
    "answers that seem cut off": "long answers that end in the middle of a sentence or of a code block",
}
"""Every sign with what it is and what to think of it."""


def oddities(text: str) -> dict[str, str]:
    """The signs that a text shows, each with what was found, for any text of a row."""
    found: dict[str, str] = {}
    if match := ARTEFACTS.search(text):
        found["template artefacts"] = repr(match[0].strip())
    if match := _CONTROL.search(text):
        found["control characters"] = _named(match[0])
    if text.isascii():
        return found
    if "\ufffd" in text:
        found["replacement characters"] = _around(text, text.index("\ufffd"))
    if match := _INVISIBLE.search(text):
        found["invisible characters"] = _named(match[0])
    if match := _PRIVATE.search(text):
        found["private-use characters"] = _named(match[0])
    if match := _MIXED.search(text):
        found["mixed scripts in a word"] = _around(text, match.start())
    if wrong := _mojibake(text):
        found["mojibake"] = wrong
    return found


def seems_cut_off(answer: str) -> bool:
    """Whether a long answer ends inside a code block or a sentence, though it has ended others properly."""
    text = answer.rstrip()
    if text.count("```") % 2:
        return True
    if len(text) < _LONG_ANSWER or text.endswith(_ENDS) or not text[-1].isalnum():
        return len(text) >= _LONG_ANSWER and text.endswith((",", "，", "、", "("))
    last_line = text.rsplit("\n", 1)[-1]
    if len(last_line) < 40 or "```" in text:  # the end of a list, a table, a verse, or code
        return False
    return sum(text.count(mark) for mark in ".。!！?？") >= 2


def _mojibake(text: str) -> str:
    """A stretch that becomes other, shorter text when its bytes are read as UTF-8; "" if there is none."""
    for match in _HIGH.finditer(text):
        for encoding in ("cp1252", "latin-1"):
            try:
                meant = match[0].encode(encoding).decode("utf-8")
            except UnicodeError:
                continue
            return f"{match[0]!r} for {meant!r}"
    return next((repr(word) for word in _CLASSIC_MOJIBAKE if word in text), "")


def _named(character: str) -> str:
    return f"U+{ord(character):04X}"


def _around(text: str, position: int) -> str:
    return repr(text[max(0, position - 12) : position + 12])
