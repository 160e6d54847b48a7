// Attention whose output fires, or nothing does, and the way back to its currents. After kernels.cu.

#if defined(SPK_FORWARD) || defined(SPK_BACKWARD)

// What a warp owns: kQueries queries of a head and the 32 channels of word w, over all t. A lane holds 16 neurons: of
// the queries i[0] and i[1] the kLane channels from `channel` on, those of i[0] first.
struct Tile {
    unsigned head;
    int w, i0, i[2], channel;

    __device__ Tile(const Attention& x, unsigned task)
    {
        const unsigned tiles = (x.L + kQueries - 1) / kQueries, rest = task / kWords;
        w = task % kWords;
        i0 = rest % tiles * kQueries;
        head = rest / tiles;
        i[0] = i0 + group();
        i[1] = i[0] + 8;
        channel = 32 * w + kLane * quad();
    }

    __device__ static unsigned count(const Attention& x)
    {
        return x.heads * ((x.L + kQueries - 1) / kQueries) * kWords;
    }
};

// The words of the lane's two queries; tokens beyond the last have no bit.
__device__ inline void load_queries(const Attention& x, const Tile& tile, long long t, unsigned* words)
{
    const unsigned* q = x.q + (t * x.heads + tile.head) * x.L * kWords;
#pragma unroll
    for (int n = 0; n < 2 * kWords; ++n) {
        const int i = tile.i[n / kWords];
        words[n] = i < x.L ? q[(long long)i * kWords + n % kWords] : 0;
    }
}

// sums += (Q K^T) V of 32 keys after another, those of the chunk if kStateFirst. Counts, which are bytes, are at once
// the left side of the product with V: the keys are permuted so that a lane has them where that wants them.
__device__ inline void add_map(
    const Attention& x, const Tile& tile, long long step, const unsigned* words, int (*sums)[4])
{
    const int S = x.S, end = kCausal && tile.i0 + kQueries < S ? tile.i0 + kQueries : S;
    const unsigned* k = x.k + step * S * kWords;
    const unsigned* v = x.v + (step * ((S + 31) / 32) * kWords + tile.w) * 32;
    for (int j0 = kStateFirst ? tile.i0 / kChunk * kChunk : 0; j0 < end; j0 += 32) {
        unsigned key[4 * kWords], value[4];
        int counts[4][4];
#pragma unroll
        for (int p = 0; p < 4; ++p) {
            const int j = j0 + 8 * (group() / 2) + 2 * p + group() % 2;
#pragma unroll
            for (int w = 0; w < kWords; ++w) key[p * kWords + w] = j < S ? k[(long long)j * kWords + w] : 0;
            value[p] = v[(long long)j0 * kWords + 4 * group() + p];
#pragma unroll
            for (int c = 0; c < 4; ++c) counts[p][c] = 0;
        }
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
            unsigned a[4];
            spread_rows(words[w], words[kWords + w], a);
#pragma unroll
            for (int p = 0; p < 4; ++p) {
                unsigned b[2];
                spread_column(key[p * kWords + w], b);
                multiply_add(counts[p], a, b);
            }
        }
        if (kCausal) {
#pragma unroll
            for (int p = 0; p < 4; ++p)
#pragma unroll
                for (int c = 0; c < 4; ++c)
                    if (j0 + 8 * quad() + 2 * p + c % 2 > tile.i[c / 2]) counts[p][c] = 0;
        }
        unsigned a[4];
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            const int *low = counts[n / 2 * 2] + n % 2 * 2, *high = low + 4;
            a[n] = low[0] | low[1] << 8 | high[0] << 16 | high[1] << 24;
        }
#pragma unroll
        for (int p = 0; p < 4; ++p) {
            unsigned b[2];
            spread_column(value[p], b);
            multiply_add(sums[p], a, b);
        }
    }
}

// sums += Q (K^T V), of the state's bytes one after another, the highest first; sums are 0 before.
__device__ inline void add_state(
    const Attention& x, const Tile& tile, long long step, const unsigned* words, int (*sums)[4])
{
    if (kCausal) step = step * ((x.L + kChunk - 1) / kChunk) + tile.i0 / kChunk;
    const unsigned char* state = x.states + (step * kPieces * kWords + tile.w) * 1024 * kWords + 8 * lane();
#pragma unroll
    for (int piece = kPieces - 1; piece >= 0; --piece) {
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
            unsigned a[4];
            spread_rows(words[w], words[kWords + w], a);
#pragma unroll
            for (int p = 0; p < 4; ++p) {
                const unsigned char* at = state + ((piece * kWords * 4 + p) * kWords + w) * 256;
                const uint2 eight = *reinterpret_cast<const uint2*>(at);
                const unsigned b[2] = {eight.x, eight.y};
                multiply_add(sums[p], a, b);
            }
        }
        if (piece > 0)
#pragma unroll
            for (int n = 0; n < 16; ++n) sums[n / 4][n % 4] <<= 8;
    }
}

