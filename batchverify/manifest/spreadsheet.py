"""Cells of the CSV files that we write, so that no spreadsheet takes them for formulas."""

from __future__ import annotations

# What a cell starts with that spreadsheets calculate, whether it is in quotation marks or not.
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


def safe_path(path: str) -> str:
    """A relative path under another spelling that names the same file: `=a.jpg` becomes `./=a.jpg`."""
    return f"./{path}" if path.startswith(FORMULA) else path


def safe_name(name: str) -> str:
    """A name as text: `=a` becomes `'=a`. Two names may become one."""
    return f"'{name}" if name.startswith(FORMULA) else name
