"""Spikes as bits: rows of 0 and 1 packed into words, and products of them by counting bits."""

import numpy as np
from numba import types
from numba.extending import intrinsic

from spikeattn._cpu.compiler import helper, inline
from spikeattn._cpu.storage import load_row

F = np.float32
U = np.uint64
WORD = 64


@intrinsic
def count_bits(context, word):
    """How many bits of an unsigned 64-bit word are set."""

    def codegen(context, builder, signature, args):
        return builder.ctpop(args[0])

    return types.uint64(types.uint64), codegen


@helper
def pack_row(row, padded):
    """``(word, are_spikes)``: element e of a float32 row in bit e, and whether it holds 0 and 1 only."""
    word, odd = U(0), U(0)
    for e in range(row.size):
        fires = U(1) if row[e] != F(0.0) else U(0)
        odd |= U(1) if row[e] != F(fires) else U(0)
        word |= fires << U(e)
    return U(0) if padded else word, odd == U(0)


@inline
def unpack_row(word, row):
    """``row[e]`` is bit e of ``word``."""
    for e in range(row.size):
        row[e] = F(1.0) if (word >> U(e)) & U(1) else F(0.0)


@helper
def add_column_bits(columns, row, j, padded):
    """Put token j, a float32 row, into bit j of the words of its channels; return whether it holds 0 and 1 only."""
    odd = U(0)
    bit = U(0) if padded else U(1) << U(j)
    for e in range(row.size):
        fires = row[e] != F(0.0)
        odd |= U(1) if row[e] != (F(1.0) if fires else F(0.0)) else U(0)
        columns[e] |= bit if fires else U(0)
    return odd == U(0)


@inline
def pack_rows(words, x, first, stride, E, mask, at, buffer):
    """One word for each token from ``x[first]`` on, zero at padding; whether they hold 0 and 1 only."""
    spikes = True
    for i in range(words.size):
        row = load_row(x[first + i * stride : first + i * stride + E], buffer)
        words[i], own = pack_row(row, mask.size > 0 and mask[at + i])
        spikes &= own
    return spikes


@inline
def pack_columns(columns, x, first, stride, tokens, E, mask, at, buffer):
    """``columns[j // 64, e]`` holds token j in bit j % 64, zero at padding; whether they hold 0 and 1 only."""
    spikes = True
    columns[:] = U(0)
    for j in range(tokens):
        row = load_row(x[first + j * stride : first + j * stride + E], buffer)
        spikes &= add_column_bits(columns[j // WORD], row, j % WORD, mask.size > 0 and mask[at + j])
    return spikes


@inline
def count_row(query, keys, counts):
    """Counts of channels that fire in a query and in each key."""
    for j in range(counts.size):
        counts[j] = count_bits(query & keys[j])


@inline
def plane_word(counts, plane):
    """Bit ``plane`` of each count, in one word."""
    word = U(0)
    for j in range(counts.size):
        word |= ((counts[j] >> U(plane)) & U(1)) << U(j)
    return word


@inline
def add_plane(sums, word, columns, plane):
    """Add ``2^plane`` times the tokens that are set in ``word`` and in each channel's column."""
    for e in range(sums.size):
        sums[e] += count_bits(word & columns[e]) << U(plane)


@inline
def attend_row(sums, query, keys, columns, seen, planes, counts):
    """``sums[e]``: over the first ``seen`` tokens, channels shared by query and key, times bit e of the value."""
    sums[:] = U(0)
    for begin in range(0, seen, WORD):
        own = counts[: min(WORD, seen - begin)]
        count_row(query, keys[begin : begin + own.size], own)
        for plane in range(planes):
            add_plane(sums, plane_word(own, plane), columns[begin // WORD], plane)
