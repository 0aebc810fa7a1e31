"""The kernels that are written by hand, in Triton."""

# ruff: noqa: N803  (Triton writes constants in capitals)

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)  # GPUs have exp2


@triton.jit
def softmax_gradient(logits, targets, losses, stride, size, BLOCK: tl.constexpr):
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


@triton.jit
def accumulate(sums, fresh, size, BLOCK: tl.constexpr):
    """sums (size), float32, += fresh (size), of any precision."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    fits = at < size
    total = tl.load(sums + at, mask=fits) + tl.load(fresh + at, mask=fits).to(tl.float32)
    tl.store(sums + at, total, mask=fits)


@triton.jit
def gate(h, y, num_rows, size, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """y (num_rows, size) = silu(left half) * right half of h (num_rows, 2 * size)."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = (rows < num_rows) & (columns < size)
    at = rows * 2 * size + columns
    x = tl.load(h + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(h + at + size, mask=mask, other=0.0).to(tl.float32)
    x = x / (1.0 + tl.exp2(-x * LOG2_E)) * up
    tl.store(y + rows * size + columns, x.to(y.dtype.element_ty), mask=mask)


@triton.jit
def gate_backward(dy, h, dh, num_rows, size, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """dh (num_rows, 2 * size) of gate(): for both halves of h."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = (rows < num_rows) & (columns < size)
    at = rows * 2 * size + columns
    x = tl.load(h + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(h + at + size, mask=mask, other=0.0).to(tl.float32)
    gradient = tl.load(dy + rows * size + columns, mask=mask, other=0.0).to(tl.float32)
    s = 1.0 / (1.0 + tl.exp2(-x * LOG2_E))
    tl.store(dh + at, (gradient * up * (s + x * s * (1.0 - s))).to(dh.dtype.element_ty), mask=mask)
    tl.store(dh + at + size, (gradient * x * s).to(dh.dtype.element_ty), mask=mask)


@triton.jit
def rotate_heads(
    x, gain, turns, out, width, time, table_size, num_rows, num_heads, eps,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out (num_rows, num_heads * D): the heads in x (num_rows, width), normalized and rotated.

    turns: cosines, and `table_size` numbers later sines, (T, D) each, as model.rotary_table() has
    them. A head is taken in two halves of D / 2, rounded up to COLUMNS, whose numbers are pairs.
    """
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    half = tl.arange(0, COLUMNS)[None, :]
    fits = half < D // 2
    mask = (rows < num_rows) & fits
    turn = turns + rows % time * D + half
    cos = tl.load(turn, mask=mask, other=0.0)
    sin = tl.load(turn + table_size + D // 2, mask=mask, other=0.0)
    first_gain = tl.load(gain + half, mask=fits, other=0.0).to(tl.float32)
    second_gain = tl.load(gain + D // 2 + half, mask=fits, other=0.0).to(tl.float32)
    for head in range(0, num_heads):
        at = x + rows * width + head * D + half
        first = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(at + D // 2, mask=mask, other=0.0).to(tl.float32)
        squares = tl.sum(first * first + second * second, 1)[:, None]
        scale = 1.0 / tl.sqrt(squares / D + eps)
        first *= scale * first_gain
        second *= scale * second_gain
        to = out + rows * num_heads * D + head * D + half
        tl.store(to, (first * cos - second * sin).to(out.dtype.element_ty), mask=mask)
        tl.store(to + D // 2, (second * cos + first * sin).to(out.dtype.element_ty), mask=mask)


@triton.jit
def add_and_norm(x, y, gain, out, n, scales, size, eps, BLOCK: tl.constexpr):
    """One row of `size` numbers: out = x + y, and n, its RMSNorm, which multiplied it by scale."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    fits = columns < size
    at = row * size + columns
    value = tl.load(x + at, mask=fits, other=0.0).to(tl.float32)
    value += tl.load(y + at, mask=fits, other=0.0).to(tl.float32)
    rounded = value.to(out.dtype.element_ty)
    tl.store(out + at, rounded, mask=fits)
    value = rounded.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(value * value) / size + eps)
    tl.store(scales + row, scale)
    value *= scale * tl.load(gain + columns, mask=fits, other=0.0).to(tl.float32)
    tl.store(n + at, value.to(n.dtype.element_ty), mask=fits)


@triton.jit
def pack(
    source, packed, batch_stride, head_stride, time_stride, channel_stride, time, num_rows, size,
    width, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """source (B, H, T, D) in any order -> `size` = H * D columns of packed (B * T, width)."""
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = (rows < num_rows)[:, None] & (columns < size)[None, :]
    across = columns // D * head_stride + columns % D * channel_stride
    down = (rows // time).to(tl.int64) * batch_stride + (rows % time).to(tl.int64) * time_stride
    x = tl.load(source + down[:, None] + across[None, :], mask=mask, other=0.0)
    tl.store(packed + rows.to(tl.int64)[:, None] * width + columns[None, :], x, mask=mask)


# Below, a program takes `rows_each` rows, one after the other, and leaves the sums of their columns
# in float32, in row `chunk` of `sums`: nothing is read a second time for them, and the order of
# additions is fixed. Loads are wide: 16 bytes a thread.


@triton.jit
def rotate_back_and_sum(
    source, x, gain, turns, packed, sums, batch_stride, head_stride, time_stride, channel_stride,
    width, time, table_size, num_rows, num_heads, rows_each, eps,
    D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The way back through rotate_heads(): source (B, H, T, D) in any order -> as many columns of
    packed (B * T, width), where x was. sums (chunks, D): for the gain's gradient."""
    chunk = tl.program_id(0)
    half = tl.arange(0, COLUMNS)[None, :]
    fits = half < D // 2
    first_gain = tl.load(gain + half, mask=fits, other=0.0).to(tl.float32)
    second_gain = tl.load(gain + D // 2 + half, mask=fits, other=0.0).to(tl.float32)
    first_total = tl.zeros([ROWS, COLUMNS], tl.float32)
    second_total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, rows_each, ROWS):
        rows = (chunk * rows_each + start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        mask = (rows < num_rows) & fits
        turn = turns + rows % time * D + half
        cos = tl.load(turn, mask=mask, other=0.0)
        sin = tl.load(turn + table_size + D // 2, mask=mask, other=0.0)
        down = source + rows // time * batch_stride + rows % time * time_stride
        for head in range(0, num_heads):
            at = rows * width + head * D + half
            first = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
            second = tl.load(x + at + D // 2, mask=mask, other=0.0).to(tl.float32)
            squares = tl.sum(first * first + second * second, 1)[:, None]
            scale = 1.0 / tl.sqrt(squares / D + eps)
            first *= scale
            second *= scale
            given = down + head * head_stride + half * channel_stride
            d1 = tl.load(given, mask=mask, other=0.0).to(tl.float32)
            d2 = tl.load(given + D // 2 * channel_stride, mask=mask, other=0.0).to(tl.float32)
            back1 = d1 * cos + d2 * sin
            back2 = d2 * cos - d1 * sin
            first_total += back1 * first
            second_total += back2 * second
            back1 *= first_gain
            back2 *= second_gain
            slope = tl.sum(back1 * first + back2 * second, 1)[:, None] / D
            back1 = (back1 - first * slope) * scale
            back2 = (back2 - second * slope) * scale
            tl.store(packed + at, back1.to(packed.dtype.element_ty), mask=mask)
            tl.store(packed + at + D // 2, back2.to(packed.dtype.element_ty), mask=mask)
    sums += chunk * D + half
    tl.store(sums, tl.sum(first_total, 0)[None, :], mask=fits)
    tl.store(sums + D // 2, tl.sum(second_total, 0)[None, :], mask=fits)


@triton.jit
def norm_and_sum(
    dx, dn, x, scales, gain, d, sums, num_rows, size, rows_each, BLOCK: tl.constexpr
):  # fmt: skip
    """d = dx + what dn gives back through n = x * scale * gain: (num_rows, size).

    sums (chunks, size): for the gain's gradient.
    """
    chunk = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    fits = columns < size
    weight = tl.load(gain + columns, mask=fits, other=0.0).to(tl.float32)
    gain_total = tl.zeros([BLOCK], tl.float32)
    first = chunk * rows_each
    for start in range(0, tl.minimum(rows_each, num_rows - first)):
        row = first + start
        at = row.to(tl.int64) * size + columns
        below = tl.load(dn + at, mask=fits, other=0.0).to(tl.float32)
        value = tl.load(x + at, mask=fits, other=0.0).to(tl.float32)
        beside = tl.load(dx + at, mask=fits, other=0.0).to(tl.float32)
        scale = tl.load(scales + row).to(tl.float32)
        weighted = below * weight
        normal = value * scale
        slope = tl.sum(weighted * normal) / size
        gradient = beside + (weighted - normal * slope) * scale
        tl.store(d + at, gradient.to(d.dtype.element_ty), mask=fits)
        gain_total += below * normal
    tl.store(sums + chunk * size + columns, gain_total, mask=fits)


# Products of 8-bit integers, for int8.py. All sizes are multiples of a tile's.


@triton.jit
def largest(x, row_tops, column_tops, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The largest |number| of each row and column of x (num_rows, width); both are zero before.

    What is not a number counts as infinite. Programs may come in any order.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    value = tl.load(x + rows.to(tl.int64)[:, None] * width + columns[None, :]).to(tl.float32)
    value = tl.where(value == value, tl.abs(value), float("inf"))
    tl.atomic_max(row_tops + rows, tl.max(value, 1), sem="relaxed")
    tl.atomic_max(column_tops + columns, tl.max(value, 0), sem="relaxed")


@triton.jit
def round_both(
    x, row_tops, column_tops, by_rows, by_columns, num_rows, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """x (num_rows, width) as integers from -127 to 127: by_rows, of the same shape, in units of
    row_tops / 127, and by_columns, transposed, in units of column_tops / 127."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    down, across = rows.to(tl.int64)[:, None], columns.to(tl.int64)[None, :]
    value = tl.load(x + down * width + across).to(tl.float32)
    of_rows = 127.0 / tl.maximum(tl.load(row_tops + rows), 1e-30)
    of_columns = 127.0 / tl.maximum(tl.load(column_tops + columns), 1e-30)
    rounded = tl.floor(value * of_rows[:, None] + 0.5)
    tl.store(by_rows + down * width + across, rounded.to(tl.int8))
    rounded = tl.floor(value * of_columns[None, :] + 0.5)
    tl.store(by_columns + across * num_rows + down, rounded.to(tl.int8))


@triton.jit
def multiply(
    a, b, a_tops, b_tops, out, num_rows, num_columns, size,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out (num_rows, num_columns) = a (num_rows, size) b (num_columns, size)^T, of integers in
    units of a_tops / 127 and b_tops / 127 of their rows. GROUP rows of tiles share b's in cache."""
    program, across = tl.program_id(0), num_columns // COLUMNS
    first = program // (GROUP * across) * GROUP
    height = tl.minimum(num_rows // ROWS - first, GROUP)
    inside = program % (GROUP * across)
    rows = (first + inside % height) * ROWS + tl.arange(0, ROWS)
    columns = inside // height * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    a += rows.to(tl.int64)[:, None] * size + depth[None, :]
    b += columns.to(tl.int64)[None, :] * size + depth[:, None]
    total = tl.zeros([ROWS, COLUMNS], tl.int32)
    for _ in range(0, size, DEPTH):
        total = tl.dot(tl.load(a), tl.load(b), total, out_dtype=tl.int32)
        a += DEPTH
        b += DEPTH
    scale = tl.load(a_tops + rows)[:, None] * tl.load(b_tops + columns)[None, :] / (127.0 * 127.0)
    at = rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
    tl.store(out + at, (total.to(tl.float32) * scale).to(out.dtype.element_ty))
