"""What of a text from another process may be shown: a terminal does as its escape sequences say."""

from __future__ import annotations

import re

_COLOUR = re.compile(r"(\x1b\[[0-9;]*m)")
_RESET = "\x1b[0m"
# Those with parameters, those with a text of their own (titles, the clipboard), and the short ones.
_SEQUENCE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)|[ -/]*[0-~])")


def plain(text: str, *, colours: bool = False) -> str:
    """The letters of a line, without what would move a terminal's cursor or change anything else there.

    Parameters
    ----------
    text : str
        A line.
    colours : bool
        Whether colours and the like may stay, which then end with the line.
    """
    parts = _COLOUR.split(text)
    for place, part in enumerate(parts):
        if not place % 2:
            parts[place] = "".join(
                letter for letter in _SEQUENCE.sub("", part) if letter.isprintable() or letter == "\t"
            )
        elif not colours:
            parts[place] = ""
    shown = "".join(parts)
    return shown + _RESET if colours and len(parts) > 1 and not shown.endswith(_RESET) else shown
