"""What `gossamer policy import` prints: what was read, what it became, what was approximated, and how to serve it."""

from pathlib import Path

from gossamer.attention.importers.policy_text import NOTE, POINT
from gossamer.attention.importers.summary import LENGTHS, summarise
from gossamer.attention.policy_file import PolicyFile
from gossamer.attention.policy_view import printable


def import_text(file: PolicyFile, out: Path) -> str:
    """Some lines, the table in the middle."""
    about, model = summarise(file), file.model
    lines = [
        f"{out}: {NOTE}",
        f"model: {model.name or 'not known'}, {model.layers} layers of {model.kv_heads} KV heads",
        *(f"from: {each.name} ({each.format}), sha256 {each.sha256[:16]}" for each in file.provenance.files),
        "",
        f"{about.sparse} of {about.heads} heads read less than everything; "
        f"{about.streaming or 'none'} of them give memory back",
    ]
    columns = [["", "heads", *(f"density at {length // 1024}K" for length in LENGTHS)]]
    for phase in about.phases:
        backends = ", ".join(f"{count} {name}" for name, count in phase.backends.items())
        columns.append([phase.phase, backends, *phase.density.values()])
    widths = [max(len(text) for text in column) for column in columns]
    for row in zip(*columns, strict=True):
        cells = zip(row, widths, strict=True)
        lines.append("  ".join(f"{text:<{width}}" for text, width in cells).rstrip())
    lines += ["", "approximations:", *(f"- {printable(note)}" for note in file.provenance.approximations)]
    serve = f"gossamer serve MODEL --attention-policy {out} --attention-point {POINT}"
    return "\n".join([*lines, "", f"The default point of the file, exact, is dense. To serve the profile: {serve}"])
