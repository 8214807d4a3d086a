"""The foreign formats that can be read, in the order in which a file is tried on them."""

from gossamer.attention.importers import (
    checkpoint_block,
    double_sparse,
    duo_attention,
    leank,
    minference,
    redknot,
    seer_attention,
    seer_attention_r,
    xattention,
)
from gossamer.attention.importers.foreign import ForeignFile, ImportRefused, why_no_profile
from gossamer.attention.importers.source import Format

FORMATS: tuple[Format, ...] = (
    minference.FORMAT,
    duo_attention.DUO_ATTENTION,
    duo_attention.LSERVE,
    double_sparse.FORMAT,
    seer_attention.FORMAT,
    seer_attention_r.FORMAT,
    xattention.FORMAT,
    leank.FORMAT,
    redknot.FORMAT,
    checkpoint_block.FORMAT,
)


def find_format(file: ForeignFile, asked: str | None) -> Format:
    """The format asked for, or the one that the contents are in. Raises ImportRefused."""
    if asked is not None:
        named = next((each for each in FORMATS if each.name == asked), None)
        if named is None:
            raise ImportRefused(f"--format is {asked!r}; it is one of {', '.join(each.name for each in FORMATS)}.")
        if named.recognises(file) or (named is duo_attention.LSERVE and duo_attention.DUO_ATTENTION.recognises(file)):
            return named
        raise ImportRefused(
            f"{file.path} does not hold {named.what} ({named.name}); leave --format out to see what it is."
        )
    fitting = next((each for each in FORMATS if each.recognises(file)), None)
    if fitting is None:
        known = ", ".join(each.what for each in FORMATS)
        raise ImportRefused(why_no_profile(file) or f"{file.path} is no profile that can be read, which are: {known}.")
    return fitting
