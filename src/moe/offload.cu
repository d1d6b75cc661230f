// The kernels of `offload/gpu.rs` and `offload/layers.rs`, compiled for the device that is found (CUDA C++, by NVRTC), and by a C++ compiler
// for the tests (`offload/emulated.h`).
//
// They keep the promise of one answer: the integer part of a product is exact in any order, and the float part is done
// in the order of `quant/mod.rs`: one accumulator for each output, blocks in ascending order, fused where that says
// `mul_add` and not fused elsewhere. So this file must be compiled without contraction (--fmad=false) and with
// IEEE division. Their results are the CPU's, bit for bit.
//
// A row of weights is worked through in groups of 32 weights, whatever its format's block is.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define WARP 32
#define ALL 0xffffffffu
#define CHUNK 256

#ifndef EMULATED
#define KERNEL(name, ...) extern "C" __global__ void __launch_bounds__(128) name(__VA_ARGS__)
#if __CUDA_ARCH__ >= 800
#define MMA
// Tensor cores: 16 rows, 8 tokens, 32 or 16 products each; see `tile`.
__device__ __forceinline__ void mma_32(int c[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma_16(int c[4], u32 a0, u32 a1, u32 b0) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                 : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
                 : "r"(a0), "r"(a1), "r"(b0));
}
#endif
#endif

// `Chunk` of quant/act.rs: activations of one token, `(k / 256, n_tok)`.
struct __align__(64) Chunk {
    signed char qs[CHUNK];
    float d[CHUNK / 32];
    short sums[CHUNK / 16];
    short halves[CHUNK / 8];
};

// One row of work: a token and what it is multiplied with. `Row` of offload/gpu.rs.
struct Row {
    const u8 *gate, *up, *down;
    // Where the token is in the input of `gate` and `up`, and in that of `down`.
    u32 token, inner;
};

// A pass that stays on the device stops at a layer whose experts are not all there: `route` says so in `stop`, by a layer's number
// from 1 on, and the kernels that were launched ahead do nothing then, but those of that layer's experts, whose own `layer` it
// is. Null: nothing stops it. The same for all threads of a kernel.
__device__ __forceinline__ bool stopped(const int *stop, int layer) {
    int at = stop ? *stop : 0;
    return at != 0 && at != layer;
}

// f16 to f32, exact: what `Element::widen` of quant/float.rs does.
__device__ __forceinline__ float widen(u16 bits) {
    u32 magnitude = (u32)(bits & 0x7fff) << 13;
    float scaled = __uint_as_float(magnitude) * __uint_as_float(0x77800000u);
    u32 special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
    return __uint_as_float(__float_as_uint(scaled) | special | (u32)(bits & 0x8000) << 16);
}

// Blocks of 18, 34 and 210 bytes are aligned to 2 only.
__device__ __forceinline__ u32 word2(const void *at) {
    const u16 *h = (const u16 *)at;
    return (u32)h[0] | (u32)h[1] << 16;
}

// Each byte less `by`, wrapping; bytes are below 128.
__device__ __forceinline__ u32 lower(u32 bytes, u32 by) {
    return ((bytes | 0x80808080u) - by * 0x01010101u) ^ 0x80808080u;
}

// What is known of a format: `WEIGHTS` and `BYTES` of a block; `SUB`, the weights that share a sub-scale (32 where there is
// none); `MIN`, whether there are minimums. `ints`: group `g` of a row as int8. `sub`: its scales of 16 weights each, and its
// minimum. `scale` and `min`: the floats of the block.

// Blocks of 32 weights with a scale.
template <int SIZE>
struct Of32 {
    static const int WEIGHTS = 32, BYTES = SIZE, SUB = 32;
    static const bool MIN = false;
    static __device__ __forceinline__ void sub(const u8 *, int, int &s0, int &s1, int &m) { s0 = s1 = 1, m = 0; }
    static __device__ __forceinline__ float scale(const u8 *row, int b) { return widen(*(const u16 *)(row + b * BYTES)); }
    static __device__ __forceinline__ float min(const u8 *, int) { return 0.0f; }
};

struct Q4_0 : Of32<18> {
    static __device__ __forceinline__ void ints(const u8 *row, int g, u32 q[8]) {
        const u8 *b = row + g * BYTES + 2;
        for (int i = 0; i < 4; i++) {
            u32 v = word2(b + 4 * i);
            q[i] = lower(v & 0x0f0f0f0fu, 8);
            q[i + 4] = lower(v >> 4 & 0x0f0f0f0fu, 8);
        }
    }
};

struct Q8_0 : Of32<34> {
    static __device__ __forceinline__ void ints(const u8 *row, int g, u32 q[8]) {
        const u8 *b = row + g * BYTES + 2;
        for (int i = 0; i < 8; i++) q[i] = word2(b + 4 * i);
    }
};

// `scale_min` of quant/q4_k.rs.
__device__ __forceinline__ void scale_min(const u8 *scales, int s, int &scale, int &min) {
    if (s < 4) {
        scale = scales[s] & 63;
        min = scales[s + 4] & 63;
    } else {
        scale = (scales[s + 4] & 15) | scales[s - 4] >> 6 << 4;
        min = scales[s + 4] >> 4 | scales[s] >> 6 << 4;
    }
}

