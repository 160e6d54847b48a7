// Device code that every kernel shares. The assembled source (source.py) defines before it:
//   SPK_STORAGE            f32, f16 or bf16: what lies in memory; arithmetic is always float
//   SPK_FORWARD, SPK_BACKWARD, ...   which entry points are wanted; compiling those of the other direction takes time
//   SPK_CUSTOM_DERIVATIVE  a surrogate derivative as an expression of `float x`
//   constexpr int k...     what is known when the kernel is compiled; a branch on one costs nothing at run time
// The emulator of tests/hostsim sets the same names as variables, so nothing here may use one as a template argument.
#pragma once

#define SPK_PASTE_(name, storage) name##_##storage
#define SPK_PASTE(name, storage) SPK_PASTE_(name, storage)
// An entry point; after its name, attributes if it has any.
#define SPK_ENTRY(name, ...) extern "C" __global__ void __VA_ARGS__ SPK_PASTE(name, SPK_STORAGE)

#ifdef SPK_HOSTSIM
#define SPK_DYNAMIC_SMEM(type, name) type* name = reinterpret_cast<type*>(hostsim::dynamic_smem)
#define SPK_RESTRICT
#else
#define SPK_DYNAMIC_SMEM(type, name)                          \
    extern __shared__ __align__(16) unsigned char spk_smem[]; \
    type* name = reinterpret_cast<type*>(spk_smem)
#define SPK_RESTRICT __restrict__
#endif

typedef float f32;
struct f16 {
    unsigned short bits;
};
struct bf16 {
    unsigned short bits;
};
typedef SPK_STORAGE storage;

constexpr int kMaxVector = 8;  // 16 bytes of 16-bit storage

// ---- storage ----
// The conversions are PTX so that no CUDA header is needed to compile them.

__device__ inline float to_float(f32 x) { return x; }
__device__ inline float to_float(bf16 x) { return __uint_as_float((unsigned)x.bits << 16); }
__device__ inline void from_float(f32& to, float x) { to = x; }

#ifdef SPK_HOSTSIM
__device__ inline float to_float(f16 x) { return hostsim::half_to_float(x.bits); }
__device__ inline void from_float(f16& to, float x) { to.bits = hostsim::float_to_half(x); }
#else
__device__ inline float to_float(f16 x)
{
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}
__device__ inline void from_float(f16& to, float x) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to.bits) : "f"(x)); }
#endif

__device__ inline void from_float(bf16& to, float x)
{
#if !defined(SPK_HOSTSIM) && __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to.bits) : "f"(x));
#else
    const unsigned bits = __float_as_uint(x);
    to.bits = x != x ? 0x7FC0 : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
#endif
}

// How a word is moved: what is read or written once leaves room in the cache for what is read again.
struct Cached {
    template <class Word>
    __device__ static void move(Word* to, const Word* from) { *to = *from; }
};
struct ReadOnce {
    template <class Word>
    __device__ static void move(Word* to, const Word* from) { *to = __ldcs(from); }
};
struct WrittenOnce {
    template <class Word>
    __device__ static void move(Word* to, const Word* from) { __stcs(to, *from); }
};

// Moves kVector elements in as few transactions as their size allows; both sides are aligned to it, up to 16 bytes.
template <class How = Cached, class T>
__device__ inline void move(T* to, const T* from)
{
    const int bytes = kVector * (int)sizeof(T);
    if (bytes % 16 == 0) {
#pragma unroll
        for (int i = 0; i < bytes / 16; ++i)
            How::move(reinterpret_cast<uint4*>(to) + i, reinterpret_cast<const uint4*>(from) + i);
    } else if (bytes == 8) {
        How::move(reinterpret_cast<uint2*>(to), reinterpret_cast<const uint2*>(from));
    } else if (bytes == 4) {
        How::move(reinterpret_cast<unsigned*>(to), reinterpret_cast<const unsigned*>(from));
    } else {
        How::move(reinterpret_cast<unsigned short*>(to), reinterpret_cast<const unsigned short*>(from));
    }
}

template <class T>
__device__ inline void load(const T* from, float* to)
{
    __align__(16) T raw[kMaxVector];
    move(raw, from);
#pragma unroll
    for (int j = 0; j < kVector; ++j) to[j] = to_float(raw[j]);
}

template <class How = Cached, class T>
__device__ inline void store(T* to, const float* from)
{
    __align__(16) T raw[kMaxVector];
#pragma unroll
    for (int j = 0; j < kVector; ++j) from_float(raw[j], from[j]);
    move<How>(to, raw);
}

// ---- surrogates ----
// The formulas of ops/surrogate.py in its order of operations; a and b are constants of alpha, made on the host in
// double. A number divided by a tensor is in PyTorch that number times the reciprocal, which takes fewer instructions.

// 1 / x, rounded as a division. Without a branch, x must be at least 2^-126 and a result below that is zero: what
// __frcp_rn computes of such numbers, but nothing has to wait until it is known that this is one.
template <bool branch>
__device__ inline float reciprocal(float x)
{
#if !defined(SPK_HOSTSIM) && __CUDA_ARCH__ >= 800
    if (!branch) {
        float y;
        asm("min.NaN.f32 %0, %0, 0f7F7FFFFF;" : "+f"(x));  // of infinity the error below would be no number
        asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
        return __fmaf_rn(y, __fmaf_rn(-x, y, 1.0f), y);
    }
#endif
    return __frcp_rn(x);
}

enum Surrogate { SIGMOID, ATAN, PIECEWISE_QUADRATIC, PIECEWISE_EXP, SOFT_SIGN, SUPER_SPIKE, ERF, RECT, CUSTOM };

__device__ inline float custom_derivative(float x)
{
    (void)x;
    return SPK_CUSTOM_DERIVATIVE;
}

