"""Have memory fetched into the L2 cache of a GPU ahead of its use."""

import triton
import triton.language as tl


@triton.jit
def prefetch_l2(places):  # type: ignore[no-untyped-def]
    """Have the lines of these addresses fetched into the L2."""
    tl.inline_asm_elementwise(
        "{ prefetch.global.L2 [$1]; mov.u32 $0, 0; }",
        "=r,l",
        [places.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
