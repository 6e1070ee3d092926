"""Triton kernels of nt_xent; `_triton.py` launches them. Equations are in `api.py`.

All rows lie in one matrix after `prepare_kernel`: row x of it is an input row divided by a power of two (exactly), and
inverse[x] its length's inverse, so that s = <row, row'> inverse inverse' / temperature carries no rounding of
normalised rows. Rows that are not valid are 0 and meet nobody; neither do rows of one group, or of one id. Per-row
numbers lie in the order of that matrix; biases are in units of log 2, those of queries are their positives'.

    statistics  block of rows x one part of the columns: running maximum of the gaps s - s_positive, 0 included, and
                the sum of exp(gap - maximum); the parts are put together afterwards
    gradient    block of rows, all columns: G = weight p of the row + weight p of the column, sum += G rows'
    pull        block of rows x block of columns of a chunk: G for either side, where the products are made elsewhere
    finish      the positive's part, and back through the normalisation

16-bit rows are multiplied by tensor cores and added in float32. float32 rows are multiplied and added in float64,
where similarities / 0.005 keep their digits. Gaps are in units of log 2. Each row has one owner: no atomic additions,
the same result in every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LIFT = tl.constexpr(16384.0)  # of G, at most 2: small probabilities stay normal numbers in float16
VARYING = ("pairs", "rows", "columns", "first_row", "first_column", "step")


@triton.jit
def _scaled(x, IS_NORMALIZED: tl.constexpr):
    """Row in float64 -> row of magnitude 1 to 2, the power of two it was multiplied by, and its length's inverse."""
    factor, inverse = 1.0, 1.0
    if IS_NORMALIZED:
        largest = tl.max(tl.abs(x), 0)
        # The float64 with the exponent of `largest` and no digits; 1 for a row of zeros.
        power = (largest.to(tl.int64, bitcast=True) & 0x7FF0000000000000).to(tl.float64, bitcast=True)
        factor = 1.0 / tl.where(power == 0.0, 1.0, power)
        x *= factor
        inverse = tl.where(largest == 0.0, 0.0, 1.0 / tl.sqrt(tl.where(largest == 0.0, 1.0, tl.sum(x * x, 0))))
    return x, factor, inverse


