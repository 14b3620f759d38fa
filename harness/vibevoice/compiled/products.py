"""Matrix products with sums in registers, norms and activations, on [features, columns] of float32.

A column is a row of the batch or a sample of a session. ``ld`` is the distance from one feature to the next, a multiple
of 8, so that whole vectors of columns are computed; values after the last column are undefined. A product's weights
are packed in blocks of 4 rows: [rows / 4, inputs, 4] (see ``pack``).
"""

from __future__ import annotations

from numba import types

from harness.vibevoice.compiled.lanes import (
    add,
    compiled,
    div,
    fma,
    inlined,
    least,
    load,
    most,
    mul,
    peek,
    power_of_two,
    root,
    splat,
    store,
    sub,
)


@inlined
def number(value):
    return splat(types.float32(value))


@inlined
def exponential(x):
    """e to the x, for x clamped to -87 to 87: Cody and Waite's reduction and a polynomial."""
    x = least(most(x, number(-87.0)), number(87.0))
    shifted = fma(x, number(1.44269504), number(12582912.0))
    whole = sub(shifted, number(12582912.0))
    rest = fma(whole, number(-0.693359375), x)
    rest = fma(whole, number(2.12194440e-4), rest)
    y = fma(number(1.9875691500e-4), rest, number(1.3981999507e-3))
    y = fma(y, rest, number(8.3334519073e-3))
    y = fma(y, rest, number(4.1665795894e-2))
    y = fma(y, rest, number(1.6666665459e-1))
    y = fma(y, rest, number(5.0000001201e-1))
    y = add(fma(mul(y, rest), rest, rest), number(1.0))
    return mul(y, power_of_two(shifted))


@inlined
def gelu(x):
    """x (1 + erf(x / sqrt 2)) / 2, with the rational approximation of erf that Eigen and XLA use for float32."""
    u = most(least(mul(x, number(0.70710678)), number(4.0)), number(-4.0))
    s = mul(u, u)
    p = fma(number(-2.72614225801306e-10), s, number(2.77068142495902e-08))
    p = fma(p, s, number(-2.10102402082508e-06))
    p = fma(p, s, number(-5.69250639462346e-05))
    p = fma(p, s, number(-7.34990630326855e-04))
    p = fma(p, s, number(-2.95459980854025e-03))
    p = fma(p, s, number(-1.60960333262415e-02))
    q = fma(number(-1.45660718464996e-05), s, number(-2.13374055278905e-04))
    q = fma(q, s, number(-1.68282697438203e-03))
    q = fma(q, s, number(-7.37332916720468e-03))
    q = fma(q, s, number(-1.42647390514189e-02))
    half = mul(x, number(0.5))
    return fma(half, div(mul(u, p), q), half)


@inlined
def silu(x):
    """x / (1 + e^-x)."""
    return div(x, add(number(1.0), exponential(sub(number(0.0), x))))


@inlined
def spread(w, at):
    return splat(peek(w, at))


@inlined
def _keep(y, at, ldy, rows, v0, v1, v2, v3, added):
    """Store eight columns of a block of 4 rows, of which the last rows may be missing."""
    store(y, at, add(v0, load(y, at)) if added else v0)
    if rows > 1:
        store(y, at + ldy, add(v1, load(y, at + ldy)) if added else v1)
    if rows > 2:
        store(y, at + 2 * ldy, add(v2, load(y, at + 2 * ldy)) if added else v2)
    if rows > 3:
        store(y, at + 3 * ldy, add(v3, load(y, at + 3 * ldy)) if added else v3)


@compiled
def _rows_by_24(w, at, bias, x, start, ldx, channels, taps, step, y, to, ldy, rows, added):
    """4 rows by 24 columns: twelve sums, three inputs and one weight fill the sixteen registers of AVX2."""
    p0, p1, p2, p3 = spread(w, bias), spread(w, bias + 1), spread(w, bias + 2), spread(w, bias + 3)
    q0, q1, q2, q3, r0, r1, r2, r3 = p0, p1, p2, p3, p0, p1, p2, p3
    for tap in range(taps):
        of = start + tap * step
        for _ in range(channels):
            p, q, r = load(x, of), load(x, of + 8), load(x, of + 16)
            v = spread(w, at)
            p0, q0, r0 = fma(v, p, p0), fma(v, q, q0), fma(v, r, r0)
            v = spread(w, at + 1)
            p1, q1, r1 = fma(v, p, p1), fma(v, q, q1), fma(v, r, r1)
            v = spread(w, at + 2)
            p2, q2, r2 = fma(v, p, p2), fma(v, q, q2), fma(v, r, r2)
            v = spread(w, at + 3)
            p3, q3, r3 = fma(v, p, p3), fma(v, q, q3), fma(v, r, r3)
            at += 4
            of += ldx
    _keep(y, to, ldy, rows, p0, p1, p2, p3, added)
    _keep(y, to + 8, ldy, rows, q0, q1, q2, q3, added)
    _keep(y, to + 16, ldy, rows, r0, r1, r2, r3, added)


