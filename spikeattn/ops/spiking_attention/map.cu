// Attention whose map fires. After kernels.cu, whose helpers this uses.

#ifdef SPK_MAP

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
        for (; left; left &= left - 1) x.add_values(t, head, 32 * g + __ffs(left) - 1, 1.0f, row);
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
    for (long long task = first_warp(); task < heads * x.tiles(); task += warp_stride()) {
        const long long head = task / x.tiles(), i0 = task % x.tiles() * kRows;
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
            spread(x.load_queries(t, head, i0), words);
            x.load_scale(scales, t, i0, factor);
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