@triton.jit(do_not_specialize=VARYING)
def prepare_kernel(
    left_ptr, right_ptr, left_stride, right_stride, valid_ptr, rows_ptr, inverse_ptr, positive_ptr, pairs,
    IS_PAIR: tl.constexpr, IS_NORMALIZED: tl.constexpr, HAS_VALID: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One pair: both rows scaled, their inverse lengths, their similarity; or one row, as left, alone."""
    pair, at = tl.cast(tl.program_id(0), tl.int64), tl.arange(0, BLOCK_E)
    mask = at < WIDTH
    if HAS_VALID:
        mask &= tl.load(valid_ptr + pair) != 0
    left = tl.load(left_ptr + pair * left_stride + at, mask=mask, other=0.0).to(tl.float64)
    left, _, left_inverse = _scaled(left, IS_NORMALIZED)
    kind = rows_ptr.dtype.element_ty
    tl.store(rows_ptr + pair * WIDTH + at, left.to(kind), mask=at < WIDTH)
    tl.store(inverse_ptr + pair, left_inverse)
    if IS_PAIR:
        right = tl.load(right_ptr + pair * right_stride + at, mask=mask, other=0.0).to(tl.float64)
        right, _, right_inverse = _scaled(right, IS_NORMALIZED)
        tl.store(rows_ptr + (pair + pairs) * WIDTH + at, right.to(kind), mask=at < WIDTH)
        tl.store(inverse_ptr + pair + pairs, right_inverse)
        product = tl.sum(left.to(kind).to(tl.float64) * right.to(kind).to(tl.float64), 0)
        tl.store(positive_ptr + pair, product * left_inverse * right_inverse)
        tl.store(positive_ptr + pair + pairs, product * left_inverse * right_inverse)


@triton.jit
def _tile(ptr, first, count, column, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """Rows first .. first + BLOCK - 1 and columns column .. column + BLOCK_K - 1, 0 past the ends."""
    at, k = tl.arange(0, BLOCK), column + tl.arange(0, BLOCK_K)
    mask = (first + at < count)[:, None]
    if WIDTH % BLOCK_K != 0:
        mask &= (k < WIDTH)[None, :]
    return tl.load(ptr + tl.cast(first, tl.int64) * WIDTH + at[:, None] * WIDTH + k[None, :], mask=mask, other=0.0)


@triton.jit
def _product(a, b, IS_WIDE: tl.constexpr):
    if IS_WIDE:
        return tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64)
    else:
        return tl.dot(a, b)


@triton.jit
def _products(
    a_ptr, b_ptr, a, b, first_a, count_a, first_b, count_b, IS_WIDE: tl.constexpr, IS_WHOLE: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """All products of two blocks of rows; a and b are the whole rows where they fit (IS_WHOLE)."""
    if IS_WHOLE:
        return _product(a, tl.trans(b), IS_WIDE)
    else:
        products = tl.zeros([BLOCK_M, BLOCK_N], tl.float64 if IS_WIDE else tl.float32)
        for column in range(0, WIDTH, BLOCK_K):
            a_part = _tile(a_ptr, first_a, count_a, column, WIDTH, BLOCK_M, BLOCK_K)
            b_part = _tile(b_ptr, first_b, count_b, column, WIDTH, BLOCK_N, BLOCK_K)
            products += _product(a_part, tl.trans(b_part), IS_WIDE)
        return products


@triton.jit
def _is_negative(
    row, column, is_row, is_column, group_ptr, ids_ptr, valid_ptr, HAS_IDS: tl.constexpr, HAS_VALID: tl.constexpr
):
    """[M, N]: neither of one group, nor of one id, nor with a row that is not valid or does not exist."""
    if HAS_VALID:
        is_row &= tl.load(valid_ptr + row, mask=is_row, other=0) != 0
        is_column &= tl.load(valid_ptr + column, mask=is_column, other=0) != 0
    row_group = tl.load(group_ptr + row, mask=is_row, other=-2)
    column_group = tl.load(group_ptr + column, mask=is_column, other=-3)
    found = (row_group[:, None] != column_group[None, :]) & is_row[:, None] & is_column[None, :]
    if HAS_IDS:
        row_id = tl.load(ids_ptr + row, mask=is_row, other=0)
        column_id = tl.load(ids_ptr + column, mask=is_column, other=0)
        found &= row_id[:, None] != column_id[None, :]
    return found


@triton.jit(do_not_specialize=VARYING)
def statistics_kernel(
    rows_ptr, inverse_ptr, positive_ptr, group_ptr, ids_ptr, valid_ptr, bias_ptr, temperature_ptr, product_ptr,
    maximum_ptr, sum_ptr, first_row, rows, first_column, columns, step, HAS_PRODUCTS: tl.constexpr,
    HAS_IDS: tl.constexpr, HAS_VALID: tl.constexpr, HAS_BIAS: tl.constexpr, IS_WIDE: tl.constexpr,
    IS_WHOLE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows first_row .. first_row + rows - 1 against `step` of the columns, of first_column .. + columns - 1.

    HAS_PRODUCTS: their products lie in memory, [rows, columns].
    """
    REAL: tl.constexpr = tl.float64 if IS_WIDE else tl.float32
    row, part = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    a_ptr = rows_ptr + tl.cast(first_row, tl.int64) * WIDTH
    b_ptr = rows_ptr + tl.cast(first_column, tl.int64) * WIDTH
    at = row + tl.arange(0, BLOCK_M)
    is_row = at < rows
    inverse = tl.load(inverse_ptr + first_row + at, mask=is_row, other=0.0).to(REAL)
    positive = tl.load(positive_ptr + first_row + at, mask=is_row, other=0.0).to(REAL)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + first_row + at, mask=is_row, other=0.0).to(REAL)
    unit = (1.0 / tl.load(temperature_ptr) * LOG2E).to(REAL)
    a = inverse
    if IS_WHOLE and not HAS_PRODUCTS:
        a = _tile(a_ptr, row, rows, 0, WIDTH, BLOCK_M, BLOCK_K)
    maximum = tl.zeros([BLOCK_M], REAL)
    total = tl.zeros([BLOCK_M], tl.float64)
    for first in range(part * step, tl.minimum(part * step + step, columns), BLOCK_N):
        there = first + tl.arange(0, BLOCK_N)
        is_column = there < columns
        if HAS_PRODUCTS:
            place = product_ptr + at[:, None] * columns + there[None, :]
            products = tl.load(place, mask=is_row[:, None] & is_column[None, :], other=0.0)
        else:
            b = a
            if IS_WHOLE:
                b = _tile(b_ptr, first, columns, 0, WIDTH, BLOCK_N, BLOCK_K)
            products = _products(
                a_ptr, b_ptr, a, b, row, rows, first, columns, IS_WIDE, IS_WHOLE, WIDTH, BLOCK_M, BLOCK_N, BLOCK_K
            )
        column_inverse = tl.load(inverse_ptr + first_column + there, mask=is_column, other=0.0).to(REAL)
        gap = (products * (inverse[:, None] * column_inverse[None, :]) - positive[:, None]) * unit
        if HAS_BIAS:
            column_bias = tl.load(bias_ptr + first_column + there, mask=is_column, other=0.0).to(REAL)
            gap += column_bias[None, :] - bias[:, None]
        is_negative = _is_negative(
            first_row + at, first_column + there, is_row, is_column, group_ptr, ids_ptr, valid_ptr, HAS_IDS, HAS_VALID
        )
        gap = tl.where(is_negative, gap, float("-inf"))
        largest = tl.maximum(maximum, tl.max(gap, 1))
        fade = tl.exp2((maximum - largest).to(tl.float32)).to(tl.float64)
        total = total * fade + tl.sum(tl.exp2((gap - largest[:, None]).to(tl.float32)), 1).to(tl.float64)
        maximum = largest
    place = tl.cast(part, tl.int64) * rows + at
    tl.store(maximum_ptr + place, maximum.to(tl.float64), mask=is_row)
    tl.store(sum_ptr + place, total, mask=is_row)


