"""Counting the guest's instructions in qemu's log."""

from __future__ import annotations

import io

import pytest

from benchmarks import neon_instructions

LOG = """\
PROLOGUE: [size=45]
0x7f36d0000000:  pushq    %rbp
----------------
IN: main
0x00400b00:  a9bf7bfd  stp x29, x30, [sp, #-0x10]!
0x00400b04:  910003fd  mov x29, sp
0x00400b08:  94000010  bl #0x400b48

Trace 0: 0x7f36d0000100 [0000000000000000/0000000000400b00/00000000/ff000200] main
----------------
IN: work
0x00400b48:  d65f03c0  ret

Trace 0: 0x7f36d0000200 [0000000000000000/0000000000400b48/00000000/ff000200] work
Trace 0: 0x7f36d0000100 [0000000000000000/0000000000400b00/00000000/ff000200] main
"""


def test_a_block_counts_as_often_as_it_is_run():
    assert neon_instructions.executed(io.StringIO(LOG)) == 3 + 1 + 3


def test_a_block_that_was_never_listed_is_no_zero():
    with pytest.raises(KeyError):
        neon_instructions.executed(io.StringIO(LOG.replace("IN: work\n0x00400b48", "IN: work\n0x00400b4c")))


def test_every_case_has_a_unit():
    assert {case.split()[0] for case in neon_instructions.CASES} == set(neon_instructions.UNITS)
