"""Peak of tensor memory while something runs, from what PyTorch's CPU allocator reports: no malloc,
no imports, no noise.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import torch


def peak_bytes(work: Callable[[], object]) -> int:
    """The most bytes that were allocated on the CPU at once during ``work``, on top of what was
    there before it.

    Kernels' scratch memory counts where it comes from PyTorch's allocator; oneDNN's own and numpy's
    do not.
    """
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        work()
    events = profile.profiler.kineto_results.events()
    changes = sorted(
        (event.start_ns(), order, event.nbytes())
        for order, event in enumerate(events)
        if event.name() == "[memory]"
    )
    return max(accumulate((size for _, _, size in changes), initial=0))
