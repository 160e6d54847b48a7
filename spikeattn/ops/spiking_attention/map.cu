// Attention whose map fires. After kernels.cu, whose helpers this uses.

#ifdef SPK_MAP

// A warp owns kRows queries of a head over all t; the lane is a channel or a key.

__device__ inline long long tiles(const Attention& x) { return (x.L + kRows - 1) / kRows; }

// Hands every lane the words of kRows queries; tokens beyond the last have no bit.
__device__ inline void load_queries(const Attention& x, long long t, long long head, long long i0, unsigned* words)
{
    const bool inside = lane() < kRows * kWords && i0 + lane() / kWords < x.L;
    const unsigned mine = inside ? x.q[((t * x.heads + head) * x.L + i0) * kWords + lane()] : 0;
#pragma unroll
    for (int n = 0; n < kRows * kWords; ++n) words[n] = __shfl_sync(kAllLanes, mine, n);
}

__device__ inline void load_scale(const Attention& x, const float* scales, long long t, long long i0, float* to)
{
#pragma unroll
    for (int r = 0; r < kRows; ++r) to[r] = i0 + r < x.L ? scales[t * x.scale_t + r * x.scale_l] : 0.0f;
}

// How many channels of query r and of the key in `key` spike together.
__device__ inline int coincidences(const unsigned* words, int r, const unsigned* key)
{
    int count = 0;
#pragma unroll
    for (int w = 0; w < kWords; ++w) count += __popc(words[r * kWords + w] & key[w]);
    return count;
}

// Adds the value j as numbers to the lane's channels.
__device__ inline void add_values(const Attention& x, long long t, long long head, long long j, float* sums)
{
    const storage* row = x.source_v.row(t, head / x.H, head % x.H, j);
#pragma unroll
    for (int w = 0; w < kWords; ++w)
        if (row && 32 * w + lane() < x.E) sums[w] = __fadd_rn(sums[w], to_float(row[32 * w + lane()]));
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

// Adds the values, as numbers, of the keys of group g that spiked in the words `spikes`.
__device__ inline void add_spiked_values(
    const Attention& x, long long t, long long head, int g, const unsigned* spikes, float* sums)
{
#pragma unroll 1
    for (int r = 0; r < kRows; ++r) {
        float row[kWords];
        unsigned left = 0;
#pragma unroll
        for (int n = 0; n < kRows * kWords; ++n)
            if (n / kWords == r) {
                row[n % kWords] = sums[n];
                left = spikes[n / kWords];
            }
        for (; left; left &= left - 1) add_values(x, t, head, 32 * g + __ffs(left) - 1, row);
        put_row(r, row, sums);
    }
}

// LIF(scale Q K^T) V: the membranes of kRows queries with all S <= 32 kGroups keys stay in registers; the spikes of 32
// keys are a word, which meets the columns of V.
SPK_ENTRY(spk_attention_map)(
    const unsigned* SPK_RESTRICT q, const unsigned* SPK_RESTRICT k, const unsigned* SPK_RESTRICT v,
    const float* SPK_RESTRICT scale, const int* SPK_RESTRICT odd, const storage* SPK_RESTRICT source_q,
    const storage* SPK_RESTRICT source_k, const storage* SPK_RESTRICT source_v, const bool* SPK_RESTRICT query_mask,
    const bool* SPK_RESTRICT key_mask, storage* SPK_RESTRICT out, long long T, long long heads, long long H,
    long long L, long long S, long long E, long long scale_t, long long scale_b, long long scale_h,
    long long scale_l, long long q_t, long long q_b, long long q_h, long long q_l, long long k_t, long long k_b,
    long long k_h, long long k_l, long long v_t, long long v_b, long long v_h, long long v_l, float leak,
    float v_threshold, float v_reset)
{
    const Source from_q = {source_q, query_mask, L, q_t, q_b, q_h, q_l};
    const Source from_k = {source_k, key_mask, S, k_t, k_b, k_h, k_l};
    const Source from_v = {source_v, key_mask, S, v_t, v_b, v_h, v_l};
    const Attention x = {q, k, v, nullptr, scale, odd, from_q, from_k, from_v, heads, H, L, S, E,
                         scale_t, scale_b, scale_h, scale_l};
    const Neuron neuron = {leak, v_threshold, v_reset, 0.0f, 0.0f};
    for (long long task = first_warp(); task < heads * tiles(x); task += warp_stride()) {
        const long long head = task / tiles(x), i0 = task % tiles(x) * kRows;
        const float* scales = x.scales(head, i0);
        storage* to = out + ((head / H * L + i0) * H + head % H) * E + lane();
        const long long end = kCausal && i0 + kRows < S ? i0 + kRows : S;  // what is not seen has no current
        float membrane[kRows * kGroups], factor[kRows];
#pragma unroll
        for (int n = 0; n < kRows * kGroups; ++n) membrane[n] = v_reset;
        for (long long t = 0; t < T; ++t) {
            const long long step = t * heads + head;
            unsigned words[kRows * kWords];
            float sums[kRows * kWords];
            load_queries(x, t, head, i0, words);
            load_scale(x, scales, t, i0, factor);
#pragma unroll
            for (int n = 0; n < kRows * kWords; ++n) sums[n] = 0.0f;
#pragma unroll
            for (int g = 0; g < kGroups; ++g) {
                const long long j = 32 * g + lane();
                if (32 * g >= end) break;
                unsigned key[kWords], value[kWords];
#pragma unroll
                for (int w = 0; w < kWords; ++w) {
                    key[w] = j < S ? k[(step * S + j) * kWords + w] : 0;
                    value[w] = v[((step * ((S + 31) / 32) + g) * kWords + w) * 32 + lane()];
                }
                float product[kRows];
                unsigned spikes[kRows];
#pragma unroll
                for (int r = 0; r < kRows; ++r) product[r] = (float)coincidences(words, r, key);
                if (*odd) {
#pragma unroll 1
                    for (int r = 0; r < kRows; ++r) {
                        const float number = x.dot(t, head, i0 + r, j);
#pragma unroll
                        for (int n = 0; n < kRows; ++n) product[n] = n == r ? number : product[n];
                    }
                }
#pragma unroll
                for (int r = 0; r < kRows; ++r) {
                    if (kCausal && j > i0 + r) product[r] = 0.0f;
                    float& potential = membrane[r * kGroups + g];
                    const float h = neuron.charge(__fmul_rn(product[r], factor[r]), potential);
                    spikes[r] = __ballot_sync(kAllLanes, neuron.fires(h));
                    potential = neuron.reset(h);
                }
                if (*odd) {
                    add_spiked_values(x, t, head, g, spikes, sums);
                    continue;
                }
#pragma unroll
                for (int n = 0; n < kRows * kWords; ++n)
                    sums[n] = __fadd_rn(sums[n], (float)__popc(spikes[n / kWords] & value[n % kWords]));
            }
            store_tile(x, to + t * heads * L * E, i0, sums);
        }
    }
}

#endif
