"""The record that a pass over a part of the vocabulary leaves for each token, in C and in Triton alike; the last place
is C's alone."""

from enum import IntEnum


class Field(IntEnum):
    """Places in a record, with z = factor · (u - peak) and e = exp(z); see `LogitOptions` for u and factor."""

    PEAK = 0  # the student's largest u
    SUM = 1  # Σ e
    DOT = 2  # Σ e z
    TEACHER_PEAK = 3
    TEACHER_SUM = 4
    TEACHER_DOT = 5
    CROSS = 6  # the divergence's own sum
    TEACHER_AT_PEAK = 7  # the teacher's u where the student's is largest
    HARD_SUM = 8  # Σ exp(z) of a hard term's own z


FIELDS = len(Field)