// (Q K^T) V of numbers: rare and slow, so that the host need not wait to learn which way to go. A query after another,
// for unrolled loops would take registers from the spikes: with the lane first as a key, then as a channel.
__device__ inline void sum_numbers(const Attention& x, const Tile& tile, long long t, float* y)
{
    const int channel = 32 * tile.w + lane();
#pragma unroll 1
    for (int row = 0; row < kQueries; ++row) {
        const int i = tile.i0 + row, end = kCausal ? i + 1 : x.S;
        float sum = 0.0f;
#pragma unroll 1
        for (int j0 = 0; j0 < end; j0 += 32) {
            const float product = j0 + lane() < end ? x.dot(t, tile.head, i, j0 + lane()) : 0.0f;
#pragma unroll 1
            for (int j = 0; j < 32; ++j) {
                const float shared = __uint_as_float(__shfl_sync(kAllLanes, __float_as_uint(product), j));
                const storage* value = x.source_v.row(t, tile.head / x.H, tile.head % x.H, j0 + j);
                if (value && channel < x.E) sum = __fmaf_rn(shared, to_float(value[channel]), sum);
            }
        }
#pragma unroll
        for (int c = 0; c < kLane; ++c) {
            const unsigned mine = __shfl_sync(kAllLanes, __float_as_uint(sum), kLane * quad() + c);
#pragma unroll
            for (int r = 0; r < 2; ++r)  // an index that is not known when compiled would take y to memory
                if (row == group() + 8 * r) y[kLane * r + c] = __uint_as_float(mine);
        }
    }
}

// Y[t] = scale (Q K^T) V of the lane's neurons; `words` of load_queries at t.
__device__ inline void attend(
    const Attention& x, const Tile& tile, long long t, bool odd, const unsigned* words, const float* scale, float* y)
{
    if (odd) {
        sum_numbers(x, tile, t, y);
    } else {
        const long long step = t * x.heads + tile.head;
        int sums[4][4];
#pragma unroll
        for (int n = 0; n < 16; ++n) sums[n / 4][n % 4] = 0;
        if (kStateFirst) add_state(x, tile, step, words, sums);
        if (!kStateFirst || kCausal) add_map(x, tile, step, words, sums);
#pragma unroll
        for (int n = 0; n < 2 * kLane; ++n) y[n] = (float)sums[n % 4][n / kLane * 2 + n % kLane / 4];
    }
#pragma unroll
    for (int n = 0; n < 2 * kLane; ++n) y[n] = __fmul_rn(y[n], scale[n / kLane]);
}

__device__ inline void load_scale(const Attention& x, const Tile& tile, const float* scales, long long t, float* to)
{
#pragma unroll
    for (int r = 0; r < 2; ++r)
        to[r] = tile.i[r] < x.L ? scales[t * x.scale_t + (tile.i[r] - tile.i0) * x.scale_l] : 0.0f;
}

#endif
#ifdef SPK_FORWARD

