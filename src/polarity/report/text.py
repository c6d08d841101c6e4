"""Text from models and from other people's files, made safe to look at."""

import re

# Controls (but for tab and line feed), format, private and surrogate characters, and what has no width or is blank in
# most fonts: they would be invisible, or would reorder the text around them. Of Unicode's category C, and its blanks of
# categories L, M and S.
UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e"
    "\u2060-\u206f\u2800\u3164\ud800-\udfff\ue000-\uf8ff\ufdd0-\ufdef\ufe00-\ufe0f\ufeff\uffa0\ufff0-\uffff"
    "\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff\U000f0000-\U0010ffff]"
)


def visible(text: str) -> str:
    """The text with the code of each character that would not be seen, as in ⟨202E⟩. microscope.js does the same."""
    return UNSEEN.sub(lambda found: f"⟨{ord(found[0]):04X}⟩", text)
