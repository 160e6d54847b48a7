// Spiking attention on bits: definition in reference.py, layout, launch and bytes in README.md.
//
// Spikes are packed first, with a token's E channels in kWords words: rows [T, B H, L, kWords] hold channel f in bit
// f % 32 of word f / 32; columns [T, B H, ceil(S / 32), 32 kWords] hold token j of a channel in bit j % 32 of group
// j / 32. Padded tokens, and those beyond the last, have no bit. Sums are counts: exact in float up to 2^24.
// Launch: every warp is on its own. It owns kRows queries of a head over all t; blocks of 128 threads, grid (any, 1,
// 1), which strides over these tiles. Queries, keys and values come packed; the lane is a channel or a key.

constexpr int kChunk = 64;  // tokens that share a state where attention is causal; a multiple of kRows and of 32
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

__device__ inline int lane() { return threadIdx.x % 32; }
__device__ inline long long first_warp() { return ((long long)blockIdx.x * blockDim.x + threadIdx.x) / 32; }
__device__ inline long long warp_stride() { return (long long)gridDim.x * blockDim.x / 32; }

#if defined(SPK_FORWARD) || defined(SPK_BACKWARD) || defined(SPK_MAP)

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
    const unsigned *q, *k, *v;  // rows of Q; rows of K; columns of V
    const float* states;        // if kStateFirst, instead of K and V or, if kCausal, for those before the chunk
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

    // Adds the value j as numbers, times `factor`, to the lane's channels.
    __device__ void add_values(long long t, long long head, long long j, float factor, float* sums) const
    {
        const storage* row = source_v.row(t, head / H, head % H, j);
#pragma unroll
        for (int w = 0; w < kWords; ++w)
            if (row && 32 * w + lane() < E) sums[w] = __fmaf_rn(factor, to_float(row[32 * w + lane()]), sums[w]);
    }

    __device__ long long tiles() const { return (L + kRows - 1) / kRows; }

    // The words of kRows queries, one a lane; tokens beyond the last have no bit.
    __device__ unsigned load_queries(long long t, long long head, long long i0) const
    {
        const bool inside = lane() < kRows * kWords && i0 + lane() / kWords < L;
        return inside ? q[((t * heads + head) * L + i0) * kWords + lane()] : 0;
    }

    // Where the scales of a tile are at t = 0.
    __device__ const float* scales(long long head, long long i0) const
    {
        return scale + head / H * scale_b + head % H * scale_h + i0 * scale_l;
    }

    __device__ void load_scale(const float* scales, long long t, long long i0, float* to) const
    {
#pragma unroll
        for (int r = 0; r < kRows; ++r) to[r] = i0 + r < L ? scales[t * scale_t + r * scale_l] : 0.0f;
    }
};

// Hands every lane all words of the tile's queries.
__device__ inline void spread(unsigned mine, unsigned* words)
{
#pragma unroll
    for (int n = 0; n < kRows * kWords; ++n) words[n] = __shfl_sync(kAllLanes, mine, n);
}

// How many channels of query r and of the key in `key` spike together.
__device__ inline int coincidences(const unsigned* words, int r, const unsigned* key)
{
    int count = 0;
#pragma unroll
    for (int w = 0; w < kWords; ++w) count += __popc(words[r * kWords + w] & key[w]);
    return count;
}

// Puts row r, not known when compiled, in its place: an index would take registers to memory.
__device__ inline void put_row(int r, const float* row, float* tile)
{
#pragma unroll
    for (int n = 0; n < kRows * kWords; ++n)
        if (n / kWords == r) tile[n] = row[n % kWords];
}

// Writes a tile; `to` is where the lane's first channel of its first query is, out of [T, B, L, H, E].
__device__ inline void store_tile(const Attention& x, storage* to, long long i0, const float* tile)
{
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int w = 0; w < kWords; ++w)
            if (i0 + r < x.L && 32 * w + lane() < x.E)
                from_float(to[r * x.H * x.E + 32 * w], tile[r * kWords + w]);
}

#endif
#if defined(SPK_FORWARD) || defined(SPK_BACKWARD)

__device__ inline float bit(unsigned word, int n) { return word >> n & 1 ? 1.0f : 0.0f; }