// Blocks of 256 weights with two f16 scales, then 6-bit ones of sub-blocks of 32 and minimums.
template <int SIZE>
struct WithMins {
    static const int WEIGHTS = 256, BYTES = SIZE, SUB = 32;
    static const bool MIN = true;
    static __device__ __forceinline__ void sub(const u8 *row, int g, int &s0, int &s1, int &m) {
        scale_min(row + g / 8 * BYTES + 4, g % 8, s0, m);
        s1 = s0;
    }
    static __device__ __forceinline__ float scale(const u8 *row, int b) { return widen(*(const u16 *)(row + b * BYTES)); }
    static __device__ __forceinline__ float min(const u8 *row, int b) { return -widen(*(const u16 *)(row + b * BYTES + 2)); }
};

struct Q4_K : WithMins<144> {
    static __device__ __forceinline__ void ints(const u8 *row, int g, u32 q[8]) {
        const uint4 *b = (const uint4 *)(row + g / 8 * BYTES + 16 + g % 8 / 2 * 32);
        int shift = 4 * (g & 1);
        uint4 lo = b[0], hi = b[1];
        q[0] = lo.x >> shift & 0x0f0f0f0fu, q[1] = lo.y >> shift & 0x0f0f0f0fu;
        q[2] = lo.z >> shift & 0x0f0f0f0fu, q[3] = lo.w >> shift & 0x0f0f0f0fu;
        q[4] = hi.x >> shift & 0x0f0f0f0fu, q[5] = hi.y >> shift & 0x0f0f0f0fu;
        q[6] = hi.z >> shift & 0x0f0f0f0fu, q[7] = hi.w >> shift & 0x0f0f0f0fu;
    }
};

struct Q5_K : WithMins<176> {
    static __device__ __forceinline__ void ints(const u8 *row, int g, u32 q[8]) {
        const u8 *b = row + g / 8 * BYTES;
        const u32 *high = (const u32 *)(b + 16), *low = (const u32 *)(b + 48 + g % 8 / 2 * 32);
        int shift = 4 * (g & 1), bit = g % 8;
        for (int i = 0; i < 8; i++) q[i] = (low[i] >> shift & 0x0f0f0f0fu) | (high[i] >> bit & 0x01010101u) << 4;
    }
};

struct Q6_K {
    static const int WEIGHTS = 256, BYTES = 210, SUB = 16;
    static const bool MIN = false;
    static __device__ __forceinline__ void ints(const u8 *row, int g, u32 q[8]) {
        const u8 *b = row + g / 8 * BYTES;
        int half = g % 8 / 4, part = g % 4;
        const u8 *low = b + 64 * half + 32 * (part & 1), *high = b + 128 + 32 * half;
        int shift = 4 * (part >> 1), bit = 2 * part;
        for (int i = 0; i < 8; i++) {
            u32 v = (word2(low + 4 * i) >> shift & 0x0f0f0f0fu) | (word2(high + 4 * i) >> bit & 0x03030303u) << 4;
            q[i] = lower(v, 32);
        }
    }
    static __device__ __forceinline__ void sub(const u8 *row, int g, int &s0, int &s1, int &m) {
        const signed char *s = (const signed char *)(row + g / 8 * BYTES + 192) + g % 8 * 2;
        s0 = s[0], s1 = s[1], m = 0;
    }
    static __device__ __forceinline__ float scale(const u8 *row, int b) {
        return widen(*(const u16 *)(row + b * BYTES + 208));
    }
    static __device__ __forceinline__ float min(const u8 *, int) { return 0.0f; }
};

// `exp` of simd/float.rs, unfused.
__device__ __forceinline__ float exp_(float x) {
    const float ROUND = 12582912.0f;
    float c = x > 88.0f ? 88.0f : x;
    c = c < -87.0f ? -87.0f : c;
    float rounded = c * 1.44269504f + ROUND;
    float n = rounded - ROUND;
    float r = (c - n * 0.6933594f) - n * -2.1219444e-4f;
    float p = 1.9875692e-4f;
    p = p * r + 1.3982e-3f;
    p = p * r + 8.333452e-3f;
    p = p * r + 4.1665796e-2f;
    p = p * r + 1.6666665e-1f;
    p = p * r + 0.5f;
    float y = (p * (r * r) + r) + 1.0f;
    float scale = __uint_as_float((__float_as_uint(rounded) << 23) + 0x3f800000u);
    return x < -87.0f ? 0.0f : y * scale;
}

__device__ __forceinline__ float silu_mul(float g, float u) { return g / (1.0f + exp_(-g)) * u; }

// `quantize` of quant/act.rs for one chunk, which a warp takes: a lane has 8 values, which lie in one block. Of a block of 32 four
// lanes have values, of one of 256 all of them. `mine`: there are values for this lane.
template <int PER>
__device__ __forceinline__ void pack(const float v[8], bool mine, Chunk *chunk) {
    int lane = threadIdx.x % WARP;
    float max = 0.0f;
    for (int j = 0; j < 8; j++) {
        float a = fabsf(v[j]);
        max = a > max ? a : max;
    }
    for (int step = 1; step < PER / 8; step *= 2) {
        float other = __shfl_xor_sync(ALL, max, step);
        max = other > max ? other : max;
    }
    float d = max / 127.0f, inv = max > 0.0f ? 127.0f / max : 0.0f;
    int sum = 0;
    u32 q[2] = {0, 0};
    for (int j = 0; j < 8; j++) {
        signed char b = (signed char)__float_as_uint(v[j] * inv + 12582912.0f);
        sum += b;
        q[j / 4] |= (u32)(u8)b << 8 * (j % 4);
    }
    int both = sum + __shfl_xor_sync(ALL, sum, 1);
    if (!mine) return;
    ((u32 *)chunk->qs)[2 * lane] = q[0];
    ((u32 *)chunk->qs)[2 * lane + 1] = q[1];
    chunk->halves[lane] = (short)sum;
    if (lane % 2 == 0) chunk->sums[lane / 2] = (short)both;
    if (lane % (PER / 8) == 0) chunk->d[lane / (PER / 8)] = d;
}