@triton.jit(do_not_specialize=VARYING)
def gradient_kernel(
    rows_ptr, inverse_ptr, positive_ptr, group_ptr, ids_ptr, valid_ptr, bias_ptr, temperature_ptr, loss_ptr, weight_ptr,
    slope_ptr, moment_ptr, first_row, rows, first_column, columns, HAS_ROW_LOSS: tl.constexpr,
    HAS_COLUMN_LOSS: tl.constexpr, HAS_IDS: tl.constexpr, HAS_VALID: tl.constexpr, HAS_BIAS: tl.constexpr,
    IS_WIDE: tl.constexpr, IS_WHOLE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """sum_j G_ij u_j of a block of rows, from element program_id(1) BLOCK_E on, and its sum_ij p_ij gap_ij."""
    REAL: tl.constexpr = tl.float64 if IS_WIDE else tl.float32
    row, element = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_E
    a_ptr = rows_ptr + tl.cast(first_row, tl.int64) * WIDTH
    b_ptr = rows_ptr + tl.cast(first_column, tl.int64) * WIDTH
    at = row + tl.arange(0, BLOCK_M)
    is_row = at < rows
    inverse = tl.load(inverse_ptr + first_row + at, mask=is_row, other=0.0).to(REAL)
    unit = (1.0 / tl.load(temperature_ptr) * LOG2E).to(REAL)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + first_row + at, mask=is_row, other=0.0).to(REAL)
    if HAS_ROW_LOSS:
        positive = tl.load(positive_ptr + first_row + at, mask=is_row, other=0.0).to(REAL)
        loss = tl.load(loss_ptr + first_row + at, mask=is_row, other=0.0).to(REAL)
        weight = tl.load(weight_ptr + first_row + at, mask=is_row, other=0.0)
    a = inverse
    if IS_WHOLE:
        a = _tile(a_ptr, row, rows, 0, WIDTH, BLOCK_M, BLOCK_K)
    slope = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    moment = tl.zeros([BLOCK_M], tl.float64)
    for first in range(0, columns, BLOCK_N):
        b = a
        if IS_WHOLE:
            b = _tile(b_ptr, first, columns, 0, WIDTH, BLOCK_N, BLOCK_K)
        products = _products(
            a_ptr, b_ptr, a, b, row, rows, first, columns, IS_WIDE, IS_WHOLE, WIDTH, BLOCK_M, BLOCK_N, BLOCK_K
        )
        there = first + tl.arange(0, BLOCK_N)
        is_column = there < columns
        column_inverse = tl.load(inverse_ptr + first_column + there, mask=is_column, other=0.0).to(REAL)
        s = products * (inverse[:, None] * column_inverse[None, :])
        is_negative = _is_negative(
            first_row + at, first_column + there, is_row, is_column, group_ptr, ids_ptr, valid_ptr, HAS_IDS, HAS_VALID
        )
        g = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if HAS_BIAS:
            column_bias = tl.load(bias_ptr + first_column + there, mask=is_column, other=0.0).to(REAL)
        if HAS_ROW_LOSS:
            distance = (s - positive[:, None]) * unit
            gap = distance - loss[:, None]
            if HAS_BIAS:
                gap += column_bias[None, :] - bias[:, None]
            p = tl.exp2(tl.where(is_negative, gap, float("-inf")).to(tl.float32))
            g += p * weight[:, None]
            moment += tl.sum(tl.where(is_negative, p * distance, 0.0), 1).to(tl.float64)
        if HAS_COLUMN_LOSS:
            column_positive = tl.load(positive_ptr + first_column + there, mask=is_column, other=0.0).to(REAL)
            column_loss = tl.load(loss_ptr + first_column + there, mask=is_column, other=0.0).to(REAL)
            column_weight = tl.load(weight_ptr + first_column + there, mask=is_column, other=0.0)
            gap = (s - column_positive[None, :]) * unit - column_loss[None, :]
            if HAS_BIAS:
                gap += bias[:, None] - column_bias[None, :]
            g += tl.exp2(tl.where(is_negative, gap, float("-inf")).to(tl.float32)) * column_weight[None, :]
        g *= column_inverse.to(tl.float32)[None, :] * LIFT
        if not IS_WHOLE:
            b = _tile(b_ptr, first, columns, element, WIDTH, BLOCK_N, BLOCK_E)
        slope = tl.dot(g.to(b.dtype), b, slope, input_precision="ieee")
    e = element + tl.arange(0, BLOCK_E)
    place = (tl.cast(first_row, tl.int64) + at)[:, None] * WIDTH + e[None, :]
    tl.store(slope_ptr + place, slope / LIFT, mask=is_row[:, None] & (e < WIDTH)[None, :])
    if HAS_ROW_LOSS and element == 0:
        tl.store(moment_ptr + tl.program_id(0), tl.sum(moment * weight.to(tl.float64), 0))