@compiled
def _rows_by_16(w, at, bias, x, start, ldx, channels, taps, step, y, to, ldy, rows, added):
    p0, p1, p2, p3 = spread(w, bias), spread(w, bias + 1), spread(w, bias + 2), spread(w, bias + 3)
    q0, q1, q2, q3 = p0, p1, p2, p3
    for tap in range(taps):
        of = start + tap * step
        for _ in range(channels):
            p, q = load(x, of), load(x, of + 8)
            v0, v1, v2, v3 = spread(w, at), spread(w, at + 1), spread(w, at + 2), spread(w, at + 3)
            p0, p1, p2, p3 = fma(v0, p, p0), fma(v1, p, p1), fma(v2, p, p2), fma(v3, p, p3)
            q0, q1, q2, q3 = fma(v0, q, q0), fma(v1, q, q1), fma(v2, q, q2), fma(v3, q, q3)
            at += 4
            of += ldx
    _keep(y, to, ldy, rows, p0, p1, p2, p3, added)
    _keep(y, to + 8, ldy, rows, q0, q1, q2, q3, added)


@compiled
def _rows_by_8(w, at, bias, x, start, ldx, channels, taps, step, y, to, ldy, rows, added):
    p0, p1, p2, p3 = spread(w, bias), spread(w, bias + 1), spread(w, bias + 2), spread(w, bias + 3)
    for tap in range(taps):
        of = start + tap * step
        for _ in range(channels):
            p = load(x, of)
            p0, p1 = fma(spread(w, at), p, p0), fma(spread(w, at + 1), p, p1)
            p2, p3 = fma(spread(w, at + 2), p, p2), fma(spread(w, at + 3), p, p3)
            at += 4
            of += ldx
    _keep(y, to, ldy, rows, p0, p1, p2, p3, added)


@compiled
def product(w, weight, bias, rows, x, start, ldx, channels, taps, step, y, to, ldy, columns, added):
    """y [rows, columns] = bias + W x, or that sum added to y.

    The input of tap k and channel c is x from start + k step + c ldx.
    """
    for row in range(0, rows, 4):
        at, under, left = weight + row * channels * taps, bias + row, rows - row
        column = 0
        while column < columns:
            of, into = start + column, to + row * ldy + column
            ahead = columns - column
            if ahead <= 8:
                _rows_by_8(w, at, under, x, of, ldx, channels, taps, step, y, into, ldy, left, added)
                column += 8
            elif ahead <= 16 or 24 < ahead <= 32:
                _rows_by_16(w, at, under, x, of, ldx, channels, taps, step, y, into, ldy, left, added)
                column += 16
            else:
                _rows_by_24(w, at, under, x, of, ldx, channels, taps, step, y, into, ldy, left, added)
                column += 24


@inlined
def whole(columns):
    return (columns + 7) // 8 * 8


@inlined
def room(before, columns):
    """The length of a row with ``before`` past columns in front, rounded up so that whole vectors fit."""
    return whole(before + whole(columns))


@compiled
def normed(x, start, ldx, channels, epsilon, y, to, ldy, columns):
    """y = x / the root mean square over its channels."""
    share = number(1.0 / channels)
    for column in range(0, columns, 8):
        squares = number(0.0)
        for channel in range(channels):
            value = load(x, start + channel * ldx + column)
            squares = fma(value, value, squares)
        gain = div(number(1.0), root(fma(squares, share, splat(epsilon))))
        for channel in range(channels):
            store(y, to + channel * ldy + column, mul(load(x, start + channel * ldx + column), gain))
