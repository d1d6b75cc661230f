// Runs `offload.cu` on a CPU, for the tests: every CUDA thread is a fiber, blocks go one after the other, and the lanes of a
// warp meet at shuffles and barriers. Slow and strict: lanes that should meet and do not end the program.
//
// Shared memory is static, so that a block finds what the one before it left there, as on a device. Compiled with hidden symbols:
// two libraries of this would share it otherwise.
#pragma once
#include <csetjmp>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <ucontext.h>
#include <utility>

#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __align__(n) alignas(n)

struct alignas(16) uint4 { unsigned x, y, z, w; };
struct Index { unsigned x, y, z; };
static Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

const int MOST = 256;
const size_t STACK = 128 << 10;
enum Where { RUNNING, AT_WARP, AT_BLOCK, DONE };

struct Fiber {
    jmp_buf at;
    ucontext_t start;
    bool begun;
    Where where;
};

static Fiber fibers[MOST];
static jmp_buf scheduler;
static int current;
static void (*body)(void **);
static void **arguments;
static bool backwards;

// Lane `i` of the warp that runs, in the order of this round.
static int first;
static int lane(int i) { return first + (backwards ? 31 - i : i); }

// Lets lane `i` run; behind the last one of the round, the scheduler.
static void resume(int i);
static int turn;

// The fiber stops, and the next one of its warp goes on: by itself, as every second switch would be one to the scheduler.
__attribute__((noinline)) static void stop(Where where) {
    fibers[current].where = where;
    if (_setjmp(fibers[current].at) == 0) resume(++turn);
}

static void forever() {
    for (;;) {
        body(arguments);
        stop(DONE);
    }
}

__attribute__((noinline)) static void resume(int i) {
    if (i == 32) _longjmp(scheduler, 1);
    current = lane(i);
    threadIdx = {(unsigned)current, 0, 0};
    Fiber &fiber = fibers[current];
    fiber.where = RUNNING;
    if (fiber.begun) _longjmp(fiber.at, 1);
    fiber.begun = true;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = malloc(STACK);
    fiber.start.uc_stack.ss_size = STACK;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, forever, 0);
    setcontext(&fiber.start);
}

// Lets each lane of the warp run to its next stop.
__attribute__((noinline)) static void round() {
    turn = 0;
    if (_setjmp(scheduler) == 0) resume(0);
}

static void fail(const char *what) {
    fprintf(stderr, "offload.cu under emulation: %s\n", what);
    abort();
}

// Runs the lanes of a warp until all are at a barrier of the block, or all have ended.
static void warp(int w) {
    first = 32 * w;
    do {
        round();
        for (int i = 1; i < 32; i++)
            if (fibers[first + i].where != fibers[first].where) fail("lanes of a warp do not meet");
    } while (fibers[first].where == AT_WARP);
}

static void block(int threads) {
    int warps = threads / 32;
    bool done[MOST / 32] = {};
    for (int left = warps; left > 0;) {
        for (int i = 0; i < warps; i++) {
            int w = backwards ? warps - 1 - i : i;
            if (done[w]) continue;
            warp(w);
            done[w] = fibers[32 * w].where == DONE;
            left -= done[w];
        }
    }
}

// What lane `from` of the same warp gives for `mine`. Two places by turns: whoever has read may write again at once.
template <class T>
static T exchange(T mine, int from) {
    static unsigned char places[2][MOST][32];
    static int turns[MOST];
    static_assert(sizeof(T) <= 32, "it fits its place");
    int turn = turns[current] ^= 1;
    memcpy(places[turn][current], &mine, sizeof(T));
    stop(AT_WARP);
    T theirs;
    memcpy(&theirs, places[turn][current / 32 * 32 + from], sizeof(T));
    return theirs;
}

struct Fragments {
    unsigned a[4], b[2];
};

// As `exchange`, for the fragments of all lanes.
static const Fragments *gather(const Fragments &mine) {
    static Fragments places[2][MOST];
    static int turns[MOST];
    int turn = turns[current] ^= 1;
    places[turn][current] = mine;
    stop(AT_WARP);
    return places[turn] + current / 32 * 32;
}

