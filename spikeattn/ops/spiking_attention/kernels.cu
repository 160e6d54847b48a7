// Spiking attention on bits: definition in reference.py, layout, launch and bytes in README.md.
//
// Spikes are packed first, with a token's E channels in kWords words: rows [T, B H, L, kWords] hold channel f in bit
// f % 32 of word f / 32; columns [T, B H, ceil(S / 32), 32 kWords] hold token j of a channel in bit j % 32 of group
// j / 32. Padded tokens, and those beyond the last, have no bit. Sums are integers, exact in float up to 2^24.
// This file holds what the kernels share.

constexpr int kChunk = 64;    // tokens that share a state where attention is causal; a multiple of kQueries and of 32
constexpr int kQueries = 16;  // of a tile: the rows of a tensor core's product
constexpr int kSegment = 4;   // steps whose H wait in shared memory on the way back
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

__device__ inline int lane() { return threadIdx.x % 32; }
__device__ inline unsigned first_warp() { return (blockIdx.x * blockDim.x + threadIdx.x) / 32; }
__device__ inline unsigned warp_stride() { return gridDim.x * blockDim.x / 32; }

// bfloat16 gradients stay bfloat16; those of float16 would overflow.
template <class T>
struct GradientOf {
    typedef float type;
};
template <>
struct GradientOf<bf16> {
    typedef bf16 type;
};
typedef GradientOf<storage>::type gradient;

#if defined(SPK_FORWARD) || defined(SPK_BACKWARD) || defined(SPK_MAP) || defined(SPK_MAP_BACK) || defined(SPK_MAP_TILES)

// Where q, k or v comes from: what is read if it holds a number that is no spike.
struct Source {
    const storage* x;
    const bool* mask;
    long long tokens, stride_t, stride_b, stride_h, stride_l;

    __device__ const storage* row(long long t, long long b, long long h, long long token) const
    {
        const bool silent = token >= tokens || (mask && mask[b * tokens + token]);
        return silent ? nullptr : x + t * stride_t + b * stride_b + h * stride_h + token * stride_l;
    }
};

// What one launch attends to. Strides of scale are 0 along an axis where one number is for all.
struct Attention {
    const unsigned *q, *k, *v;    // rows of Q; rows of K; columns of V
    const unsigned char* states;  // if kStateFirst, instead of K and V or, if kCausal, for those before the chunk
    const float* scale;
    const int* odd;  // whether q, k or v holds a number that is no spike
    Source source_q, source_k, source_v;
    long long heads, H, L, S, E, scale_t, scale_b, scale_h, scale_l;

    // Product of the query i and the key j as numbers.
    __device__ float dot(long long t, long long head, long long i, long long j) const
    {
        const storage* query = source_q.row(t, head / H, head % H, i);
        const storage* key = source_k.row(t, head / H, head % H, j);
        float sum = 0.0f;
        if (!query || !key) return sum;
#pragma unroll 1
        for (long long e = 0; e < E; ++e) sum = __fmaf_rn(to_float(query[e]), to_float(key[e]), sum);
        return sum;
    }

    // Where the scales of the queries from i0 on are at t = 0.
    __device__ const float* scales(unsigned head, long long i0) const
    {
        return scale + head / (unsigned)H * scale_b + head % (unsigned)H * scale_h + i0 * scale_l;
    }
};

#endif
// ---- tensor cores ----
// A tile of a product lies in the registers of a warp: with group = lane / 4 and quad = lane % 4, a lane holds of
//   a [16, 32] bytes: rows group and group + 8, four bytes of each, then four more of each
//   b [32, 8] bytes:  column group at the same
//   c [16, 8]:        row group at columns 2 quad and 2 quad + 1, then row group + 8 at the same
// and of bfloat16, a [16, 16] and b [16, 8], two for four. Which of the numbers that are summed over a lane holds is
// free as long as a and b agree: here eight neighbours of 32, those from 8 quad on, in one product of bytes or two of
// bfloat16. Of 32 columns, product p has 4 n + p at n, so that a lane holds eight neighbours of each row, too: 8 quad +
// 4 n + p.
//
// A right side [columns, summed over], each 32 kWords, lies in memory as the lanes load it: kWords pieces of 256
// numbers for every product, eight a lane.

__device__ inline int group() { return lane() / 4; }
__device__ inline int quad() { return lane() % 4; }

// Where the right side has number k of a column.
__device__ inline int place(int column, int k)
{
    return ((column / 32 * 4 + column % 4) * kWords + k / 32) * 256 + column % 32 / 4 * 32 + k % 32;
}

// c += a b of bytes.
__device__ inline void multiply_add(int* c, const unsigned* a, const unsigned* b)
{
#ifdef SPK_HOSTSIM
    hostsim::multiply_add_bytes(c, a, b);
#else
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.u8.u8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Four bits of `word` from bit `at` on, as bytes.
__device__ inline unsigned spread(unsigned word, int at) { return (word >> at & 15) * 0x00204081 & 0x01010101; }

// The lane's part of a of two rows of 32 spikes, group and group + 8.
__device__ inline void spread_rows(unsigned row, unsigned row8, unsigned* a)
{
    a[0] = spread(row, 8 * quad());
    a[1] = spread(row8, 8 * quad());
    a[2] = spread(row, 8 * quad() + 4);
    a[3] = spread(row8, 8 * quad() + 4);
}

// The lane's part of b of its column of 32 spikes.
__device__ inline void spread_column(unsigned column, unsigned* b)
{
    b[0] = spread(column, 8 * quad());
    b[1] = spread(column, 8 * quad() + 4);
}

constexpr int kLane = 8;  // neighbours that a lane holds

// N neighbours, aligned to their size up to 16 bytes.
template <int N, class T>
__device__ inline void load_all(const T* from, float* to)
{
    constexpr int bytes = N * (int)sizeof(T);
    __align__(16) T raw[N];
    if (bytes == 8) *reinterpret_cast<uint2*>(raw) = *reinterpret_cast<const uint2*>(from);
#pragma unroll
    for (int i = 0; i < bytes / 16; ++i) reinterpret_cast<uint4*>(raw)[i] = reinterpret_cast<const uint4*>(from)[i];
#pragma unroll
    for (int n = 0; n < N; ++n) to[n] = to_float(raw[n]);
}

template <int N, class T>
__device__ inline void store_all(T* to, const float* from)
{
    __align__(16) T raw[N];
#pragma unroll
    for (int n = 0; n < N; ++n) from_float(raw[n], from[n]);
#pragma unroll
    for (int i = 0; i < N * (int)sizeof(T) / 16; ++i)
        reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(raw)[i];
}

#if defined(SPK_FORWARD) || defined(SPK_BACKWARD) || defined(SPK_GRADIENTS)

// The lane's kLane channels of a token, as many as there are; aligned if kAligned, and then all or none.
template <class T>
__device__ inline void load_channels(const T* from, long long channels, float* to)
{
    if (kAligned) {
        if (channels > 0) load_all<kLane>(from, to);
        return;
    }
#pragma unroll
    for (int c = 0; c < kLane; ++c)
        if (c < channels) to[c] = to_float(from[c]);
}

template <class T>
__device__ inline void store_channels(T* to, long long channels, const float* from)
{
    if (kAligned) {
        if (channels > 0) store_all<kLane>(to, from);
        return;
    }
#pragma unroll
    for (int c = 0; c < kLane; ++c)
        if (c < channels) from_float(to[c], from[c]);
}

#endif