// x (n, k) floats to chunks (k / 256, n), a scale for every `PER` values.
template <int PER>
__device__ __forceinline__ void quantize(const float *x, Chunk *out, int n, int k, const int *stop, int layer) {
    if (stopped(stop, layer)) return;
    int i = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, t = blockIdx.y;
    if (i * CHUNK >= k) return;
    float v[8];
    int at = i * CHUNK + 8 * (threadIdx.x % WARP);
    for (int j = 0; j < 8; j++) v[j] = at < k ? x[(u64)t * k + at + j] : 0.0f;
    pack<PER>(v, at < k, out + (u64)i * n + t);
}

// The sum of the 32 activations of group `g` of a token, which are in `chunk`.
__device__ __forceinline__ int sum_of_32(const Chunk *chunk, int g) {
    const short *s = chunk->sums + g % 8 * 2;
    return s[0] + s[1];
}

// The activations' scale for block `b` of F.
template <class F>
__device__ __forceinline__ float act_scale(const Chunk *chunk, int b) {
    return F::WEIGHTS == 32 ? chunk->d[b % 8] : chunk->d[0];
}

// What one block adds to an output: `Terms` of quant/mod.rs, scales multiplied.
template <class F>
struct Term {
    float d;
    int isum;
};

// C chains of additions, each one row of weights with one token: the token's activations are shared. The warp goes through
// all groups of 32 weights, a lane a group; then lane c adds chain c's blocks up in their order.
//
// rows[c]: its weights; x: the token's first chunk; n: from a chunk of the token to its next; shared: C x TERMS terms, twice
// with minimums. Returns chain `lane`'s sum in lanes below C.
#define TERMS (WARP + 1) // one more than there are, so that chains fall on different banks

template <class F, int C>
__device__ __forceinline__ float chains(const u8 *const rows[C], const Chunk *x, int n, int k, Term<F> *shared) {
    int lane = threadIdx.x % WARP, groups = k / 32;
    const int PER = F::WEIGHTS / 32;
    float acc = 0.0f;
    for (int first = 0; first < groups; first += WARP) {
        int g = first + lane, b = g / PER;
        bool mine = g < groups;
        const Chunk *chunk = x + (u64)(mine ? g / 8 : 0) * n;
        u32 a[8];
        int sum0 = 0;
        float d_x = 0.0f;
        if (mine) {
            const uint4 *q = (const uint4 *)(chunk->qs + g % 8 * 32);
            uint4 lo = q[0], hi = q[1];
            a[0] = lo.x, a[1] = lo.y, a[2] = lo.z, a[3] = lo.w, a[4] = hi.x, a[5] = hi.y, a[6] = hi.z, a[7] = hi.w;
            if (F::MIN) sum0 = sum_of_32(chunk, g);
            d_x = act_scale<F>(chunk, b);
        }
#pragma unroll
        for (int c = 0; c < C; c++) {
            int isum = 0, msum = 0;
            if (mine) {
                u32 q[8];
                int s0, s1, m, low = 0, high = 0;
                F::ints(rows[c], g, q);
                F::sub(rows[c], g, s0, s1, m);
                for (int i = 0; i < 4; i++) {
                    low = __dp4a((int)q[i], (int)a[i], low);
                    high = __dp4a((int)q[i + 4], (int)a[i + 4], high);
                }
                isum = s0 * low + s1 * high;
                msum = m * sum0;
            }
            for (int step = 1; step < PER; step *= 2) {
                isum += __shfl_xor_sync(ALL, isum, step);
                if (F::MIN) msum += __shfl_xor_sync(ALL, msum, step);
            }
            if (mine && lane % PER == 0) {
                Term<F> *to = shared + c * TERMS + lane / PER;
                to->d = F::scale(rows[c], b) * d_x;
                to->isum = isum;
                if (F::MIN) {
                    to += C * TERMS;
                    to->d = F::min(rows[c], b) * d_x;
                    to->isum = msum;
                }
            }
        }
        __syncwarp();
        if (lane < C) {
            int blocks = (groups - first < WARP ? groups - first : WARP) / PER;
            const Term<F> *term = shared + lane * TERMS;
            for (int i = 0; i < blocks; i++) {
                acc = fmaf(term[i].d, (float)term[i].isum, acc);
                if (F::MIN) acc = fmaf(term[i + C * TERMS].d, (float)term[i + C * TERMS].isum, acc);
            }
        }
        __syncwarp();
    }
    return acc;
}

#define WARPS 4