@triton.jit(do_not_specialize=VARYING)
def pull_kernel(
    product_ptr, inverse_ptr, positive_ptr, group_ptr, ids_ptr, valid_ptr, bias_ptr, temperature_ptr, loss_ptr,
    weight_ptr, to_row_ptr, to_column_ptr, moment_ptr, first_row, rows, first_column, columns,
    HAS_COLUMN_LOSS: tl.constexpr, IS_FOR_COLUMNS: tl.constexpr, HAS_IDS: tl.constexpr, HAS_VALID: tl.constexpr,
    HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """G of a chunk from its products, both [rows, columns]: times the lengths of the columns, and of the rows.

    The sum_ij p_ij gap_ij is added to what the program's place holds: of the rows' losses, and IS_FOR_COLUMNS also of
    the columns'.
    """
    at, there = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row, is_column = at < rows, there < columns
    row, column = first_row + at, first_column + there
    place, is_inside = at[:, None] * columns + there[None, :], is_row[:, None] & is_column[None, :]
    inverse = tl.load(inverse_ptr + row, mask=is_row, other=0.0).to(tl.float32)
    column_inverse = tl.load(inverse_ptr + column, mask=is_column, other=0.0).to(tl.float32)
    unit = (1.0 / tl.load(temperature_ptr) * LOG2E).to(tl.float32)
    s = tl.load(product_ptr + place, mask=is_inside, other=0.0) * (inverse[:, None] * column_inverse[None, :])
    is_negative = _is_negative(row, column, is_row, is_column, group_ptr, ids_ptr, valid_ptr, HAS_IDS, HAS_VALID)
    positive = tl.load(positive_ptr + row, mask=is_row, other=0.0).to(tl.float32)
    loss = tl.load(loss_ptr + row, mask=is_row, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + row, mask=is_row, other=0.0)
    distance = (s - positive[:, None]) * unit
    gap = distance - loss[:, None]
    if HAS_BIAS:  # of candidates, which have no loss of their own
        bias = tl.load(bias_ptr + row, mask=is_row, other=0.0).to(tl.float32)
        column_bias = tl.load(bias_ptr + column, mask=is_column, other=0.0).to(tl.float32)
        gap += column_bias[None, :] - bias[:, None]
    g = tl.exp2(tl.where(is_negative, gap, float("-inf"))) * weight[:, None]
    moment = tl.where(is_negative, g * distance, 0.0)
    if HAS_COLUMN_LOSS:
        positive = tl.load(positive_ptr + column, mask=is_column, other=0.0).to(tl.float32)
        loss = tl.load(loss_ptr + column, mask=is_column, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + column, mask=is_column, other=0.0)
        distance = (s - positive[None, :]) * unit
        of_column = tl.exp2(tl.where(is_negative, distance - loss[None, :], float("-inf"))) * weight[None, :]
        g += of_column
        if IS_FOR_COLUMNS:
            moment += tl.where(is_negative, of_column * distance, 0.0)
    g *= LIFT
    kind = to_row_ptr.dtype.element_ty
    tl.store(to_row_ptr + place, (g * column_inverse[None, :]).to(kind), mask=is_inside)
    if IS_FOR_COLUMNS:
        tl.store(to_column_ptr + place, (g * inverse[:, None]).to(kind), mask=is_inside)
    own = moment_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(own, tl.load(own) + tl.sum(tl.sum(moment, 1).to(tl.float64), 0))


@triton.jit(do_not_specialize=VARYING)
def finish_kernel(
    left_ptr, right_ptr, left_stride, right_stride, valid_ptr, slope_ptr, pull_ptr, factor_ptr, grad_left_ptr,
    grad_right_ptr, pairs, IS_PAIR: tl.constexpr, IS_NORMALIZED: tl.constexpr, HAS_VALID: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One pair: slope - pull * partner, through x / |x|, times the factor of the loss; or one row, as left, alone."""
    pair, at = tl.cast(tl.program_id(0), tl.int64), tl.arange(0, BLOCK_E)
    mask = at < WIDTH
    if HAS_VALID:
        mask &= tl.load(valid_ptr + pair) != 0
    left = tl.load(left_ptr + pair * left_stride + at, mask=mask, other=0.0).to(tl.float64)
    left, left_factor, left_inverse = _scaled(left, IS_NORMALIZED)
    left *= left_inverse
    factor = tl.load(factor_ptr)
    to_left = tl.load(slope_ptr + pair * WIDTH + at, mask=mask, other=0.0).to(tl.float64)
    kind = grad_left_ptr.dtype.element_ty
    if IS_PAIR:
        right = tl.load(right_ptr + pair * right_stride + at, mask=mask, other=0.0).to(tl.float64)
        right, right_factor, right_inverse = _scaled(right, IS_NORMALIZED)
        right *= right_inverse
        pull = tl.load(pull_ptr + pair)
        to_left -= pull * right
        to_right = tl.load(slope_ptr + (pair + pairs) * WIDTH + at, mask=mask, other=0.0).to(tl.float64) - pull * left
        if IS_NORMALIZED:
            to_right = (to_right - right * tl.sum(to_right * right, 0)) * right_inverse * right_factor
        tl.store(grad_right_ptr + pair * WIDTH + at, (to_right * factor).to(kind), mask=at < WIDTH)
    if IS_NORMALIZED:
        to_left = (to_left - left * tl.sum(to_left * left, 0)) * left_inverse * left_factor
    tl.store(grad_left_ptr + pair * WIDTH + at, (to_left * factor).to(kind), mask=at < WIDTH)