// Adds (Q K^T) V of 32 keys after another, those of the chunk if kStateFirst: counts with the lane as a key pass through
// shared memory to all channels.
__device__ inline void map_first(
    const Attention& x, long long step, long long i0, const unsigned* words, float* counts, float* sums)
{
    const long long end = kCausal && i0 + kRows < x.S ? i0 + kRows : x.S;
    const unsigned* k = x.k + step * x.S * kWords;
    const unsigned* v = x.v + step * ((x.S + 31) / 32) * 32 * kWords;
    for (long long j0 = kStateFirst ? i0 / kChunk * kChunk : 0; j0 < end; j0 += 32) {
        unsigned key[kWords], value[kWords];
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
            key[w] = j0 + lane() < x.S ? k[(j0 + lane()) * kWords + w] : 0;
            value[w] = v[j0 * kWords + 32 * w + lane()];
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            const bool seen = !kCausal || j0 + lane() <= i0 + r;
            counts[32 * r + lane()] = seen ? (float)coincidences(words, r, key) : 0.0f;
        }
        __syncwarp();
#pragma unroll 2  // more of it takes registers and so warps
        for (int j = 0; j < 32; j += 4) {
            float4 count[kRows];
#pragma unroll
            for (int r = 0; r < kRows; ++r) count[r] = *reinterpret_cast<const float4*>(counts + 32 * r + j);
#pragma unroll
            for (int w = 0; w < kWords; ++w) {
                const float v0 = bit(value[w], j), v1 = bit(value[w], j + 1);
                const float v2 = bit(value[w], j + 2), v3 = bit(value[w], j + 3);
#pragma unroll
                for (int r = 0; r < kRows; ++r) {
                    float& sum = sums[r * kWords + w];
                    sum = __fmaf_rn(count[r].y, v1, __fmaf_rn(count[r].x, v0, sum));
                    sum = __fmaf_rn(count[r].w, v3, __fmaf_rn(count[r].z, v2, sum));
                }
            }
        }
        __syncwarp();  // the counts have been read
    }
}

// Adds Q (K^T V): the state's row of every channel that spikes, one a query at a time so that loads overlap.
__device__ inline void state_first(const Attention& x, long long step, long long i0, unsigned* words, float* sums)
{
    if (kCausal) step = step * ((x.L + kChunk - 1) / kChunk) + i0 / kChunk;
    const float* states = x.states + step * x.E * kWords * 32 + lane();
#pragma unroll
    for (int from = 0; from < kWords; ++from) {
        unsigned left = 1;
        while (left) {
            float row[kRows * kWords];
            left = 0;
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                unsigned& bits = words[r * kWords + from];
                const long long e = 32 * from + __ffs(bits) - 1;
#pragma unroll
                for (int w = 0; w < kWords; ++w) row[r * kWords + w] = bits ? states[(e * kWords + w) * 32] : 0.0f;
                bits &= bits - 1;
                left |= bits;
            }
#pragma unroll
            for (int n = 0; n < kRows * kWords; ++n) sums[n] = __fadd_rn(sums[n], row[n]);
        }
    }
}

// (Q K^T) V of numbers: rare and slow, so that the host need not wait to learn which way to go. A query after another, as
// unrolled loops would take registers from the spikes.
__device__ inline void sum_numbers(const Attention& x, long long t, long long head, long long i0, float* sums)
{
#pragma unroll 1
    for (int r = 0; r < kRows; ++r) {
        const long long end = kCausal ? i0 + r + 1 : x.S;
        float row[kWords];
#pragma unroll
        for (int w = 0; w < kWords; ++w) row[w] = 0.0f;
#pragma unroll 1
        for (long long j0 = 0; j0 < end; j0 += 32) {
            const float product = j0 + lane() < end ? x.dot(t, head, i0 + r, j0 + lane()) : 0.0f;
#pragma unroll 1
            for (int j = 0; j < 32; ++j) {
                const float shared = __uint_as_float(__shfl_sync(kAllLanes, __float_as_uint(product), j));
                x.add_values(t, head, j0 + j, shared, row);
            }
        }
        put_row(r, row, sums);
    }
}