// inner[i][r] = silu(gate_i[r] . x) * (up_i[r] . x) for work row i = blockIdx.y and the 4 output rows of each warp.
// x: chunks (d / 256, n_tok); inner: (rows, d_ff).
template <class F>
__device__ __forceinline__ void expert_up(const Row *table, const Chunk *x, float *inner, int n_tok, int d, int d_ff,
                                          const int *stop, int layer) {
    const int R = 4;
    __shared__ Term<F> shared[WARPS][2 * R * TERMS * (F::MIN ? 2 : 1)];
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    int first = (blockIdx.x * WARPS + warp) * R;
    if (first >= d_ff || stopped(stop, layer)) return;
    Row row = table[blockIdx.y];
    if (!row.gate) return; // An expert that is not here.
    u64 bytes = (u64)(d / F::WEIGHTS) * F::BYTES;
    const u8 *rows[2 * R];
#pragma unroll
    for (int c = 0; c < R; c++) {
        // The last rows are done twice rather than left out.
        u64 at = (u64)(first + c < d_ff ? first + c : d_ff - 1) * bytes;
        rows[c] = row.gate + at;
        rows[c + R] = row.up + at;
    }
    float sum = chains<F, 2 * R>(rows, x + row.token, n_tok, d, shared[warp]);
    float up = __shfl_down_sync(ALL, sum, R);
    if (lane < R && first + lane < d_ff) inner[(u64)blockIdx.y * d_ff + first + lane] = silu_mul(sum, up);
}

// y[r] = w[r] . x for the 4 output rows of each warp. w: (m, k); x: the token's first chunk.
template <class F>
__device__ __forceinline__ void product(const u8 *w, const Chunk *x, float *y, int n_tok, int k, int m) {
    const int R = 4;
    __shared__ Term<F> shared[WARPS][R * TERMS * (F::MIN ? 2 : 1)];
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    int first = (blockIdx.x * WARPS + warp) * R;
    if (first >= m) return;
    u64 bytes = (u64)(k / F::WEIGHTS) * F::BYTES;
    const u8 *rows[R];
#pragma unroll
    for (int c = 0; c < R; c++) rows[c] = w + (u64)(first + c < m ? first + c : m - 1) * bytes;
    float sum = chains<F, R>(rows, x, n_tok, k, shared[warp]);
    if (lane < R && first + lane < m) y[first + lane] = sum;
}

// out[i] = w_i . x_i for work row i = blockIdx.y; w is `down` of the row, x its token `inner`. x: chunks (k / 256, n_tok); out:
// (rows, m).
template <class F>
__device__ __forceinline__ void gemv(const Row *table, const Chunk *x, float *out, int n_tok, int k, int m, const int *stop,
                                     int layer) {
    if (stopped(stop, layer)) return;
    Row row = table[blockIdx.y];
    if (!row.down) return;
    product<F>(row.down, x + row.inner, out + (u64)blockIdx.y * m, n_tok, k, m);
}

// c += a . b for a tile of 16 rows, 8 tokens and K = 16 or 32 products each, in int8: rows of a (16) and of b (8) are K / 4
// words, `stride` words apart. Lane l has the outputs of row l / 4 (c[0], c[1]) and l / 4 + 8 (c[2], c[3]), of tokens
// 2 (l % 4) and the next (PTX ISA, "Matrix fragments for mma.m16n8k32").
template <int K>
__device__ __forceinline__ void tile(int c[4], const u32 *a, const u32 *b, int stride) {
    int lane = threadIdx.x % WARP, group = lane / 4, in = lane % 4;
#if defined(MMA)
    if (K == 32)
        mma_32(c, a[group * stride + in], a[(group + 8) * stride + in], a[group * stride + in + 4],
               a[(group + 8) * stride + in + 4], b[group * stride + in], b[group * stride + in + 4]);
    else
        mma_16(c, a[group * stride + in], a[(group + 8) * stride + in], b[group * stride + in]);
#else
    for (int i = 0; i < 4; i++) {
        const u32 *w = a + (group + i / 2 * 8) * stride, *x = b + (2 * in + i % 2) * stride;
        for (int j = 0; j < K / 4; j++) c[i] = __dp4a((int)w[j], (int)x[j], c[i]);
    }
#endif
}

// y[i][r] = w[r] . x[pick[i]] for many tokens of one expert.
//
// w: (m, k); x: chunks (k / 256, n_tok); pick: (n), or null for 0..n, counted from `base`; y: (n, m). A block makes TILE x TILE
// outputs, its 4 warps 32 x 32 each; weights and activations of one group of 32 are in shared memory at a time.
#define TILE 64
#define STRIDE 12 // words: 8 and a gap, so that rows fall on different banks

