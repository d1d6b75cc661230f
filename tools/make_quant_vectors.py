#!/usr/bin/env python3
"""Writes tests/data/quant/*.bin: what the reference makes of some weight blocks.

Run by hand, from the root of the repository, when a format is added:

    pip install gguf numpy
    python3 tools/make_quant_vectors.py --ggml path/to/libggml-base.so

decode.bin   blocks and the floats that they decode to, by the `gguf` package's Python code. With --ggml,
             llama.cpp's own code is asked as well, and must agree bit for bit.
encode.bin   rows of floats, importance weights, and the blocks that llama.cpp's quantizer makes of them,
             without and with the weights. Only with --ggml: Python has no code for most formats.
             The library must be a build without fused multiply-add in ggml-quants.c, which is what
             cmake makes for x86-64 (`libggml-base` is compiled for the baseline CPU).

Both are little-endian sequences of records.
decode.bin:  u32 type id, u32 bytes, u32 floats, the bytes, the floats.
encode.bin:  u32 rows, u32 row length, u32 types, the rows, one row of importance weights; then of each
             type u32 type id, u32 bytes, the blocks of all rows without weights, and with.
"""

import argparse
import ctypes
import os
import struct

import gguf
import numpy as np
from gguf import GGMLQuantizationType as T

# Where the f16 numbers of a block lie.
F16_AT = {
    T.F16: [0],
    T.Q4_0: [0],
    T.Q4_1: [0, 2],
    T.Q5_0: [0],
    T.Q5_1: [0, 2],
    T.Q8_0: [0],
    T.Q2_K: [80, 82],
    T.Q3_K: [108],
    T.Q4_K: [0, 2],
    T.Q5_K: [0, 2],
    T.Q6_K: [208],
    T.IQ4_NL: [0],
    T.IQ4_XS: [0],
    T.BF16: [],
}

# Zero, minus zero, the smallest and the largest denormal, one, the largest, and negatives of some.
EDGES = [0x0000, 0x8000, 0x0001, 0x83FF, 0x3C00, 0x7BFF, 0xFBFF, 0xB801]


class Ggml:
    """The few functions of libggml-base that are needed."""

    def __init__(self, path):
        self.lib = ctypes.CDLL(path)
        self.lib.ggml_quantize_chunk.restype = ctypes.c_size_t

    def decode(self, t, raw, n):
        """raw: whole blocks of type t, n weights -> n floats."""
        out = np.empty(n, np.float32)
        name = {T.IQ4_NL: "iq4_nl", T.IQ4_XS: "iq4_xs"}.get(t, t.name[0].lower() + t.name[1:])
        fun = getattr(self.lib, "dequantize_row_" + name)
        fun(
            ctypes.c_char_p(raw),
            out.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_int64(n),
        )
        return out

    def encode(self, t, rows, weights):
        """rows: (n, k) floats, weights: (k) or None -> bytes."""
        n, k = rows.shape
        per, size = gguf.GGML_QUANT_SIZES[t]
        out = ctypes.create_string_buffer(n * k // per * size)
        pointer = weights.ctypes.data_as(ctypes.c_void_p) if weights is not None else None
        wrote = self.lib.ggml_quantize_chunk(
            ctypes.c_int(t.value),
            rows.ctypes.data_as(ctypes.c_void_p),
            out,
            ctypes.c_int64(0),
            ctypes.c_int64(n),
            ctypes.c_int64(k),
            pointer,
        )
        assert wrote == len(out.raw)
        return out.raw


def same(a, b):
    return np.array_equal(a.view(np.uint32), b.view(np.uint32))


def decode_blocks(t, rng):
    """Random blocks with scales of a usual size, then edges."""
    size = gguf.GGML_QUANT_SIZES[t][1]
    blocks = []
    for _ in range(6):
        b = bytearray(rng.bytes(size))
        for at in F16_AT[t]:
            b[at : at + 2] = np.float16(rng.normal() * 0.02).tobytes()
        blocks.append(b)
    if t == T.BF16:
        blocks += [struct.pack("<H", e) for e in EDGES]
        return b"".join(bytes(b) for b in blocks)
    for i, e in enumerate(EDGES):
        fill = [rng.bytes(size), b"\xff" * size, b"\x00" * size][i % 3]
        b = bytearray(fill)
        for j, at in enumerate(F16_AT[t]):
            b[at : at + 2] = struct.pack("<H", EDGES[(i + 3 * j) % len(EDGES)])
        blocks.append(b)
    return b"".join(bytes(b) for b in blocks)


def rows(k, rng):
    """Rows of k floats of every character: (n, k)."""
    sub = k // 16
    x = [
        rng.normal(size=k) * 0.02,
        rng.standard_t(2, size=k) * 0.01,
        rng.uniform(0, 1, size=k),
        -rng.uniform(0, 1, size=k),
        5 + rng.normal(size=k) * 0.01,
        rng.normal(size=k) * (rng.random(k) < 0.05),
        rng.integers(-8, 9, size=k),  # many equal magnitudes
        np.full(k, -0.37),
        np.zeros(k),
        rng.normal(size=k) * 1e-7,  # scales below the smallest f16
        rng.normal(size=k) * 1e-14,  # around what counts as zero
        rng.normal(size=k) * 1e-39,  # denormal, with infinite inverses
        rng.normal(size=k) * 1e7,  # scales beyond the largest f16
        rng.normal(size=k) * 10.0 ** rng.integers(-9, 1, size=sub).repeat(16),
    ]
    return np.array(x, np.float32)


def negative_scale():
    """Two rows and an importance with many zeros, for which Q5_K's search finds a negative scale in the
    second row. Happens to one in 40,000 such rows; found by trying seeds."""
    rng = np.random.default_rng(82)
    x = rng.normal(size=(512, 256)) * (rng.random((512, 256)) < 0.05)
    w = rng.random(256) * (rng.random(256) < 0.4)
    return x[54:56].astype(np.float32), w.astype(np.float32)


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    args.add_argument("--ggml", help="llama.cpp's libggml-base.so")
    args.add_argument("--out", default="tests/data/quant")
    args = args.parse_args()
    rng = np.random.default_rng(20261121)
    ggml = Ggml(args.ggml) if args.ggml else None

    with open(os.path.join(args.out, "decode.bin"), "wb") as f:
        for t in F16_AT:
            raw = decode_blocks(t, rng)
            x = gguf.quants.dequantize(np.frombuffer(raw, np.uint8), t).astype(np.float32).ravel()
            if ggml and t not in (T.F16, T.BF16):
                assert same(x, ggml.decode(t, raw, len(x))), f"{t.name}: gguf-py and ggml disagree"
                print(f"{t.name}: {len(x)} weights, gguf-py and ggml agree")
            f.write(struct.pack("<III", t.value, len(raw), len(x)) + raw + x.tobytes())

    if not ggml:
        return
    with open(os.path.join(args.out, "encode.bin"), "wb") as f:
        sets = []
        for k in (256, 96):
            w = rng.random(k) ** 4 * (rng.random(k) < 0.9)
            sets.append((rows(k, rng), w.astype(np.float32)))
        sets.append(negative_scale())
        for x, w in sets:
            k = len(w)
            types = [t for t in F16_AT if k % gguf.GGML_QUANT_SIZES[t][0] == 0]
            f.write(struct.pack("<III", len(x), k, len(types)) + x.tobytes() + w.tobytes())
            for t in types:
                plain, weighted = ggml.encode(t, x, None), ggml.encode(t, x, w)
                f.write(struct.pack("<II", t.value, len(plain)) + plain + weighted)


if __name__ == "__main__":
    main()
