// Runs the source of a CUDA kernel on one CPU thread. Test-only.
//
// Every CUDA thread of a block is a fibre (ucontext); blocks run one after another. __syncthreads() and the warp
// intrinsics suspend the fibre until those who must meet there have arrived, so they mean what they mean on a device.
// Not modelled: timing, coalescing, races between blocks, weak memory order, flushing of subnormals.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#define SPK_HOSTSIM
#define __global__
#define __device__
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
static dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace hostsim {

enum class State { Ready, AtBlockBarrier, AtWarpBarrier, Done };

struct Fibre {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(HOSTSIM_STACK);
    State state;
    dim3 thread;
    uint32_t offer;     // what this lane gives to its warp
    uint32_t tiles[6];  // its registers of the two sides of a product
};

static std::vector<Fibre> fibres;
static ucontext_t scheduler;
static size_t current;
static std::function<void()> kernel;
static unsigned char* dynamic_smem;

inline void suspend(State state)
{
    const size_t self = current;
    fibres[self].state = state;
    swapcontext(&fibres[self].context, &scheduler);
}

inline void fibre_main()
{
    kernel();
    fibres[current].state = State::Done;
}

// Lets the warps go on whose live lanes have all arrived; true if there was one.
inline bool release_warps()
{
    bool released = false;
    for (size_t first = 0; first < fibres.size(); first += 32) {
        const auto begin = fibres.begin() + first, end = fibres.begin() + std::min(first + 32, fibres.size());
        const auto is = [](State state) { return [=](const Fibre& fibre) { return fibre.state == state; }; };
        const auto waiting = std::count_if(begin, end, is(State::AtWarpBarrier));
        if (waiting == 0 || waiting + std::count_if(begin, end, is(State::Done)) != end - begin) continue;
        released = true;
        std::for_each(begin, end, [](Fibre& f) { if (f.state == State::AtWarpBarrier) f.state = State::Ready; });
    }
    return released;
}

// Returns what went wrong, or nullptr.
inline const char* run_block(bool reversed)
{
    for (Fibre& fibre : fibres) {
        getcontext(&fibre.context);
        fibre.context.uc_stack.ss_sp = fibre.stack.data();
        fibre.context.uc_stack.ss_size = fibre.stack.size();
        fibre.context.uc_link = &scheduler;
        fibre.state = State::Ready;
        makecontext(&fibre.context, fibre_main, 0);
    }
    for (;;) {
        bool progressed = false;
        for (size_t k = 0; k < fibres.size(); ++k) {
            current = reversed ? fibres.size() - 1 - k : k;
            if (fibres[current].state != State::Ready) continue;
            threadIdx = fibres[current].thread;
            swapcontext(&scheduler, &fibres[current].context);
            progressed = true;
        }
        if (progressed || release_warps()) continue;
        size_t done = 0, waiting = 0;
        for (const Fibre& fibre : fibres) {
            done += fibre.state == State::Done;
            waiting += fibre.state == State::AtBlockBarrier;
        }
        if (done == fibres.size()) return nullptr;
        if (waiting != fibres.size()) return "a barrier that not every thread reaches";
        for (Fibre& fibre : fibres) fibre.state = State::Ready;
    }
}

template <class... Args, size_t... I>
void unpack(void (*fn)(Args...), void** params, std::index_sequence<I...>)
{
    fn(*reinterpret_cast<std::remove_reference_t<Args>*>(params[I])...);
}

// The contract of cuLaunchKernel: params[i] points at the i-th of `count` arguments. Returns what went wrong.
template <class... Args>
const char* launch(void (*fn)(Args...), const unsigned* grid, const unsigned* block, unsigned shared_bytes,
                   void** params, unsigned count, int reversed)
{
    const size_t threads = size_t(block[0]) * block[1] * block[2];
    if (threads == 0 || threads > 1024) return "a block has 1 to 1024 threads";
    if (grid[0] == 0 || grid[1] == 0 || grid[2] == 0) return "empty grid";
    if (grid[0] > 0x7FFFFFFF || grid[1] > 65535 || grid[2] > 65535) return "grid over its limits";
    if (shared_bytes > 48 * 1024) return "shared memory over 48 KiB";
    if (count != sizeof...(Args)) return "wrong number of arguments";

    // Of the exact size, so that the address sanitizer sees what lies beyond.
    std::unique_ptr<unsigned char[]> shared(new unsigned char[shared_bytes]);
    dynamic_smem = shared.get();
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {block[0], block[1], block[2]};
    fibres.resize(threads);
    for (size_t i = 0; i < threads; ++i)
        fibres[i].thread = {unsigned(i % block[0]), unsigned(i / block[0] % block[1]),
                            unsigned(i / block[0] / block[1])};
    kernel = [=] { unpack(fn, params, std::index_sequence_for<Args...>{}); };
    for (unsigned z = 0; z < grid[2]; ++z)
        for (unsigned y = 0; y < grid[1]; ++y)
            for (unsigned x = 0; x < grid[0]; ++x) {
                blockIdx = {x, y, z};
                std::memset(dynamic_smem, 0xFF, shared_bytes);  // NaN: a read before a write shows
                if (const char* problem = run_block(reversed != 0)) return problem;
            }
    return nullptr;
}

// Gives `value` to the warp and hands back what each lane gave, once all have.
template <class Read>
auto exchange(uint32_t value, Read read)
{
    fibres[current].offer = value;
    suspend(State::AtWarpBarrier);
    const size_t first = current & ~size_t(31);
    const auto result = read(&fibres[first], std::min<size_t>(32, fibres.size() - first), current - first);
    suspend(State::AtWarpBarrier);  // nobody gives again before all have read
    return result;
}

// The register of row `row` and column `column` of a tile [rows, columns] of elements of `size` bytes, in the layout of
// mma.sync: which lane, which register, which bit the element begins at.
struct Place {
    size_t lane, index, shift;

    Place(size_t row, size_t column, size_t size)
        : lane(row % 8 * 4 + column * size / 4 % 4), index(row / 8 + column * size / 16 * 2), shift(column * size % 4 * 8)
    {
    }
};

// c += a b, a [16, K] and b [K, 8], as mma.sync.m16n8k(32 / size) has it; `number` makes a number of 32 bits that begin
// with the element. A column of b lies as a row of a does.
template <class T, class Number>
void multiply_add(T* c, const unsigned* a, const unsigned* b, size_t size, Number number)
{
    Fibre& self = fibres[current];
    std::copy(a, a + 4, self.tiles);
    std::copy(b, b + 2, self.tiles + 4);
    suspend(State::AtWarpBarrier);
    const Fibre* warp = &fibres[current & ~size_t(31)];
    const size_t lane = current % 32;
    for (size_t n = 0; n < 4; ++n) {
        const size_t row = lane / 4 + n / 2 * 8, column = lane % 4 * 2 + n % 2;
        for (size_t k = 0; k < 32 / size; ++k) {
            const Place left(row, k, size), right(column, k, size);
            c[n] += number(warp[left.lane].tiles[left.index] >> left.shift) *
                    number(warp[right.lane].tiles[4 + right.index / 2] >> right.shift);
        }
    }
    suspend(State::AtWarpBarrier);  // nobody offers again before all have read
}

inline void multiply_add_bytes(int* c, const unsigned* a, const unsigned* b)
{
    multiply_add(c, a, b, 1, [](uint32_t bits) { return int(bits & 255); });
}

inline void multiply_add_bf16(float* c, const unsigned* a, const unsigned* b)
{
    multiply_add(c, a, b, 2, [](uint32_t bits) {
        float x;
        bits <<= 16;
        std::memcpy(&x, &bits, sizeof x);
        return x;
    });
}

inline float half_to_float(unsigned short bits)
{
    _Float16 x;
    std::memcpy(&x, &bits, sizeof x);
    return float(x);
}

inline unsigned short float_to_half(float x)
{
    const _Float16 half = _Float16(x);
    unsigned short bits;
    std::memcpy(&bits, &half, sizeof bits);
    return bits;
}

}  // namespace hostsim