// c + the products of 4 bytes each. (Written out: most of the time of the tests is spent here, and a loop over shifts is slower.)
static inline int dot(unsigned a, unsigned b, int c) {
    signed char x[4], y[4];
    memcpy(x, &a, 4), memcpy(y, &b, 4);
    return c + x[0] * y[0] + x[1] * y[1] + x[2] * y[2] + x[3] * y[3];
}

static void mma(int c[4], int k, const Fragments &mine) {
    const Fragments *lanes = gather(mine);
    int lane = current % 32;
    for (int i = 0; i < 4; i++) {
        int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        // Words of 4 bytes: lane 4 r + w has word w of row r, and of the next 16 bytes word w + 4.
        for (int w = 0; w < k / 4; w++) {
            unsigned a = lanes[row % 8 * 4 + w % 4].a[row / 8 + w / 4 * 2], b = lanes[column * 4 + w % 4].b[w / 4];
            c[i] = dot(a, b, c[i]);
        }
    }
}

typedef std::map<std::string, void (*)(void **)> Kernels;
static Kernels &kernels() {
    static Kernels all;
    return all;
}

struct Entry {
    Entry(const char *name, void (*call)(void **)) { kernels()[name] = call; }
};

template <class... A, size_t... I>
static void call_with(void (*f)(A...), void **a, std::index_sequence<I...>) {
    f(*(A *)a[I]...);
}

template <class... A>
static void call(void (*f)(A...), void **a) {
    call_with(f, a, std::index_sequence_for<A...>());
}

} // namespace emulated

#define KERNEL(name, ...)                                                                     \
    static void name(__VA_ARGS__);                                                            \
    static emulated::Entry entry_##name(#name, [](void **a) { emulated::call(name, a); });    \
    static void name(__VA_ARGS__)

static inline void __syncthreads() { emulated::stop(emulated::AT_BLOCK); }
static inline void __syncwarp() { emulated::stop(emulated::AT_WARP); }

template <class T>
static T __shfl_xor_sync(unsigned, T v, int step) { return emulated::exchange(v, emulated::current % 32 ^ step); }
template <class T>
static T __shfl_sync(unsigned, T v, int from) { return emulated::exchange(v, from); }
template <class T>
static T __shfl_down_sync(unsigned, T v, int step) {
    int lane = emulated::current % 32;
    return emulated::exchange(v, lane + step < 32 ? lane + step : lane);
}

static inline int __dp4a(int a, int b, int c) { return emulated::dot(a, b, c); }
static inline float __uint_as_float(unsigned u) {
    float f;
    memcpy(&f, &u, 4);
    return f;
}
static inline unsigned __float_as_uint(float f) {
    unsigned u;
    memcpy(&u, &f, 4);
    return u;
}
static inline void mma_32(int c[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    emulated::mma(c, 32, {{a0, a1, a2, a3}, {b0, b1}});
}
static inline void mma_16(int c[4], unsigned a0, unsigned a1, unsigned b0) {
    emulated::mma(c, 16, {{a0, a1, 0, 0}, {b0, 0}});
}

// Runs a kernel; 0 if there is none of this name. `reverse`: the last lanes and warps first, which shows what is not
// guarded by a barrier.
extern "C" __attribute__((visibility("default"))) int octet_launch(const char *name, unsigned x, unsigned y, unsigned z,
                                                                   unsigned threads, void **args, int reverse) {
    emulated::Kernels::iterator found = emulated::kernels().find(name);
    if (found == emulated::kernels().end()) return 0;
    if (threads % 32 != 0 || threads > emulated::MOST) emulated::fail("blocks of whole warps only");
    emulated::body = found->second;
    emulated::arguments = args;
    emulated::backwards = reverse;
    blockDim = {threads, 1, 1};
    gridDim = {x, y, z};
    for (unsigned k = 0; k < z; k++)
        for (unsigned j = 0; j < y; j++)
            for (unsigned i = 0; i < x; i++) {
                blockIdx = {i, j, k};
                emulated::block(threads);
            }
    return 1;
}
