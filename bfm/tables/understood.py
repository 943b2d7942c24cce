"""How files were understood that are not as usual, and which were left out: for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def read_as(files: Sequence[tuple[str, str]]) -> dict[str, str]:
    """How files (path, words) were understood that are not as usual: words -> the first, and how many more."""
    groups: dict[str, list[str]] = {}
    for name, (_, words) in zip(short_names([path for path, _ in files]), files, strict=True):
        if words and name not in groups.setdefault(words, []):
            groups[words].append(name)
    return {words: name + (f" and {len(more)} more" if more else "") for words, (name, *more) in groups.items()}


def short_names(paths: Sequence[str]) -> list[str]:
    """Paths without the folders that all of them share."""
    folders = [path.split("/")[:-1] for path in paths]
    shared = 0
    while all(len(folder) > shared and folder[shared] == folders[0][shared] for folder in folders):
        shared += 1
    return ["/".join(path.split("/")[shared:]) for path in paths]


def reading_lines(how: Mapping[str, str], left_out: Mapping[str, int]) -> list[str]:
    """How files were understood, and which were left out, for people."""
    told = [f"read as: {words} ({files})" for words, files in how.items()]
    if left_out:
        names = ", ".join(f"{name} ({count:,} file{'s' * (count > 1)})" for name, count in left_out.items())
        told.append(f"left out as hidden: {names}")
    if "_delta_log" in left_out:
        told.append("warning: this is a Delta table, and files that its log has removed were read too; export it first")
    return told