template <class F>
__device__ __forceinline__ void gemm(const u8 *w, const Chunk *x, const u32 *pick, int base, float *y, int n_tok, int n,
                                     int m, int k) {
    __shared__ u32 ws[TILE * STRIDE], xs[TILE * STRIDE];
    // Of each row of weights: block scale, block minimum, sub-scales, sub-minimum; of each token: scale, sum.
    __shared__ float wd[TILE], wm[TILE], xd[TILE];
    __shared__ int w0[TILE], w1[TILE], wmin[TILE], xsum[TILE];
    const int PER = F::WEIGHTS / 32;
    int t = threadIdx.x, lane = t % WARP, warp = t / WARP;
    int r0 = blockIdx.x * TILE, t0 = blockIdx.y * TILE;
    u64 bytes = (u64)(k / F::WEIGHTS) * F::BYTES;
    int half = t % TILE;
    int r = r0 + half < m ? r0 + half : m - 1;
    int i = t0 + half < n ? t0 + half : n - 1;
    u32 token = pick ? pick[i] : (u32)(base + i);
    int mr = warp % 2 * 32, mt = warp / 2 * 32;

    float acc[2][4][4];
    int isum[2][4][4], msum[2][4][4];
#pragma unroll
    for (int a = 0; a < 2; a++)
#pragma unroll
        for (int b = 0; b < 4; b++)
#pragma unroll
            for (int c = 0; c < 4; c++) acc[a][b][c] = 0.0f, isum[a][b][c] = 0, msum[a][b][c] = 0;

    for (int g = 0; g < k / 32; g++) {
        if (t < TILE) {
            const u8 *row = w + (u64)r * bytes;
            u32 q[8];
            F::ints(row, g, q);
            for (int j = 0; j < 8; j++) ws[half * STRIDE + j] = q[j];
            F::sub(row, g, w0[half], w1[half], wmin[half]);
            wd[half] = F::scale(row, g / PER);
            wm[half] = F::min(row, g / PER);
        } else {
            const Chunk *chunk = x + (u64)(g / 8) * n_tok + token;
            const u32 *q = (const u32 *)(chunk->qs + g % 8 * 32);
            for (int j = 0; j < 8; j++) xs[half * STRIDE + j] = q[j];
            xd[half] = act_scale<F>(chunk, g / PER);
            xsum[half] = sum_of_32(chunk, g);
        }
        __syncthreads();
#pragma unroll
        for (int a = 0; a < 2; a++)
#pragma unroll
            for (int b = 0; b < 4; b++) {
                const u32 *rows = ws + (mr + 16 * a) * STRIDE, *tokens = xs + (mt + 8 * b) * STRIDE;
                int low[4] = {0, 0, 0, 0}, high[4] = {0, 0, 0, 0};
                if (F::SUB == 32) {
                    tile<32>(low, rows, tokens, STRIDE);
                } else {
                    tile<16>(low, rows, tokens, STRIDE);
                    tile<16>(high, rows + 4, tokens + 4, STRIDE);
                }
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    int row = mr + 16 * a + lane / 4 + c / 2 * 8, tok = mt + 8 * b + lane % 4 * 2 + c % 2;
                    if (PER == 1) {
                        acc[a][b][c] = fmaf(wd[row] * xd[tok], (float)low[c], acc[a][b][c]);
                        continue;
                    }
                    isum[a][b][c] += w0[row] * low[c] + (F::SUB == 16 ? w1[row] * high[c] : 0);
                    if (F::MIN) msum[a][b][c] += wmin[row] * xsum[tok];
                    if (g % PER == PER - 1) {
                        acc[a][b][c] = fmaf(wd[row] * xd[tok], (float)isum[a][b][c], acc[a][b][c]);
                        if (F::MIN) acc[a][b][c] = fmaf(wm[row] * xd[tok], (float)msum[a][b][c], acc[a][b][c]);
                        isum[a][b][c] = msum[a][b][c] = 0;
                    }
                }
            }
        __syncthreads();
    }
#pragma unroll
    for (int a = 0; a < 2; a++)
#pragma unroll
        for (int b = 0; b < 4; b++)
#pragma unroll
            for (int c = 0; c < 4; c++) {
                int row = r0 + mr + 16 * a + lane / 4 + c / 2 * 8, tok = t0 + mt + 8 * b + lane % 4 * 2 + c % 2;
                if (row < m && tok < n) y[(u64)tok * m + row] = acc[a][b][c];
            }
}

// What a pass does besides, when it stays on the device. Each of these does what the function of the CPU does that it names, in
// the same order, for rows of tokens.

#define LANES 16
#define KV_BLOCK 64
#define MOST_EXPERTS 64

// The sum of 16 neighbouring lanes in the fixed tree of `fold` (quant/float.rs), in the first of them. For whole warps.
__device__ __forceinline__ float fold(float mine) {
    for (int half = LANES / 2; half > 0; half /= 2) mine = mine + __shfl_down_sync(ALL, mine, half);
    return mine;
}

// x += add, where there is something to add, and h = norm(x) * w (`add` and `rms_norm` of simd/float.rs), as floats and, where there
// is room for that, as activations. A block takes row `pick[blockIdx.x]`, or blockIdx.x, of x (n_tok, d); add, h: (rows, d); q8, q8k:
// chunks (d / 256, rows).
__device__ __forceinline__ void norm(float *x, const float *add, const u32 *pick, const float *w, float eps, float *h, Chunk *q8,
                                     Chunk *q8k, int d) {
    __shared__ float shared;
    int t = threadIdx.x;
    float *mine = x + (u64)(pick ? pick[blockIdx.x] : blockIdx.x) * d;
    if (add) {
        for (int i = t; i < d; i += blockDim.x) mine[i] = mine[i] + add[(u64)blockIdx.x * d + i];
        __syncthreads();
    }
    if (t < WARP) {
        float sum = 0.0f;
#pragma unroll 8
        for (int i = t; t < LANES && i < d; i += LANES) sum = fmaf(mine[i], mine[i], sum);
        sum = fold(sum);
        if (t == 0) shared = 1.0f / sqrtf(sum / (float)d + eps);
    }
    __syncthreads();
    float scale = shared;
    for (int i = t; i < d; i += blockDim.x) h[(u64)blockIdx.x * d + i] = mine[i] * scale * w[i];
    if (!q8 && !q8k) return;
    for (int i = t / WARP; i * CHUNK < d; i += blockDim.x / WARP) {
        float v[8];
        int at = i * CHUNK + 8 * (t % WARP);
        for (int j = 0; j < 8; j++) v[j] = at < d ? mine[at + j] * scale * w[at + j] : 0.0f;
        u64 chunk = (u64)i * gridDim.x + blockIdx.x;
        if (q8) pack<32>(v, at < d, q8 + chunk);
        if (q8k) pack<256>(v, at < d, q8k + chunk);
    }
}

