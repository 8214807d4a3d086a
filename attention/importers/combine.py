"""One profile for prompts and another for generated tokens."""

from gossamer.attention.importers.foreign import ImportRefused
from gossamer.attention.importers.source import Imported, Tensors, of_heads
from gossamer.attention.policy_backends import HeadEntry


def combine(prefill: Imported, decode: Imported) -> Imported:
    """What prompts read from the one, what generated tokens read from the other.

    A head that streams in either does what that file says in both phases: what it does not keep, no backend can read,
    so that memory comes back. (A file that is imported with --keep all streams nothing.) Raises ImportRefused for
    profiles of models with other counts.
    """
    sizes = [(len(each.heads), len(each.heads[0]), each.head_dim or 0) for each in (prefill, decode)]
    if sizes[0][:2] != sizes[1][:2] or (all(size[2] for size in sizes) and sizes[0][2] != sizes[1][2]):
        raise ImportRefused(
            f"The profile for prompts has {sizes[0][0]} layers of {sizes[0][1]} KV heads, and that for generated "
            f"tokens {sizes[1][0]} of {sizes[1][1]}; take two that were made for one model."
        )
    heads = tuple(
        tuple(_head(first, second) for first, second in zip(*rows, strict=True))
        for rows in zip(prefill.heads, decode.heads, strict=True)
    )
    streaming = sum(head.keep != "all" for row in heads for head in row)
    notes = [*prefill.approximations, *decode.approximations]
    if streaming:
        total = sum(map(len, heads))
        notes.append(
            f"{of_heads(streaming, total)}: stream, so that their prompts read the window, and not what the "
            "other file says"
        )
    return Imported(
        heads,
        tuple(notes),
        prefill.query_heads or decode.query_heads,
        prefill.head_dim or decode.head_dim,
        _together(prefill, decode),
    )


def _head(prefill: HeadEntry, decode: HeadEntry) -> HeadEntry:
    if decode.keep != "all":
        return decode
    return prefill if prefill.keep != "all" else HeadEntry(prefill=prefill.prefill, decode=decode.decode)


def _together(prefill: Imported, decode: Imported) -> dict[str, Tensors]:
    """Gates of both phases go into one file."""
    beside = {**prefill.beside, **decode.beside}
    for name in prefill.beside.keys() & decode.beside.keys():
        first, second = prefill.beside[name], decode.beside[name]
        for shared in first.tensors.keys() & second.tensors.keys():
            if not first.tensors[shared].equal(second.tensors[shared]):
                raise ImportRefused("The gates of the two files do not turn alike; import one of them alone.")
        beside[name] = Tensors({**first.tensors, **second.tensors}, {**first.metadata, **second.metadata})
    return beside
