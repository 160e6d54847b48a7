// States K^T V of spikes. After kernels.cu, whose helpers this uses.

#if defined(SPK_STATES) || defined(SPK_STATES_BACK)

// A warp multiplies 16 channels of values, f, with 32 channels of keys, e: four products.

// Adds the spikes of tokens, groups `from` to `to` of 32: the next group's are on their way while one is worked on.
// `keys` begins with the lane's first channel, `values` with that of its row.
__device__ inline void add_tokens(
    const unsigned* keys, const unsigned* values, long long from, long long to, int (*sums)[4])
{
    const int width = 32 * kWords;
    unsigned value[2], key[4], next_value[2], next_key[4];
    const auto load = [&](long long g) {
#pragma unroll
        for (int n = 0; n < 2; ++n) next_value[n] = g < to ? values[g * width + 8 * n] : 0;
#pragma unroll
        for (int p = 0; p < 4; ++p) next_key[p] = g < to ? keys[g * width + p] : 0;
    };
    load(from);
    for (long long g = from; g < to; ++g) {
        unsigned a[4];
#pragma unroll
        for (int n = 0; n < 2; ++n) value[n] = next_value[n];
#pragma unroll
        for (int p = 0; p < 4; ++p) key[p] = next_key[p];
        load(g + 1);
        spread_rows(value[0], value[1], a);
#pragma unroll
        for (int p = 0; p < 4; ++p) {
            unsigned b[2];
            spread_column(key[p], b);
            multiply_add(sums[p], a, b);
        }
    }
}

// Eight bytes, as such or as bfloat16.
__device__ inline void store_eight(unsigned char* to, const int* bytes)
{
    uint2 eight = {0, 0};
#pragma unroll
    for (int n = 0; n < 4; ++n) {
        eight.x |= (unsigned)bytes[n] << 8 * n;
        eight.y |= (unsigned)bytes[4 + n] << 8 * n;
    }
    *reinterpret_cast<uint2*>(to) = eight;
}

__device__ inline void store_eight(bf16* to, const int* bytes)
{
    float eight[8];
#pragma unroll
    for (int n = 0; n < 8; ++n) eight[n] = (float)bytes[n];
    store_all<8>(to, eight);
}

// Writes the bytes of the sums, of rows f + group and 8 more, as right sides: [kPieces, f, e].
template <class T>
__device__ inline void store_state(const int (*sums)[4], int f, int e, T* to)
{
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            int bytes[8];
#pragma unroll
            for (int n = 0; n < 8; ++n) bytes[n] = sums[n % 4][2 * r + n / 4] >> 8 * piece & 255;
            store_eight(to + piece * 1024 * kWords * kWords + place(f + group() + 8 * r, e + 8 * quad()), bytes);
        }
}

// (V^T K)[f, e] of every head and step from columns, by bytes of the sums, the lowest first: right sides [heads,
// kPieces, f, e]; if kCausal, of the tokens before every chunk: [heads, chunks, kPieces, f, e]. kSplit warps share the
// tokens of a task; they add up in shared memory, 2048 bytes each.
template <class T>
__device__ inline void sum_states(const unsigned* keys, const unsigned* values, T* states, long long heads, long long S)
{
    const long long groups = (S + 31) / 32, chunks = kCausal ? (S + kChunk - 1) / kChunk : 1, width = 32 * kWords;
    const long long units = kCausal ? chunks : groups;  // what is shared out
    const int in_unit = kCausal ? kChunk / 32 : 1, warp = threadIdx.x / 32, part = warp % kSplit;
    const long long from = units * part / kSplit, to = units * (part + 1) / kSplit;
    const unsigned in_head = 2 * kWords * kWords, at_once = blockDim.x / 32 / kSplit;  // tasks of a head, of a block
    const auto last_group = [=](long long unit) { return unit * in_unit < groups ? unit * in_unit : groups; };
    SPK_DYNAMIC_SMEM(int, shared);
    int* mine = shared + warp * 512 + lane();
    for (unsigned first = blockIdx.x * at_once; first < heads * in_head; first += gridDim.x * at_once) {
        const unsigned task = first + warp / kSplit, tile = task % in_head;
        const long long head = task / in_head;
        const int f = tile / kWords * 16, e = tile % kWords * 32;
        const bool works = head < heads;
        const unsigned* k = keys + head * groups * width + e + 4 * group();
        const unsigned* v = values + head * groups * width + f + group();
        int sums[4][4];
#pragma unroll
        for (int n = 0; n < 16; ++n) sums[n / 4][n % 4] = 0;
        if (works && (!kCausal || kSplit > 1)) add_tokens(k, v, from * in_unit, last_group(to), sums);
        if (kSplit > 1) {  // the sums of all parts, or of those before
#pragma unroll
            for (int n = 0; n < 16; ++n) mine[32 * n] = sums[n / 4][n % 4];
            __syncthreads();
            const int others = kCausal ? part : kSplit;
#pragma unroll
            for (int n = 0; n < 16; ++n) {
                int sum = 0;
                for (int other = 0; other < others; ++other) sum += mine[32 * n + (other - part) * 512];
                sums[n / 4][n % 4] = sum;
            }
            __syncthreads();  // the next task's may be written
        }
        T* out = states + head * chunks * kPieces * width * width;
        if (!kCausal) {
            if (works && part == 0) store_state(sums, f, e, out);
            continue;
        }
        for (long long chunk = from; works && chunk < to; ++chunk) {
            store_state(sums, f, e, out + chunk * kPieces * width * width);
            add_tokens(k, v, chunk * in_unit, last_group(chunk + 1), sums);
        }
    }
}

#endif
#ifdef SPK_STATES

SPK_ENTRY(spk_attention_states)(
    const unsigned* SPK_RESTRICT keys, const unsigned* SPK_RESTRICT values, unsigned char* SPK_RESTRICT states,
    long long heads, long long S)
{
    sum_states(keys, values, states, heads, S);
}

#endif
#ifdef SPK_STATES_BACK

// The same bytes as bfloat16, to be multiplied with gradients.
SPK_ENTRY(spk_attention_states_back)(
    const unsigned* SPK_RESTRICT keys, const unsigned* SPK_RESTRICT values, bf16* SPK_RESTRICT states,
    long long heads, long long S)
{
    sum_states(keys, values, states, heads, S);
}

#endif