// Spikes of Y, or Y itself unless kFires, [T, B, L, H, E].
SPK_ENTRY(spk_attention_forward)(
    const unsigned* SPK_RESTRICT q, const unsigned* SPK_RESTRICT k, const unsigned* SPK_RESTRICT v,
    const unsigned char* SPK_RESTRICT states, const float* SPK_RESTRICT scale, const int* SPK_RESTRICT odd,
    const storage* SPK_RESTRICT source_q, const storage* SPK_RESTRICT source_k, const storage* SPK_RESTRICT source_v,
    const bool* SPK_RESTRICT query_mask, const bool* SPK_RESTRICT key_mask, storage* SPK_RESTRICT out, long long T,
    long long heads, long long H, long long L, long long S, long long E, long long scale_t, long long scale_b,
    long long scale_h, long long scale_l, long long q_t, long long q_b, long long q_h, long long q_l, long long k_t,
    long long k_b, long long k_h, long long k_l, long long v_t, long long v_b, long long v_h, long long v_l, float leak,
    float v_threshold, float v_reset)
{
    const Source from_q = {source_q, query_mask, L, q_t, q_b, q_h, q_l};
    const Source from_k = {source_k, key_mask, S, k_t, k_b, k_h, k_l};
    const Source from_v = {source_v, key_mask, S, v_t, v_b, v_h, v_l};
    const Attention x = {q, k, v, states, scale, odd, from_q, from_k, from_v, heads, H, L, S, E,
                         scale_t, scale_b, scale_h, scale_l};
    const Neuron neuron = {leak, v_threshold, v_reset, 0.0f, 0.0f};
    const bool numbers = *odd;
    for (unsigned task = first_warp(); task < Tile::count(x); task += warp_stride()) {
        const Tile tile(x, task);
        const float* scales = x.scales(tile.head, tile.i0);
        const unsigned b = tile.head / (unsigned)H, h = tile.head % (unsigned)H;
        storage* to = out + (b * L * H + h) * E + tile.channel;
        float membrane[2 * kLane], y[2 * kLane], factor[2];
        unsigned words[2 * kWords], next[2 * kWords];
#pragma unroll
        for (int n = 0; n < 2 * kLane; ++n) membrane[n] = v_reset;
        load_queries(x, tile, 0, next);
        for (long long t = 0; t < T; ++t) {
#pragma unroll
            for (int n = 0; n < 2 * kWords; ++n) words[n] = next[n];
            if (t + 1 < T) load_queries(x, tile, t + 1, next);
            load_scale(x, tile, scales, t, factor);
            attend(x, tile, t, numbers, words, factor, y);
            if (kFires) {
#pragma unroll
                for (int n = 0; n < 2 * kLane; ++n) {
                    const float h = neuron.charge<false>(y[n], membrane[n]);
                    y[n] = neuron.fires(h) ? 1.0f : 0.0f;
                    membrane[n] = neuron.reset(h);
                }
            }
#pragma unroll
            for (int r = 0; r < 2; ++r)
                if (tile.i[r] < L)
                    store_channels(to + (t * heads * L + tile.i[r] * H) * E, E - tile.channel, y + kLane * r);
        }
    }
}

#endif
#ifdef SPK_BACKWARD