// f32 to f16, half to even: `f16::from_f32_const`.
__device__ __forceinline__ u16 narrow(float x) {
    u32 bits = __float_as_uint(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude >= 0x7f800000u) {
        u32 mantissa = magnitude & 0x007fffffu;
        return (u16)(sign | 0x7c00u | (mantissa ? 0x0200u : 0u) | mantissa >> 13);
    }
    if (magnitude >= 0x47800000u) return (u16)(sign | 0x7c00u); // 2^16 and more
    if (magnitude < 0x33000000u) return (u16)sign; // less than half of the smallest
    // What is shifted out: 13 bits, and one more for each power of two below the smallest normal number.
    int exponent = (int)(magnitude >> 23) - 112;
    u32 mantissa = (magnitude & 0x007fffffu) | (exponent > 0 ? 0u : 0x00800000u);
    int shift = exponent > 0 ? 13 : 14 - exponent;
    u32 half = mantissa >> shift, rest = mantissa & ((1u << shift) - 1), middle = 1u << (shift - 1);
    if (exponent > 0) half |= (u32)exponent << 10;
    if (rest > middle || (rest == middle && (half & 1))) half++;
    return (u16)(sign | half);
}

// Where a token stands: its position, and where the addresses of its sequence's blocks begin in the list of all.
struct Place {
    u32 first, pos;
};

// `rope` of simd/float.rs; q is scaled, too; keys and values go to their place in the cache as f16, and to `fresh` once more,
// (2, n_tok, n_kv * d_head), for the host's own cache.
//
// A block takes one head (of queries, then keys, then values) of token blockIdx.y. q: (n_tok, n_head, d_head); k, v: (n_tok, n_kv,
// d_head); cosine, sine: (n_tok, n_rot / 2). At `layer` in a block of the cache are keys (n_kv, d_head, 64), then values (n_kv,
// 64, d_head).
__device__ __forceinline__ void rotate(float *q, const float *k, const float *v, const float *cosine, const float *sine,
                                       const Place *places, u8 *const *blocks, u64 layer, u16 *fresh, int n_tok, int n_head,
                                       int n_kv, int d_head, int n_rot, float scale) {
    int head = blockIdx.x, t = blockIdx.y;
    bool query = head < n_head, value = head >= n_head + n_kv;
    int kv = head - n_head - (value ? n_kv : 0);
    u64 row = query ? ((u64)t * n_head + head) * d_head : ((u64)t * n_kv + kv) * d_head;
    const float *from = (query ? q : value ? v : k) + row;
    Place place = places[t];
    u16 *plane = (u16 *)(blocks[place.first + place.pos / KV_BLOCK] + layer);
    int pos = place.pos % KV_BLOCK;
    for (int i = threadIdx.x; 2 * i < d_head; i += blockDim.x) {
        float a = from[2 * i], b = 2 * i + 1 < d_head ? from[2 * i + 1] : 0.0f;
        if (!value && 2 * i < n_rot) {
            float c = cosine[(u64)t * (n_rot / 2) + i], s = sine[(u64)t * (n_rot / 2) + i], old = a;
            a = a * c - b * s;
            b = old * s + b * c;
        }
        float pair[2] = {a, b};
#pragma unroll
        for (int j = 0; j < 2; j++) {
            int e = 2 * i + j;
            if (e >= d_head) break;
            if (query) {
                q[row + e] = pair[j] * scale;
                continue;
            }
            u16 narrowed = narrow(pair[j]);
            fresh[(value ? (u64)n_tok * n_kv * d_head : 0) + row + e] = narrowed;
            if (value)
                plane[(u64)n_kv * d_head * KV_BLOCK + ((u64)kv * KV_BLOCK + pos) * d_head + e] = narrowed;
            else
                plane[((u64)kv * d_head + e) * KV_BLOCK + pos] = narrowed;
        }
    }
}

// p[t][h][i] = q[t][h] . k[i], a chain of additions for each key (`scores` of simd/float.rs). A block takes one block of the cache,
// blockIdx.x, and the heads of one KV head of one token, blockIdx.y. p: (n_tok, n_head, room).
__device__ __forceinline__ void scores(const float *q, const Place *places, u8 *const *blocks, u64 layer, float *p, int n_head,
                                       int n_kv, int d_head, int room) {
    int t = blockIdx.y / n_kv, kv = blockIdx.y % n_kv, group = n_head / n_kv;
    int key = threadIdx.x % KV_BLOCK, first = blockIdx.x * KV_BLOCK;
    Place place = places[t];
    if (first > (int)place.pos) return;
    const u16 *k = (const u16 *)(blocks[place.first + blockIdx.x] + layer) + (u64)kv * d_head * KV_BLOCK + key;
    for (int h = threadIdx.x / KV_BLOCK; h < group; h += blockDim.x / KV_BLOCK) {
        u64 head = (u64)t * n_head + kv * group + h;
        const float *mine = q + head * d_head;
        float sum = 0.0f;
#pragma unroll 16
        for (int d = 0; d < d_head; d++) sum = fmaf(mine[d], widen(k[d * KV_BLOCK]), sum);
        p[head * room + first + key] = sum;
    }
}

