// The kernels of `offload/gpu.rs`, compiled for the device that is found (CUDA C++, by NVRTC), and by a C++ compiler
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
struct Q4_0 {
    static const int WEIGHTS = 32, BYTES = 18, SUB = 32;
    static const bool MIN = false;
    static __device__ __forceinline__ void ints(const u8 *row, int g, u32 q[8]) {
        const u8 *b = row + g * BYTES + 2;
        for (int i = 0; i < 4; i++) {
            u32 v = word2(b + 4 * i);
            q[i] = lower(v & 0x0f0f0f0fu, 8);
            q[i + 4] = lower(v >> 4 & 0x0f0f0f0fu, 8);
        }
    }
    static __device__ __forceinline__ void sub(const u8 *, int, int &s0, int &s1, int &m) { s0 = s1 = 1, m = 0; }
    static __device__ __forceinline__ float scale(const u8 *row, int b) { return widen(*(const u16 *)(row + b * BYTES)); }
    static __device__ __forceinline__ float min(const u8 *, int) { return 0.0f; }
};

struct Q8_0 {
    static const int WEIGHTS = 32, BYTES = 34, SUB = 32;
    static const bool MIN = false;
    static __device__ __forceinline__ void ints(const u8 *row, int g, u32 q[8]) {
        const u8 *b = row + g * BYTES + 2;
        for (int i = 0; i < 8; i++) q[i] = word2(b + 4 * i);
    }
    static __device__ __forceinline__ void sub(const u8 *, int, int &s0, int &s1, int &m) { s0 = s1 = 1, m = 0; }
    static __device__ __forceinline__ float scale(const u8 *row, int b) { return widen(*(const u16 *)(row + b * BYTES)); }
    static __device__ __forceinline__ float min(const u8 *, int) { return 0.0f; }
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

struct Q4_K {
    static const int WEIGHTS = 256, BYTES = 144, SUB = 32;
    static const bool MIN = true;
    static __device__ __forceinline__ void ints(const u8 *row, int g, u32 q[8]) {
        const uint4 *b = (const uint4 *)(row + g / 8 * BYTES + 16 + g % 8 / 2 * 32);
        int shift = 4 * (g & 1);
        uint4 lo = b[0], hi = b[1];
        q[0] = lo.x >> shift & 0x0f0f0f0fu, q[1] = lo.y >> shift & 0x0f0f0f0fu;
        q[2] = lo.z >> shift & 0x0f0f0f0fu, q[3] = lo.w >> shift & 0x0f0f0f0fu;
        q[4] = hi.x >> shift & 0x0f0f0f0fu, q[5] = hi.y >> shift & 0x0f0f0f0fu;
        q[6] = hi.z >> shift & 0x0f0f0f0fu, q[7] = hi.w >> shift & 0x0f0f0f0fu;
    }
    static __device__ __forceinline__ void sub(const u8 *row, int g, int &s0, int &s1, int &m) {
        scale_min(row + g / 8 * BYTES + 4, g % 8, s0, m);
        s1 = s0;
    }
    static __device__ __forceinline__ float scale(const u8 *row, int b) { return widen(*(const u16 *)(row + b * BYTES)); }
    static __device__ __forceinline__ float min(const u8 *row, int b) { return -widen(*(const u16 *)(row + b * BYTES + 2)); }
};

struct Q5_K {
    static const int WEIGHTS = 256, BYTES = 176, SUB = 32;
    static const bool MIN = true;
    static __device__ __forceinline__ void ints(const u8 *row, int g, u32 q[8]) {
        const u8 *b = row + g / 8 * BYTES;
        const u32 *high = (const u32 *)(b + 16), *low = (const u32 *)(b + 48 + g % 8 / 2 * 32);
        int shift = 4 * (g & 1), bit = g % 8;
        for (int i = 0; i < 8; i++) q[i] = (low[i] >> shift & 0x0f0f0f0fu) | (high[i] >> bit & 0x01010101u) << 4;
    }
    static __device__ __forceinline__ void sub(const u8 *row, int g, int &s0, int &s1, int &m) {
        scale_min(row + g / 8 * BYTES + 4, g % 8, s0, m);
        s1 = s0;
    }
    static __device__ __forceinline__ float scale(const u8 *row, int b) { return widen(*(const u16 *)(row + b * BYTES)); }
    static __device__ __forceinline__ float min(const u8 *row, int b) { return -widen(*(const u16 *)(row + b * BYTES + 2)); }
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

// `quantize` of quant/act.rs: x (n, k) floats to chunks (k / 256, n), a scale for every `PER` values. One warp takes one chunk.
template <int PER>
__device__ __forceinline__ void quantize(const float *x, Chunk *out, int n, int k) {
    int lane = threadIdx.x % WARP;
    int i = blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, t = blockIdx.y;
    if (i * CHUNK >= k) return;
    Chunk *chunk = out + (u64)i * n + t;
    // A lane has 8 values, which lie in one block: 4 lanes make a block of 32, all of them one of 256.
    float v[8], max = 0.0f;
    int at = i * CHUNK + 8 * lane;
    for (int j = 0; j < 8; j++) {
        v[j] = at < k ? x[(u64)t * k + at + j] : 0.0f;
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
    if (at >= k) return;
    ((u32 *)chunk->qs)[2 * lane] = q[0];
    ((u32 *)chunk->qs)[2 * lane + 1] = q[1];
    chunk->halves[lane] = (short)sum;
    if (lane % 2 == 0) chunk->sums[lane / 2] = (short)both;
    if (lane % (PER / 8) == 0) chunk->d[lane / (PER / 8)] = d;
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
__device__ __forceinline__ void expert_up(const Row *table, const Chunk *x, float *inner, int n_tok, int d, int d_ff) {
    const int R = 4;
    __shared__ Term<F> shared[WARPS][2 * R * TERMS * (F::MIN ? 2 : 1)];
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    int first = (blockIdx.x * WARPS + warp) * R;
    if (first >= d_ff) return;
    Row row = table[blockIdx.y];
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

// out[i][r] = w_i[r] . x_i for work row i = blockIdx.y and the 4 output rows of each warp; w is `down` of the row, x its token
// `inner`. x: chunks (k / 256, n_tok); out: (rows, m).
template <class F>
__device__ __forceinline__ void gemv(const Row *table, const Chunk *x, float *out, int n_tok, int k, int m) {
    const int R = 4;
    __shared__ Term<F> shared[WARPS][R * TERMS * (F::MIN ? 2 : 1)];
    int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    int first = (blockIdx.x * WARPS + warp) * R;
    if (first >= m) return;
    Row row = table[blockIdx.y];
    u64 bytes = (u64)(k / F::WEIGHTS) * F::BYTES;
    const u8 *rows[R];
#pragma unroll
    for (int c = 0; c < R; c++) rows[c] = row.down + (u64)(first + c < m ? first + c : m - 1) * bytes;
    float sum = chains<F, R>(rows, x + row.inner, n_tok, k, shared[warp]);
    if (lane < R && first + lane < m) out[(u64)blockIdx.y * m + first + lane] = sum;
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

// The kernels by name. Threads of a block: 128.

KERNEL(quantize_32, const float *x, Chunk *out, int n, int k) { quantize<32>(x, out, n, k); }
KERNEL(quantize_256, const float *x, Chunk *out, int n, int k) { quantize<256>(x, out, n, k); }

// gate = silu(gate) * up, both (n).
KERNEL(silu_mul_all, float *gate, const float *up, u64 n) {
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (u64)gridDim.x * blockDim.x)
        gate[i] = silu_mul(gate[i], up[i]);
}

#define FORMAT(F)                                                                                                        \
    KERNEL(expert_up_##F, const Row *table, const Chunk *x, float *inner, int n_tok, int d, int d_ff) {                  \
        expert_up<F>(table, x, inner, n_tok, d, d_ff);                                                                   \
    }                                                                                                                    \
    KERNEL(gemv_##F, const Row *table, const Chunk *x, float *out, int n_tok, int k, int m) {                            \
        gemv<F>(table, x, out, n_tok, k, m);                                                                             \
    }                                                                                                                    \
    KERNEL(gemm_##F, const u8 *w, const Chunk *x, const u32 *pick, int base, float *y, int n_tok, int n, int m, int k) { \
        gemm<F>(w, x, pick, base, y, n_tok, n, m, k);                                                                    \
    }

FORMAT(Q4_0)
FORMAT(Q8_0)
FORMAT(Q4_K)
FORMAT(Q5_K)
FORMAT(Q6_K)