// G = scale dL/dY [T, B, H, L, 32 kWords] of grad_spikes [T, B, H, L, E], of any strides but 1 along E. The way
// forwards leaves the potentials before each segment but the first in `checkpoints` [segments - 1, tiles, 16, 32]; the
// way back makes the currents of a segment again. Dynamic shared memory: 16 (kSegment + 1) floats a thread.
SPK_ENTRY(spk_attention_backward)(
    const storage* SPK_RESTRICT grad_spikes, const unsigned* SPK_RESTRICT q, const unsigned* SPK_RESTRICT k,
    const unsigned* SPK_RESTRICT v, const unsigned char* SPK_RESTRICT states, const float* SPK_RESTRICT scale,
    const int* SPK_RESTRICT odd, const storage* SPK_RESTRICT source_q, const storage* SPK_RESTRICT source_k,
    const storage* SPK_RESTRICT source_v, const bool* SPK_RESTRICT query_mask, const bool* SPK_RESTRICT key_mask,
    gradient* SPK_RESTRICT grad, float* checkpoints, long long T, long long heads, long long H, long long L,
    long long S, long long E, long long scale_t, long long scale_b, long long scale_h, long long scale_l,
    long long q_t, long long q_b, long long q_h, long long q_l, long long k_t, long long k_b, long long k_h,
    long long k_l, long long v_t, long long v_b, long long v_h, long long v_l, long long grad_t, long long grad_b,
    long long grad_h, long long grad_l, float leak, float v_threshold, float v_reset, float a, float b)
{
    const Source from_q = {source_q, query_mask, L, q_t, q_b, q_h, q_l};
    const Source from_k = {source_k, key_mask, S, k_t, k_b, k_h, k_l};
    const Source from_v = {source_v, key_mask, S, v_t, v_b, v_h, v_l};
    const Attention x = {q, k, v, states, scale, odd, from_q, from_k, from_v, heads, H, L, S, E,
                         scale_t, scale_b, scale_h, scale_l};
    const Neuron neuron = {leak, v_threshold, v_reset, a, b};
    const bool numbers = *odd;
    const long long segments = (T + kSegment - 1) / kSegment;
    SPK_DYNAMIC_SMEM(float, smem);
    float* kept = smem + threadIdx.x;  // H[t] of the lane's neurons, and dL/dV while H is made: registers are few
    float* kept_carry = kept + 2 * kLane * kSegment * blockDim.x;
    for (unsigned task = first_warp(); task < Tile::count(x); task += warp_stride()) {
        const Tile tile(x, task);
        const float* scales = x.scales(tile.head, tile.i0);
        const unsigned b_of = tile.head / (unsigned)H, h_of = tile.head % (unsigned)H;
        const storage* grads = grad_spikes + b_of * grad_b + h_of * grad_h + tile.channel;
        float membrane[2 * kLane], factor[2];
        unsigned words[2 * kWords];
#pragma unroll
        for (int n = 0; n < 2 * kLane; ++n) membrane[n] = v_reset;
        for (long long t = 0; t < (segments - 1) * kSegment; ++t) {
            float y[2 * kLane];
            load_queries(x, tile, t, words);
            load_scale(x, tile, scales, t, factor);
            attend(x, tile, t, numbers, words, factor, y);
#pragma unroll
            for (int n = 0; n < 2 * kLane; ++n) membrane[n] = neuron.reset(neuron.charge<false>(y[n], membrane[n]));
            if ((t + 1) % kSegment == 0) {
                float* to = checkpoints + (t / kSegment * (long long)Tile::count(x) + task) * 2 * kLane * 32 + lane();
#pragma unroll
                for (int n = 0; n < 2 * kLane; ++n) to[32 * n] = membrane[n];
            }
        }
#pragma unroll
        for (int n = 0; n < 2 * kLane; ++n) kept_carry[n * blockDim.x] = 0.0f;
        for (long long segment = segments - 1; segment >= 0; --segment) {
            const long long t0 = segment * kSegment, t1 = t0 + kSegment < T ? t0 + kSegment : T;
            const long long from = ((segment - 1) * (long long)Tile::count(x) + task) * 2 * kLane * 32 + lane();
#pragma unroll
            for (int n = 0; n < 2 * kLane; ++n) membrane[n] = segment > 0 ? checkpoints[from + 32 * n] : v_reset;
            for (long long t = t0; t < t1; ++t) {
                float y[2 * kLane];
                load_queries(x, tile, t, words);
                load_scale(x, tile, scales, t, factor);
                attend(x, tile, t, numbers, words, factor, y);
#pragma unroll
                for (int n = 0; n < 2 * kLane; ++n) {
                    const float h = neuron.charge<false>(y[n], membrane[n]);
                    kept[(2 * kLane * (t - t0) + n) * blockDim.x] = h;
                    membrane[n] = neuron.reset(h);
                }
            }
            // One query after the other: both would take registers of which there are few.
#pragma unroll 1
            for (int r = 0; r < 2; ++r) {
                const long long i = tile.i0 + group() + 8 * r, channels = i < L ? E - tile.channel : 0;
                const storage* from_grad = grads + i * grad_l;
                const float* of_scale = scales + (i - tile.i0) * scale_l;
                gradient* to = grad + (tile.head * L + i) * 32 * kWords + tile.channel;
                float g[kLane], next[kLane], carry[kLane];
#pragma unroll
                for (int c = 0; c < kLane; ++c) {
                    next[c] = 0.0f;
                    carry[c] = kept_carry[(kLane * r + c) * blockDim.x];
                }
                load_channels(from_grad + (t1 - 1) * grad_t, channels, next);
                for (long long t = t1 - 1; t >= t0; --t) {
#pragma unroll
                    for (int c = 0; c < kLane; ++c) g[c] = next[c];
                    if (t > t0) load_channels(from_grad + (t - 1) * grad_t, channels, next);
                    const float factor = i < L ? of_scale[t * scale_t] : 0.0f;
#pragma unroll
                    for (int c = 0; c < kLane; ++c) {
                        const float h = kept[(2 * kLane * (t - t0) + kLane * r + c) * blockDim.x];
                        const float of_h = neuron.grad_h<false>(g[c], carry[c], h);
                        g[c] = __fmul_rn(neuron.step_back<false>(of_h, carry[c]), factor);
                    }
                    if (i < L) store_all<kLane>(to + t * heads * L * 32 * kWords, g);
                }
#pragma unroll
                for (int c = 0; c < kLane; ++c) kept_carry[(kLane * r + c) * blockDim.x] = carry[c];
            }
        }
    }
}

#endif
