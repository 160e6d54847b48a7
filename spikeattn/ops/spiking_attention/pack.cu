// Before attention: spikes as bits, and states K^T V of them. After kernels.cu, whose helpers these use.

#ifdef SPK_PACK

constexpr int kLoads = 8;  // tokens whose loads are in flight together

// Packs x, of any strides but 1 along E, to columns if kTransposed, else to rows. Reads each spike once. Sets odd [1]
// where a token that is not padding holds a number that is no spike.
SPK_ENTRY(spk_attention_pack)(
    const storage* SPK_RESTRICT x, const bool* SPK_RESTRICT mask, unsigned* SPK_RESTRICT packed, int* SPK_RESTRICT odd,
    long long T, long long B, long long H, long long L, long long E, long long stride_t, long long stride_b,
    long long stride_h, long long stride_l)
{
    const long long groups = (L + 31) / 32;
    for (long long task = first_warp(); task < T * B * groups * H * kWords; task += warp_stride()) {
        const long long w = task % kWords, h = task / kWords % H, g = task / (kWords * H) % groups;
        const long long tb = task / (kWords * H * groups), f = 32 * w + lane();
        const storage* from = x + tb / B * stride_t + tb % B * stride_b + h * stride_h + f;
        unsigned word = 0;
        for (int j0 = 0; j0 < 32; j0 += kLoads) {
            storage value[kLoads];
            bool inside[kLoads];
#pragma unroll
            for (int j = 0; j < kLoads; ++j) {
                const long long token = 32 * g + j0 + j;
                inside[j] = f < E && token < L && !(mask && mask[tb % B * L + token]);
                if (inside[j]) value[j] = from[token * stride_l];
            }
#pragma unroll
            for (int j = 0; j < kLoads; ++j) {
                const float number = inside[j] ? to_float(value[j]) : 0.0f;
                const bool spike = number != 0.0f;
                if (spike && number != 1.0f) *odd = 1;  // whoever writes, writes the same
                if (kTransposed) {
                    word |= (unsigned)spike << (j0 + j);
                } else {
                    const unsigned row = __ballot_sync(kAllLanes, spike);
                    if (lane() == j0 + j) word = row;
                }
            }
        }
        const long long head = tb * H + h, token = 32 * g + lane();
        if (kTransposed) packed[((head * groups + g) * kWords + w) * 32 + lane()] = word;
        else if (token < L) packed[(head * L + token) * kWords + w] = word;
    }
}

#endif
#ifdef SPK_STATES

// Writes at most kRows rows of a state.
__device__ inline void store_state(const int* sums, long long rows, float* to)
{
#pragma unroll
    for (int n = 0; n < kRows * kWords; ++n)
        if (n / kWords < rows) to[32 * n] = (float)sums[n];
}

// K^T V of every head and step from columns: states [heads, E, 32 kWords]; if kCausal, of the keys before every chunk of
// tokens: [heads, chunks, E, 32 kWords]. A warp owns kRows channels of the keys.
SPK_ENTRY(spk_attention_states)(
    const unsigned* SPK_RESTRICT keys, const unsigned* SPK_RESTRICT values, float* SPK_RESTRICT states,
    long long heads, long long S, long long E)
{
    const long long groups = (S + 31) / 32, tiles = (E + kRows - 1) / kRows;
    const long long chunks = kCausal ? (S + kChunk - 1) / kChunk : 1;
    for (long long task = first_warp(); task < heads * tiles; task += warp_stride()) {
        const long long head = task / tiles, e0 = task % tiles * kRows;
        float* to = states + (head * chunks * E + e0) * kWords * 32 + lane();
        int sums[kRows * kWords];
#pragma unroll
        for (int n = 0; n < kRows * kWords; ++n) sums[n] = 0;
        for (long long g = 0; g < groups; ++g) {
            const long long at = (head * groups + g) * kWords * 32;
            if (kCausal && g % (kChunk / 32) == 0) {
                store_state(sums, E - e0, to);
                to += E * kWords * 32;
            }
            unsigned value[kWords];
#pragma unroll
            for (int w = 0; w < kWords; ++w) value[w] = values[at + 32 * w + lane()];
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                const unsigned key = keys[at + e0 + r];  // kRows divides 32
#pragma unroll
                for (int w = 0; w < kWords; ++w) sums[r * kWords + w] += __popc(key & value[w]);
            }
        }
        if (!kCausal) store_state(sums, E - e0, to);
    }
}

#endif
