// Spikes as bits, of q, k and v in one launch. After kernels.cu, whose helpers this uses.

#ifdef SPK_PACK

// One tensor, where its bits go, or null, and how many tokens it has; any strides but 1 along E.
struct Unpacked {
    const storage* x;
    const bool* mask;
    unsigned *rows, *columns;
    long long tokens, stride_t, stride_b, stride_h, stride_l;
};

constexpr int kPart = 16 / (int)sizeof(storage);  // channels that a lane loads at once
constexpr int kLanes = 32 / kPart;                // that hold the channels of a token; loads of each of them

// The bits of 1, and which of them is the lowest.
template <class T>
struct One;
template <>
struct One<f32> {
    static constexpr unsigned bits = 0x3F800000, lowest = 23;
};
template <>
struct One<f16> {
    static constexpr unsigned bits = 0x3C00, lowest = 10;
};
template <>
struct One<bf16> {
    static constexpr unsigned bits = 0x3F80, lowest = 7;
};

// Which of the neighbours in `raw` are spikes, by bit; `strange` is not 0 after one that is neither 0, -0 nor 1. Two
// 16-bit numbers are looked at together.
__device__ inline unsigned spikes_of(const uint4& raw, unsigned& strange)
{
    const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
    const bool pairs = sizeof(storage) == 2;
    unsigned found = 0;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
        const unsigned spike = words[n] >> One<storage>::lowest & (pairs ? 0x00010001u : 1u);
        const unsigned sign = pairs ? 15 : 31, zero = pairs ? 0x7FFF7FFFu : 0x7FFFFFFFu;
        strange |= (words[n] ^ spike * One<storage>::bits) & (zero | spike << sign);
        found |= spike << (pairs ? 2 * n : n);
    }
    return pairs ? (found | found >> 15) & 0xFF : found;
}

// The word of 32 channels, f and those after it, of token lane() of 32; *odd is set where one is no spike.
__device__ inline unsigned load_word(
    const Unpacked& x, const storage* from, const bool* mask, long long token0, int f, long long E, int* odd)
{
    const int part = lane() % kLanes;
    uint4 raw[kLanes];
    f += part * kPart;
#pragma unroll
    for (int n = 0; n < kLanes; ++n) {  // all loads before the first is used
        const long long token = token0 + lane() / kLanes * kLanes + n;
        const bool inside = f < E && token < x.tokens && !(mask && mask[token]);
        const storage* at = from + token * x.stride_l + f;
        raw[n] = {0, 0, 0, 0};
        if (kAligned) {
            if (inside) raw[n] = *reinterpret_cast<const uint4*>(at);
        } else {
#pragma unroll
            for (int j = 0; j < kPart; ++j)
                if (inside && f + j < E) reinterpret_cast<storage*>(&raw[n])[j] = at[j];
        }
    }
    unsigned word[kLanes], strange = 0;
#pragma unroll
    for (int n = 0; n < kLanes; ++n) word[n] = spikes_of(raw[n], strange) << part * kPart;
    if (strange) *odd = 1;  // whoever writes, writes the same
    // Lanes of a token hand each other their parts until each has all of its own token.
#pragma unroll
    for (int half = kLanes / 2; half > 0; half /= 2)
#pragma unroll
        for (int n = 0; n < half; ++n) {
            const bool upper = lane() & half;
            const unsigned theirs = upper ? word[n] : word[n + half];
            word[n] = (upper ? word[n + half] : word[n]) | __shfl_xor_sync(kAllLanes, theirs, half);
        }
    return word[0];
}

// Bit l of the word of lane f where bit f of the word of lane l was.
__device__ inline unsigned transpose(unsigned word)
{
    unsigned low = 0x0000FFFFu;
#pragma unroll
    for (int apart = 16; apart > 0; apart /= 2) {
        const unsigned theirs = __shfl_xor_sync(kAllLanes, word, apart);
        word = lane() & apart ? (word & ~low) | (theirs >> apart & low) : (word & low) | (theirs & low) << apart;
        low ^= low << apart / 2;
    }
    return word;
}

// Packs q, k and v, one a row of the grid, to rows and to columns. Reads each spike once.
SPK_ENTRY(spk_attention_pack)(
    const storage* SPK_RESTRICT q, const storage* SPK_RESTRICT k, const storage* SPK_RESTRICT v,
    const bool* SPK_RESTRICT query_mask, const bool* SPK_RESTRICT key_mask, unsigned* SPK_RESTRICT rows_q,
    unsigned* SPK_RESTRICT columns_q, unsigned* SPK_RESTRICT rows_k, unsigned* SPK_RESTRICT columns_k,
    unsigned* SPK_RESTRICT rows_v, unsigned* SPK_RESTRICT columns_v, int* SPK_RESTRICT odd, long long T, long long B,
    long long H, long long L, long long S, long long E, long long q_t, long long q_b, long long q_h, long long q_l,
    long long k_t, long long k_b, long long k_h, long long k_l, long long v_t, long long v_b, long long v_h,
    long long v_l)
{
    const Unpacked all[3] = {{q, query_mask, rows_q, columns_q, L, q_t, q_b, q_h, q_l},
                             {k, key_mask, rows_k, columns_k, S, k_t, k_b, k_h, k_l},
                             {v, key_mask, rows_v, columns_v, S, v_t, v_b, v_h, v_l}};
    const Unpacked x = blockIdx.y == 0 ? all[0] : blockIdx.y == 1 ? all[1] : all[2];
    const unsigned groups = (x.tokens + 31) / 32, heads = H, batch = B, tasks = T * B * groups * H * kWords;
    for (unsigned task = first_warp(); task < tasks; task += warp_stride()) {
        const unsigned rest = task / kWords, w = task % kWords, h = rest % heads, rows = rest / heads;
        const unsigned g = rows % groups, tb = rows / groups, t = tb / batch, b = tb % batch;
        const storage* from = x.x + t * x.stride_t + b * x.stride_b + h * x.stride_h;
        const unsigned word = load_word(x, from, x.mask ? x.mask + b * x.tokens : nullptr, 32ll * g, 32 * w, E, odd);
        const long long head = (long long)tb * H + h, token = 32ll * g + lane();
        if (x.rows && token < x.tokens) x.rows[(head * x.tokens + token) * kWords + w] = word;
        if (x.columns) x.columns[((head * groups + g) * kWords + w) * 32 + lane()] = transpose(word);
    }
}

#endif
