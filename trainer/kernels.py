"""The one kernel that is written by hand, in Triton.

Before: the logits of cross_entropy.py, on a GPU. After: their losses, and their gradient.
"""

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)  # GPUs have exp2


@triton.jit
def softmax_gradient(logits, targets, losses, stride, size, BLOCK: tl.constexpr):  # noqa: N803
    """One row of logits: its loss, and the gradient in its place; zeros from `size` to `stride`.

    Each lane takes its sum online (Milakov and Gimelshein 2018), and the lanes meet at the end.
    Loads cover the padding, because they are wide only where their mask ends at a multiple of 16.
    """
    row = tl.program_id(0)
    logits += row.to(tl.int64) * stride
    target = tl.load(targets + row)
    counts = target != -100  # cross_entropy.IGNORED
    score = tl.load(logits + tl.where(counts, target, 0)).to(tl.float32)
    columns = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], -float("inf"), tl.float32)
    totals = tl.zeros([BLOCK], tl.float32)
    for start in range(0, stride, BLOCK):
        x = tl.load(logits + start + columns, mask=start + columns < stride, other=0.0)
        x = tl.where(start + columns < size, x.to(tl.float32), -1e30)
        # Of the old sum and the new term, the one with the lower exponent shrinks.
        shrinks = tl.exp2(-tl.abs(x - top) * LOG2_E)
        totals = tl.where(x > top, totals * shrinks + 1.0, totals + shrinks)
        top = tl.maximum(top, x)
    highest = tl.max(top)
    log_total = highest + tl.log(tl.sum(totals * tl.exp2((top - highest) * LOG2_E)))
    tl.store(losses + row, tl.where(counts, log_total - score, 0.0))
    for start in range(0, stride, BLOCK):
        x = tl.load(logits + start + columns, mask=start + columns < stride, other=0.0)
        gradient = tl.exp2((x.to(tl.float32) - log_total) * LOG2_E)
        gradient -= tl.where(start + columns == target, 1.0, 0.0)
        gradient = tl.where(counts & (start + columns < size), gradient, 0.0)
        gradient = gradient.to(logits.dtype.element_ty)
        tl.store(logits + start + columns, gradient, mask=start + columns < stride)
