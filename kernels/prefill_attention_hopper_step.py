"""One step of `prefill_attention_hopper`: its softmax beside the product of the step before.

scores  = q K^T                            of this step's keys; all but products' factors is float32
top'    = max(top, max(scores) scale)      scale is for powers of 2
weights = 2**(scores scale - top')         rounded to V's dtype for their product
kept    = 2**(top - top')
total'  = total kept + sum(weights)
sums'   = (sums + old_weights old_V) kept  of the step before
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def soften(  # type: ignore[no-untyped-def]
    scores,
    total,
    top,
    positions,
    base,
    score_scale,
    AFTER: gl.constexpr,
    WINDOW: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """Return a step's weights, how much of the sums stays, and the running sum and maximum."""
    if AFTER or WINDOW > 0:
        tokens = base + gl.arange(0, scores.shape[1], gl.SliceLayout(0, LAYOUT))
        ahead = positions[:, None] - tokens[None, :]
        if AFTER:
            scores = gl.where(ahead >= 0, scores, -float("inf"))
        if WINDOW > 0:
            scores = gl.where(ahead < WINDOW, scores, -float("inf"))
    new_top = gl.maximum(top, gl.max(scores, 1) * score_scale)
    weights = gl.exp2(scores * score_scale - new_top[:, None])
    kept = gl.exp2(top - new_top)
    return weights, kept, total * kept + gl.sum(weights, 1), new_top


@gluon.jit
def add_steps(  # type: ignore[no-untyped-def]
    running,
    begin,
    stop,
    inputs,
    PART: gl.constexpr,
    WINDOW: gl.constexpr,
    S_LAYOUT: gl.constexpr,
    O_LAYOUT: gl.constexpr,
):
    """Add steps begin to stop: those at the window's edge, whole ones, or those of the diagonal.

    A turn multiplies queries and keys of its step, and weights and values of the step before.
    """
    sums, weights, total, top, step = running
    q_buffer, positions, score_scale, key_ring, value_ring = inputs
    keys, k_ready, k_free = key_ring
    values, v_ready, v_free = value_ring
    STAGES: gl.constexpr = keys.shape[0]
    BLOCK_N: gl.constexpr = keys.shape[1]
    ROWS: gl.constexpr = q_buffer.shape[0]
    HIDING: gl.constexpr = 0 if PART == 1 else WINDOW
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    for number in range(begin, stop):
        step += 1
        stage = step % STAGES
        mbarrier.wait(k_ready.index(stage), (step // STAGES) & 1)
        k = keys.index(stage).permute((1, 0))
        zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, S_LAYOUT)
        scores = warpgroup_mma(q_buffer, k, zeros, use_acc=False, is_async=True)
        old_stage = (step - 1) % STAGES
        old_phase = ((step - 1) // STAGES) & 1
        mbarrier.wait(v_ready.index(old_stage), old_phase)
        sums = warpgroup_mma(weights, values.index(old_stage), sums, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[scores])
        mbarrier.arrive(k_free.index(stage))
        base = number * BLOCK_N
        new_weights, kept, total, top = soften(
            scores, total, top, positions, base, score_scale, PART == 2, HIDING, S_LAYOUT
        )
        new_weights = gl.convert_layout(new_weights.to(values.dtype), P_LAYOUT)
        # Returns at once. The assembler moves the wait for a product ahead of the softmax, but not
        # over a branch, such as is in this.
        mbarrier.wait(v_ready.index(old_stage), old_phase)
        sums, weights = warpgroup_mma_wait(0, deps=[sums, new_weights])
        mbarrier.arrive(v_free.index(old_stage))
        sums = sums * gl.convert_layout(kept, gl.SliceLayout(1, O_LAYOUT))[:, None]
    return sums, weights, total, top, step
