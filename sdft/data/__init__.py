"""Data: files in, checked rows and token ids out.

`files` reads what rows come in, `columns` finds theirs, and `rows` checks them. `chats` and `encode` have what student
and teacher read, as text and as token ids.
"""

from sdft.data.chats import Options, check_options, opening, student_text, teacher_chat, teacher_text, written
from sdft.data.encode import (
    Limits,
    TeacherReads,
    check_ids,
    encode_demonstration,
    encode_prompt,
    encode_rows,
    openings_ids,
)
from sdft.data.rows import COLUMNS, ROW, UNREAD, WHERE, Row, load_rows

__all__ = [
    "COLUMNS",
    "ROW",
    "UNREAD",
    "WHERE",
    "Limits",
    "Options",
    "Row",
    "TeacherReads",
    "check_ids",
    "check_options",
    "encode_demonstration",
    "encode_prompt",
    "encode_rows",
    "load_rows",
    "opening",
    "openings_ids",
    "student_text",
    "teacher_chat",
    "teacher_text",
    "written",
]