// out[t][h] = softmax(p[t][h]) . v, block by block of the cache (`softmax` and `values` of simd/float.rs). A block takes head
// blockIdx.x of token blockIdx.y, a warp 32 of its elements: each warp makes the softmax for itself and waits for no other.
__device__ __forceinline__ void attend(const float *p, const Place *places, u8 *const *blocks, u64 layer, float *out, int n_head,
                                       int n_kv, int d_head, int room) {
    __shared__ float shared[WARPS][KV_BLOCK];
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, t = blockIdx.y, kv = blockIdx.x / (n_head / n_kv);
    u64 head = (u64)t * n_head + blockIdx.x;
    Place place = places[t];
    int seen = place.pos + 1;
    float *weights = shared[warp];
    for (int base = warp * WARP; base < d_head; base += WARPS * WARP) {
        int e = base + lane < d_head ? base + lane : d_head - 1;
        float most = __uint_as_float(0xff800000u), total = 0.0f, acc = 0.0f;
        for (int first = 0; first < seen; first += KV_BLOCK) {
            int n = seen - first < KV_BLOCK ? seen - first : KV_BLOCK;
            const u16 *v = (const u16 *)(blocks[place.first + first / KV_BLOCK] + layer) + (u64)n_kv * d_head * KV_BLOCK +
                           (u64)kv * KV_BLOCK * d_head + e;
            const float *mine = p + head * room + first;
            float low = lane < n ? mine[lane] : __uint_as_float(0xff800000u);
            float high = lane + WARP < n ? mine[lane + WARP] : __uint_as_float(0xff800000u);
            // A maximum is the same in any order; what is no number is none.
            float max = low > most ? low : most;
            max = high > max ? high : max;
            for (int step = 1; step < WARP; step *= 2) {
                float other = __shfl_xor_sync(ALL, max, step);
                max = other > max ? other : max;
            }
            float keep = exp_(most - max);
            low = exp_(low - max), high = exp_(high - max);
            weights[lane] = low, weights[lane + WARP] = high;
            // Lane i of 16 adds weights i, i + 16, i + 32, i + 48; then the tree.
            float sum = 0.0f + low;
            sum = sum + __shfl_down_sync(ALL, low, LANES);
            sum = sum + high;
            sum = sum + __shfl_down_sync(ALL, high, LANES);
            total = total * keep + __shfl_sync(ALL, fold(sum), 0);
            most = max;
            acc = acc * keep;
            __syncwarp();
            if (n == KV_BLOCK) {
#pragma unroll
                for (int i = 0; i < KV_BLOCK; i++) acc = fmaf(weights[i], widen(v[(u64)i * d_head]), acc);
            } else {
                for (int i = 0; i < n; i++) acc = fmaf(weights[i], widen(v[(u64)i * d_head]), acc);
            }
            __syncwarp();
        }
        if (base + lane < d_head) out[head * d_head + e] = acc / total;
    }
}

// A choice of the router: `Choice` of moe/router.rs.
struct Choice {
    u32 expert;
    float weight;
};

// `weight` of moe/router.rs.
__device__ __forceinline__ float likely(float logit, float max) {
    return logit != logit || max == __uint_as_float(0xff800000u) ? 0.0f : exp_(logit - max);
}

// The choices of token blockIdx.x, (n_tok, n_used), as `route` of moe/router.rs makes them of logits that `dots` of quant/float.rs
// makes. w: (n_expert, d); h: (n_tok, d).
//
// Where there is a table: its rows `token * n_used + rank`, from the addresses of the layer's experts, (n_expert, 3), which are 0
// where one is not here; then the pass stops.
__device__ __forceinline__ void route(const float *w, const float *h, Choice *choices, const u64 *experts, Row *table, int *stop,
                                      int layer, int d, int n_expert, int n_used) {
    const int EACH = WARPS * WARP / LANES;
    __shared__ float logits[MOST_EXPERTS];
    int t = blockIdx.x, which = threadIdx.x / LANES, lane = threadIdx.x % LANES;
    const float *x = h + (u64)t * d;
    for (int first = 0; first < n_expert; first += EACH) {
        int e = first + which < n_expert ? first + which : n_expert - 1;
        const float *row = w + (u64)e * d;
        float sum = 0.0f;
#pragma unroll 8
        for (int i = lane; i < d; i += LANES) sum = fmaf(row[i], x[i], sum);
        sum = fold(sum);
        if (lane == 0 && first + which < n_expert) logits[first + which] = sum;
    }
    __syncthreads();
    if (threadIdx.x != 0) return;
    float max = __uint_as_float(0xff800000u), total = 0.0f, sum = 0.0f;
    for (int e = 0; e < n_expert; e++) max = logits[e] > max ? logits[e] : max;
    for (int e = 0; e < n_expert; e++) total = total + likely(logits[e], max);
    Choice *mine = choices + (u64)t * n_used;
    u64 taken = 0;
    for (int rank = 0; rank < n_used; rank++) {
        int best = -1;
        float weight = 0.0f;
        for (int e = 0; e < n_expert; e++) {
            float p = likely(logits[e], max);
            if (!(taken >> e & 1) && (best < 0 || p > weight)) best = e, weight = p;
        }
        taken |= 1ull << best;
        mine[rank].expert = best;
        mine[rank].weight = weight / total;
        sum = sum + mine[rank].weight;
    }
    for (int rank = 0; rank < n_used; rank++) {
        mine[rank].weight = mine[rank].weight / sum;
        if (!table) continue;
        const u64 *at = experts + 3 * mine[rank].expert;
        Row row = {(const u8 *)at[0], (const u8 *)at[1], (const u8 *)at[2], (u32)t, (u32)(t * n_used + rank)};
        table[t * n_used + rank] = row;
        if (!row.gate) *stop = layer; // All that write here write the same.
    }
}

