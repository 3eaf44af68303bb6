"""Data: files in, checked rows and token ids out.

`files` reads what rows come in, `rows` checks them, and `encode` lays out the student's and the teacher's prompts.
"""

from sdft.data.encode import (
    Limits,
    check_ids,
    encode_demonstration,
    encode_prompt,
    encode_rows,
    opening,
    openings_ids,
    teacher_chat,
    written,
)
from sdft.data.rows import COLUMNS, UNREAD, WHERE, Row, load_rows

__all__ = [
    "COLUMNS",
    "UNREAD",
    "WHERE",
    "Limits",
    "Row",
    "check_ids",
    "encode_demonstration",
    "encode_prompt",
    "encode_rows",
    "load_rows",
    "opening",
    "openings_ids",
    "teacher_chat",
    "written",
]
