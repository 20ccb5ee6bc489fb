"""Where the shipped prompts, evaluation suites and configs are, in a clone and in a wheel."""

from __future__ import annotations

from pathlib import Path

from llmrec.errors import UsageError, nearest

KINDS = ("prompts", "eval", "configs")
_PACKAGE = Path(__file__).resolve().parent


def _folder(kind: str) -> Path:
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is not shipped; the kinds are {', '.join(KINDS)}.")
    # The wheel's place first: beside an installed package lies the whole of site-packages, where a
    # folder named `eval` may be anyone's. A clone or an editable install has no `_shipped`.
    installed = _PACKAGE / "_shipped" / kind
    return installed if installed.is_dir() else _PACKAGE.parent / kind


def listing(kind: str) -> list[str]:
    """Names of all shipped files of a kind, as ``folder/name.suffix``, sorted."""
    root = _folder(kind)
    return sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())


def shipped(kind: str, name: str) -> Path:
    """The path of one shipped file.

    Args:
        kind: "prompts", "eval" or "configs".
        name: The file within its kind, such as "item_text/title.jinja".

    Raises:
        UsageError: If there is no such file.
    """
    path = _folder(kind) / name
    if not path.is_file():
        raise UsageError(f"No shipped file {kind}/{name}: {nearest(name, listing(kind))}")
    return path