// Y[t] = scale (Q K^T) V of the tile; `mine` of load_queries at t.
__device__ inline void attend(
    const Attention& x, long long t, long long head, long long i0, unsigned mine, const float* scale, float* counts,
    float* sums)
{
    unsigned words[kRows * kWords];
    spread(mine, words);
#pragma unroll
    for (int n = 0; n < kRows * kWords; ++n) sums[n] = 0.0f;
    if (*x.odd) {
        sum_numbers(x, t, head, i0, sums);
    } else {
        if (!kStateFirst || kCausal) map_first(x, t * x.heads + head, i0, words, counts, sums);
        if (kStateFirst) state_first(x, t * x.heads + head, i0, words, sums);  // takes the bits from words
    }
#pragma unroll
    for (int n = 0; n < kRows * kWords; ++n) sums[n] = __fmul_rn(sums[n], scale[n / kWords]);
}

#endif
#ifdef SPK_FORWARD

// Spikes of Y, or Y itself unless kFires. Dynamic shared memory where there is a map: 32 kRows floats a warp.
SPK_ENTRY(spk_attention_forward)(
    const unsigned* SPK_RESTRICT q, const unsigned* SPK_RESTRICT k, const unsigned* SPK_RESTRICT v,
    const float* SPK_RESTRICT states, const float* SPK_RESTRICT scale, const int* SPK_RESTRICT odd,
    const storage* SPK_RESTRICT source_q, const storage* SPK_RESTRICT source_k,
    const storage* SPK_RESTRICT source_v, const bool* SPK_RESTRICT query_mask, const bool* SPK_RESTRICT key_mask,
    storage* SPK_RESTRICT out, long long T, long long heads, long long H, long long L, long long S, long long E,
    long long scale_t, long long scale_b, long long scale_h, long long scale_l, long long q_t, long long q_b,
    long long q_h, long long q_l, long long k_t, long long k_b, long long k_h, long long k_l, long long v_t,
    long long v_b, long long v_h, long long v_l, float leak, float v_threshold, float v_reset)
{
    const Source from_q = {source_q, query_mask, L, q_t, q_b, q_h, q_l};
    const Source from_k = {source_k, key_mask, S, k_t, k_b, k_h, k_l};
    const Source from_v = {source_v, key_mask, S, v_t, v_b, v_h, v_l};
    const Attention x = {q, k, v, states, scale, odd, from_q, from_k, from_v, heads, H, L, S, E,
                         scale_t, scale_b, scale_h, scale_l};
    const Neuron neuron = {leak, v_threshold, v_reset, 0.0f, 0.0f};
    SPK_DYNAMIC_SMEM(float, smem);
    float* counts = smem + threadIdx.x / 32 * 32 * kRows;
    for (long long task = first_warp(); task < heads * x.tiles(); task += warp_stride()) {
        const long long head = task / x.tiles(), i0 = task % x.tiles() * kRows;
        const float* scales = x.scales(head, i0);
        storage* to = out + ((head / H * L + i0) * H + head % H) * E + lane();
        float membrane[kRows * kWords], y[kRows * kWords], factor[kRows];
#pragma unroll
        for (int n = 0; n < kRows * kWords; ++n) membrane[n] = v_reset;
        unsigned next = x.load_queries(0, head, i0);
        for (long long t = 0; t < T; ++t) {
            const unsigned mine = next;
            if (t + 1 < T) next = x.load_queries(t + 1, head, i0);
            x.load_scale(scales, t, i0, factor);
            attend(x, t, head, i0, mine, factor, counts, y);
            if (kFires) {
#pragma unroll
                for (int n = 0; n < kRows * kWords; ++n) {
                    const float h = neuron.charge(y[n], membrane[n]);
                    y[n] = neuron.fires(h) ? 1.0f : 0.0f;
                    membrane[n] = neuron.reset(h);
                }
            }
            store_tile(x, to + t * heads * L * E, i0, y);
        }
    }
}

#endif
#ifdef SPK_BACKWARD