inline unsigned __float_as_uint(float x)
{
    unsigned bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float __uint_as_float(unsigned bits)
{
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// Single operations as long as the build says -ffp-contract=off.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }

// Hints to a cache.
template <class T>
T __ldcs(const T* from) { return *from; }
template <class T>
void __stcs(T* to, T value) { *to = value; }

inline void __syncthreads() { hostsim::suspend(hostsim::State::AtBlockBarrier); }

inline float __shfl_xor_sync(unsigned, float value, int lanes)
{
    return hostsim::exchange(__float_as_uint(value), [=](const hostsim::Fibre* warp, size_t, size_t lane) {
        return __uint_as_float(warp[lane ^ size_t(lanes)].offer);
    });
}

inline unsigned __shfl_xor_sync(unsigned, unsigned value, int lanes)
{
    return hostsim::exchange(value, [=](const hostsim::Fibre* warp, size_t, size_t lane) {
        return warp[lane ^ size_t(lanes)].offer;
    });
}

inline unsigned __shfl_sync(unsigned, unsigned value, int from)
{
    return hostsim::exchange(value, [=](const hostsim::Fibre* warp, size_t, size_t) { return warp[from].offer; });
}

inline void __syncwarp() { hostsim::suspend(hostsim::State::AtWarpBarrier); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(unsigned x) { return __builtin_ffs(int(x)); }

inline unsigned __ballot_sync(unsigned, bool vote)
{
    return hostsim::exchange(vote, [](const hostsim::Fibre* warp, size_t lanes, size_t) {
        unsigned word = 0;
        for (size_t i = 0; i < lanes; ++i) word |= warp[i].offer << i;
        return word;
    });
}

#define HOSTSIM_EXPORT(name)                                                                                   \
    extern "C" const char* SPK_PASTE(hostsim_##name, SPK_STORAGE)(                                             \
        const unsigned* grid, const unsigned* block, unsigned shared_bytes, void** params, unsigned count,     \
        int reversed)                                                                                          \
    {                                                                                                          \
        return hostsim::launch(&SPK_PASTE(name, SPK_STORAGE), grid, block, shared_bytes, params, count, reversed); \
    }