template <bool branch>
__device__ inline float derivative(float x, float a, float b)
{
    switch (kSurrogate) {
        case SIGMOID: {
            const float s = reciprocal<branch>(__fadd_rn(1.0f, expf(-__fmul_rn(a, x))));
            return __fmul_rn(__fmul_rn(__fsub_rn(1.0f, s), s), b);
        }
        case ATAN: {
            const float z = __fmul_rn(x, a);
            return __fmul_rn(reciprocal<branch>(__fadd_rn(1.0f, __fmul_rn(z, z))), b);
        }
        case PIECEWISE_QUADRATIC: {
            const float y = __fsub_rn(b, __fmul_rn(a, fabsf(x)));
            return y < 0.0f ? 0.0f : y;  // not fmaxf, which drops a NaN
        }
        case PIECEWISE_EXP: return __fmul_rn(b, expf(__fmul_rn(a, fabsf(x))));
        case SOFT_SIGN: {
            const float z = __fadd_rn(a, fabsf(x));
            return reciprocal<branch>(__fmul_rn(__fmul_rn(b, z), z));
        }
        case SUPER_SPIKE: {
            const float z = __fadd_rn(1.0f, fabsf(x));
            return __fmul_rn(reciprocal<branch>(__fmul_rn(z, z)), b);
        }
        case ERF: {
            const float z = __fmul_rn(a, x);
            return __fmul_rn(b, expf(__fmul_rn(-z, z)));
        }
        case RECT: return fabsf(x) < a ? b : 0.0f;
        default: return custom_derivative(x);
    }
}

// a * b + c, rounded once, subnormal numbers included.
__device__ inline float fma_subnormal(float a, float b, float c)
{
#ifdef SPK_HOSTSIM
    return __fmaf_rn(a, b, c);
#else
    float y;
    asm("fma.rn.f32 %0, %1, %2, %3;" : "=f"(y) : "f"(a), "f"(b), "f"(c));
    return y;
#endif
}

// a / b of b from 1 to 2^126, rounded as a division if a is at least 2^-103, without its branch: the product with
// 1 / b, which may be a unit of the last place off, corrected by what it leaves of a. A smaller a may stay a unit off.
__device__ inline float quotient(float a, float b)
{
    const float r = __frcp_rn(b), q = __fmul_rn(a, r);
    const float rest = fminf(fma_subnormal(q, -b, a), 3.40282347e38f);  // of infinity a number: the quotient stays one
    return fma_subnormal(rest, r, q);
}

// ---- the neuron ----
// Equations: README.md of ops/lif. v_reset is 0 with a soft reset, where nothing but the leak reads it.

struct Neuron {
    float leak;  // tau if kDivide, else 1 / tau
    float v_threshold, v_reset;
    float a, b;  // of the surrogate

    // Without a `branch`, here and below, many neurons of a thread go through at once, in more registers.
    template <bool branch = true>
    __device__ float scaled(float x) const
    {
        if (!kDivide) return __fmul_rn(x, leak);
        return branch ? __fdiv_rn(x, leak) : quotient(x, leak);
    }

    // H[t] of X[t] and V[t-1].
    template <bool branch = true>
    __device__ float charge(float x, float v) const
    {
        const float above = __fsub_rn(v, v_reset);
        if (kDecayInput) return __fadd_rn(v, scaled<branch>(__fsub_rn(x, above)));
        return __fadd_rn(__fsub_rn(v, scaled<branch>(above)), x);
    }

    __device__ bool fires(float h) const { return h >= v_threshold; }

    // V[t] of H[t].
    __device__ float reset(float h) const
    {
        if (!fires(h)) return h;
        if (!kHardReset) return __fsub_rn(h, v_threshold);
        return __fmaf_rn(0.0f, h, v_reset);  // S v_reset + (1 - S) H: NaN if H is infinite, as in the reference
    }

    // dL/dH[t] of dL/dS[t] and dL/dV[t] = carry.
    template <bool branch = true>
    __device__ float grad_h(float grad_s, float carry, float h) const
    {
        const float sg = derivative<branch>(__fsub_rn(h, v_threshold), a, b);
        if (!kHardReset) {
            if (!kDetachReset) grad_s = __fsub_rn(grad_s, __fmul_rn(carry, v_threshold));
            return __fadd_rn(__fmul_rn(grad_s, sg), carry);
        }
        if (!kDetachReset) grad_s = __fadd_rn(__fsub_rn(grad_s, __fmul_rn(carry, h)), __fmul_rn(carry, v_reset));
        return __fadd_rn(__fmul_rn(grad_s, sg), __fmul_rn(carry, fires(h) ? 0.0f : 1.0f));
    }

    // dL/d(1 / tau) of dL/dH[t], V[t-1] and X[t].
    __device__ float grad_leak(float grad_h, float v, float x) const
    {
        const float above = __fsub_rn(v, v_reset);
        return __fmul_rn(grad_h, kDecayInput ? __fsub_rn(x, above) : -above);
    }

    // Turns carry = dL/dV[t] into dL/dV[t-1] and returns dL/dX[t].
    template <bool branch = true>
    __device__ float step_back(float grad_h, float& carry) const
    {
        const float through = scaled<branch>(grad_h);
        carry = __fsub_rn(grad_h, through);
        return kDecayInput ? through : grad_h;
    }
};

// ---- warps ----

// Sum over the 32 lanes, the same bits in each: lanes 16 apart first, then 8, 4, 2 and 1.
__device__ inline float warp_sum(float x)
{
#pragma unroll
    for (int apart = 16; apart > 0; apart /= 2) x = __fadd_rn(x, __shfl_xor_sync(0xFFFFFFFFu, x, apart));
    return x;
}