// G = scale dL/dY [T, B, H, L, E] of grad_spikes, of any strides but 1 along E. On the way forwards H[t] waits in the
// cells of G, so any T fits. Moves 12 bytes and an element of storage a neuron-step. Shared memory as the forward.
SPK_ENTRY(spk_attention_backward)(
    const storage* SPK_RESTRICT grad_spikes, const unsigned* SPK_RESTRICT q, const unsigned* SPK_RESTRICT k,
    const unsigned* SPK_RESTRICT v, const float* SPK_RESTRICT states, const float* SPK_RESTRICT scale,
    const int* SPK_RESTRICT odd, const storage* SPK_RESTRICT source_q, const storage* SPK_RESTRICT source_k,
    const storage* SPK_RESTRICT source_v, const bool* SPK_RESTRICT query_mask, const bool* SPK_RESTRICT key_mask,
    float* grad, long long T, long long heads, long long H, long long L, long long S, long long E,
    long long scale_t, long long scale_b, long long scale_h, long long scale_l, long long q_t, long long q_b,
    long long q_h, long long q_l, long long k_t, long long k_b, long long k_h, long long k_l, long long v_t,
    long long v_b, long long v_h, long long v_l, long long grad_t, long long grad_b, long long grad_h,
    long long grad_l, float leak, float v_threshold, float v_reset, float a, float b)
{
    const Source from_q = {source_q, query_mask, L, q_t, q_b, q_h, q_l};
    const Source from_k = {source_k, key_mask, S, k_t, k_b, k_h, k_l};
    const Source from_v = {source_v, key_mask, S, v_t, v_b, v_h, v_l};
    const Attention x = {q, k, v, states, scale, odd, from_q, from_k, from_v, heads, H, L, S, E,
                         scale_t, scale_b, scale_h, scale_l};
    const Neuron neuron = {leak, v_threshold, v_reset, a, b};
    SPK_DYNAMIC_SMEM(float, smem);
    float* counts = smem + threadIdx.x / 32 * 32 * kRows;
    for (long long task = first_warp(); task < heads * x.tiles(); task += warp_stride()) {
        const long long head = task / x.tiles(), i0 = task % x.tiles() * kRows;
        const float* scales = x.scales(head, i0);
        float state[kRows * kWords], y[kRows * kWords], grad_s[kRows * kWords], factor[kRows];
#pragma unroll
        for (int n = 0; n < kRows * kWords; ++n) state[n] = v_reset;
        unsigned next = x.load_queries(0, head, i0);
        for (long long t = 0; t < T; ++t) {
            const unsigned mine = next;
            if (t + 1 < T) next = x.load_queries(t + 1, head, i0);
            x.load_scale(scales, t, i0, factor);
            attend(x, t, head, i0, mine, factor, counts, y);
#pragma unroll
            for (int n = 0; n < kRows * kWords; ++n) {
                const long long i = i0 + n / kWords, f = n % kWords * 32 + lane();
                const float h = neuron.charge(y[n], state[n]);
                state[n] = neuron.reset(h);
                if (i < L && f < E) grad[((t * heads + head) * L + i) * E + f] = h;
            }
        }
        const storage* from = grad_spikes + head / H * grad_b + head % H * grad_h;
#pragma unroll
        for (int n = 0; n < kRows * kWords; ++n) state[n] = 0.0f;  // dL/dV
        for (long long t = T - 1; t >= 0; --t) {
            float* to = grad + (t * heads + head) * L * E;
            x.load_scale(scales, t, i0, factor);
#pragma unroll
            for (int n = 0; n < kRows * kWords; ++n) {  // all loads before the first store, which could be to the same
                const long long i = i0 + n / kWords, f = n % kWords * 32 + lane();
                const bool inside = i < L && f < E;
                y[n] = inside ? to[i * E + f] : 0.0f;
                grad_s[n] = inside ? to_float(from[t * grad_t + i * grad_l + f]) : 0.0f;
            }
#pragma unroll
            for (int n = 0; n < kRows * kWords; ++n) {
                const long long i = i0 + n / kWords, f = n % kWords * 32 + lane();
                const float g = neuron.step_back(neuron.grad_h(grad_s[n], state[n], y[n]), state[n]);
                if (i < L && f < E) to[i * E + f] = __fmul_rn(g, factor[n / kWords]);
            }
        }
    }
}

#endif
