"""The one kernel that is written by hand, in Triton: cross_entropy.py's softmax_gradient."""

import triton
import triton.language as tl


@triton.jit
def softmax_gradient(logits, targets, losses, stride, size, BLOCK: tl.constexpr):  # noqa: N803
    """One row of logits: its loss, and the gradient in its place.

    A row is read from memory once: on its second way it comes from the L2 cache. The sum is taken
    online (Milakov and Gimelshein 2018), with a maximum for each block of columns.
    """
    row = tl.program_id(0)
    logits += row.to(tl.int64) * stride
    target = tl.load(targets + row)
    counts = target != -100
    score = tl.load(logits + tl.where(counts, target, 0)).to(tl.float32)
    columns = tl.arange(0, BLOCK)
    top = tl.full([], -float("inf"), tl.float32)
    totals = tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        inside = start + columns < size
        x = tl.load(logits + start + columns, mask=inside, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(x))
        totals = totals * tl.exp(top - higher) + tl.exp(x - higher)
        top = higher
    log_total = top + tl.log(tl.sum(totals))
    tl.store(losses + row, tl.where(counts, log_total - score, 0.0))
    for start in range(0, size, BLOCK):
        inside = start + columns < size
        x = tl.load(logits + start + columns, mask=inside, other=0.0).to(tl.float32)
        gradient = tl.exp(x - log_total) - tl.where(start + columns == target, 1.0, 0.0)
        gradient = tl.where(counts, gradient, 0.0).to(logits.dtype.element_ty)
        tl.store(logits + start + columns, gradient, mask=inside)
