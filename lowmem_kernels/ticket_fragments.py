"""The device's part of tickets.py: taking a ticket, waiting for the phase before, and saying that work is done.

What one program hands to another: the writer's threads meet at a barrier, then one of them adds to a counter with
release semantics; the reader polls the counter with acquire semantics, its threads meet at a barrier, and they read
with ``cache_modifier=".cg"``, from L2: the L1 cache of a processor does not see what others write.
"""

import triton
import triton.language as tl

from .tickets import COMPLETED as _COMPLETED
from .tickets import SEGMENT as _SEGMENT
from .tickets import TAKEN as _TAKEN

OWNER, PHASE, WAIT, TARGET, DONE, COUNT, THEN = [tl.constexpr(i) for i in range(len(_SEGMENT))]
SEGMENT_SIZE = tl.constexpr(len(_SEGMENT))
TAKEN, COMPLETED = tl.constexpr(_TAKEN), tl.constexpr(_COMPLETED)

# counters that are put back to 0 at a time
_COUNTERS_AT_A_TIME = tl.constexpr(256)


@triton.jit
def take_ticket(counters_ptr, first):
    """The next ticket of this launch, of those from ``first`` on."""
    taken = tl.atomic_add(counters_ptr + TAKEN, 1, sem="relaxed", scope="gpu")
    if taken == tl.num_programs(0) - 1:
        tl.store(counters_ptr + TAKEN, 0)  # for the next launch: nobody takes another one
    return first + taken


@triton.jit
def find_segment(table_ptr, segments_start, ticket):
    """(pointer to the segment of a ticket, the ticket's index in it)."""
    word = tl.load(table_ptr + ticket)
    return table_ptr + segments_start + (word >> 32) * SEGMENT_SIZE, word.to(tl.int32)


@triton.jit
def wait_for_earlier(counters_ptr, segment_ptr):
    """Wait until what a segment's tickets depend on is done."""
    target = tl.load(segment_ptr + TARGET).to(tl.int32)
    if target > 0:
        counter_ptr = counters_ptr + tl.load(segment_ptr + WAIT)
        # adding 0 is how Triton spells a load that acquires
        while tl.atomic_add(counter_ptr, 0, sem="acquire", scope="gpu") < target:
            pass


@triton.jit
def arrive(counters_ptr, segment_ptr):
    """Count this ticket as done; true for the last of its segment, which then has to call `complete`."""
    tl.debug_barrier()
    counter_ptr = counters_ptr + tl.load(segment_ptr + DONE)
    return tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu") == tl.load(segment_ptr + COUNT).to(tl.int32) - 1


@triton.jit
def complete(counters_ptr, segment_ptr, owners, counters):
    """Let those go on who wait for this segment. The last of all parameters to be completed puts all counters to 0."""
    tl.debug_barrier()
    then = tl.load(segment_ptr + THEN).to(tl.int32)
    completed = -1
    if then > 0:
        completed = tl.atomic_add(counters_ptr + then, 1, sem="acq_rel", scope="gpu")
    if then != COMPLETED:
        # last of all: as soon as somebody goes on, the counters may be put back to 0
        tl.atomic_add(counters_ptr + tl.load(segment_ptr + DONE), 1, sem="release", scope="gpu")
    elif completed == owners - 1:
        # nobody polls any more: every ticket has passed its wait
        for start in range(0, counters, _COUNTERS_AT_A_TIME):
            counter = start + tl.arange(0, _COUNTERS_AT_A_TIME)
            tl.store(counters_ptr + counter, 0, mask=counter < counters)