// x[t] += the sum of weight * row over the ranks, in their order (`add_scaled` of simd/float.rs), for token blockIdx.y. The row of
// a choice is `home[token * n_used + rank]` of `rows (n, d)`, or just that number.
__device__ __forceinline__ void combine(float *x, const Choice *choices, const float *rows, const u32 *home, int n_used, int d) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= d) return;
    float y = x[(u64)blockIdx.y * d + i];
    for (int rank = 0; rank < n_used; rank++) {
        u64 at = (u64)blockIdx.y * n_used + rank;
        y = y + choices[at].weight * rows[(home ? home[at] : at) * d + i];
    }
    x[(u64)blockIdx.y * d + i] = y;
}

// The kernels by name. Threads of a block: 128. `stop`, `layer`: see `stopped`.

KERNEL(quantize_32, const float *x, Chunk *out, int n, int k, const int *stop, int layer) {
    quantize<32>(x, out, n, k, stop, layer);
}
KERNEL(quantize_256, const float *x, Chunk *out, int n, int k, const int *stop, int layer) {
    quantize<256>(x, out, n, k, stop, layer);
}

// gate = silu(gate) * up, both (n).
KERNEL(silu_mul_all, float *gate, const float *up, u64 n) {
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (u64)gridDim.x * blockDim.x)
        gate[i] = silu_mul(gate[i], up[i]);
}

// Floats come as their bits.
KERNEL(norm_rows, float *x, const float *add, const u32 *pick, const float *w, u32 eps, float *h, Chunk *q8, Chunk *q8k, int d,
       const int *stop) {
    if (!stopped(stop, 0)) norm(x, add, pick, w, __uint_as_float(eps), h, q8, q8k, d);
}
KERNEL(rotate_heads, float *q, const float *k, const float *v, const float *cosine, const float *sine, const Place *places,
       u8 *const *blocks, u64 at, u16 *fresh, int n_tok, int n_head, int n_kv, int d_head, int n_rot, u32 scale,
       const int *stop) {
    if (stopped(stop, 0)) return;
    rotate(q, k, v, cosine, sine, places, blocks, at, fresh, n_tok, n_head, n_kv, d_head, n_rot, __uint_as_float(scale));
}
KERNEL(score_keys, const float *q, const Place *places, u8 *const *blocks, u64 at, float *p, int n_head, int n_kv, int d_head,
       int room, const int *stop) {
    if (!stopped(stop, 0)) scores(q, places, blocks, at, p, n_head, n_kv, d_head, room);
}
KERNEL(attend_values, const float *p, const Place *places, u8 *const *blocks, u64 at, float *out, int n_head, int n_kv,
       int d_head, int room, const int *stop) {
    if (!stopped(stop, 0)) attend(p, places, blocks, at, out, n_head, n_kv, d_head, room);
}
KERNEL(route_tokens, const float *w, const float *h, Choice *choices, const u64 *experts, Row *table, int *stop, int layer, int d,
       int n_expert, int n_used) {
    // Its own layer does not count: another block of this kernel may have written it already.
    if (!stopped(stop, layer)) route(w, h, choices, experts, table, stop, layer, d, n_expert, n_used);
}
KERNEL(combine_rows, float *x, const Choice *choices, const float *rows, const u32 *home, int n_used, int d, const int *stop) {
    if (!stopped(stop, 0)) combine(x, choices, rows, home, n_used, d);
}

#define FORMAT(F)                                                                                                        \
    KERNEL(expert_up_##F, const Row *table, const Chunk *x, float *inner, int n_tok, int d, int d_ff, const int *stop,   \
           int layer) {                                                                                                  \
        expert_up<F>(table, x, inner, n_tok, d, d_ff, stop, layer);                                                      \
    }                                                                                                                    \
    KERNEL(gemv_##F, const Row *table, const Chunk *x, float *out, int n_tok, int k, int m, const int *stop,             \
           int layer) {                                                                                                  \
        gemv<F>(table, x, out, n_tok, k, m, stop, layer);                                                                \
    }                                                                                                                    \
    /* y[t] = w . x[t] for token t = blockIdx.y; y: (n_tok, m). */                                                       \
    KERNEL(dense_##F, const u8 *w, const Chunk *x, float *y, int n_tok, int k, int m, const int *stop) {                 \
        if (!stopped(stop, 0)) product<F>(w, x + blockIdx.y, y + (u64)blockIdx.y * m, n_tok, k, m);                      \
    }                                                                                                                    \
    KERNEL(gemm_##F, const u8 *w, const Chunk *x, const u32 *pick, int base, float *y, int n_tok, int n, int m, int k) { \
        gemm<F>(w, x, pick, base, y, n_tok, n, m, k);                                                                    \
    }

FORMAT(Q4_0)
FORMAT(Q8_0)
FORMAT(Q4_K)
FORMAT(Q5_K)
FORMAT(Q6_K)
