// Gradients of q, k and v from G = scale dL/dY. After kernels.cu. With S = K^T V [e, f] and R = Q^T G [e, f],
//   dL/dQ = G S^T,   dL/dK = V R^T,   dL/dV = K R;
// if causal, S of the tokens before a chunk and R of those after it, and the map of the chunk besides. A float32
// gradient is the sum of three bfloat16 numbers, so that tensor cores lose nothing of it: spikes, and bytes of S, are
// exact.

#if defined(SPK_GATHER) || defined(SPK_GRADIENTS) || defined(SPK_MAP_BACK) || defined(SPK_MAP_TILES)

constexpr int kParts = sizeof(gradient) == 2 ? 1 : 3;  // bfloat16 numbers that a gradient is the sum of

// c += a b of bfloat16.
__device__ inline void multiply_add(float* c, const unsigned* a, const unsigned* b)
{
#ifdef SPK_HOSTSIM
    hostsim::multiply_add_bf16(c, a, b);
#else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Two bits of `word` from bit `at` on, as bfloat16.
__device__ inline unsigned spread_two(unsigned word, int at)
{
    return ((word >> at & 3) * 0x8001 & 0x10001) * 0x3F80;
}

// Two neighbours as bfloat16.
__device__ inline unsigned rounded(float x0, float x1)
{
    bf16 low, high;
    from_float(low, x0);
    from_float(high, x1);
    return low.bits | (unsigned)high.bits << 16;
}

// The parts of two neighbours, each a register.
__device__ inline void split(float x0, float x1, unsigned* parts)
{
    if (kParts == 1) {
        parts[0] = rounded(x0, x1);
        return;
    }
#pragma unroll
    for (int n = 0; n < kParts; ++n) {
        const unsigned high0 = __float_as_uint(x0) & 0xFFFF0000u, high1 = __float_as_uint(x1) & 0xFFFF0000u;
        parts[n] = high0 >> 16 | high1;
        x0 = __fsub_rn(x0, __uint_as_float(high0));
        x1 = __fsub_rn(x1, __uint_as_float(high1));
    }
}

// Sixteen tokens from i0 on, before `end`, as the lane's rows of a right side: column p of four has channel p of
// `from`, where the lane's four channels of token 0 are.
__device__ inline void load_tokens(const gradient* from, long long i0, long long end, unsigned (*parts)[kParts][2])
{
    float x[4][4];
#pragma unroll
    for (int n = 0; n < 4; ++n) {
        const long long i = i0 + 2 * quad() + n % 2 + n / 2 * 8;
#pragma unroll
        for (int p = 0; p < 4; ++p) x[n][p] = 0.0f;
        if (i < end) load_all<4>(from + i * 32 * kWords, x[n]);
    }
#pragma unroll
    for (int p = 0; p < 4; ++p) {
        unsigned low[kParts], high[kParts];
        split(x[0][p], x[1][p], low);
        split(x[2][p], x[3][p], high);
#pragma unroll
        for (int n = 0; n < kParts; ++n) {
            parts[p][n][0] = low[n];
            parts[p][n][1] = high[n];
        }
    }
}

#endif
#ifdef SPK_GATHER

// Number n of group g becomes number g of group n, among lanes of a quad.
__device__ inline void transpose_groups(float* x)
{
#pragma unroll
    for (int bit = 1; bit < 8; bit *= 2)
#pragma unroll
        for (int n = 0; n < 8; ++n) {
            if (n & bit) continue;
            const bool upper = group() & bit;
            const float theirs = __shfl_xor_sync(kAllLanes, upper ? x[n] : x[n | bit], 4 * bit);
            if (upper) x[n] = theirs;
            else x[n | bit] = theirs;
        }
}

// R[e, f] = sum over i of Q[i, e] G[i, f] of every head and step, and its transpose: right sides [parts, heads, e, f]
// and [parts, heads, f, e] of every part of the tokens, which are the chunks if kCausal. q: columns of Q. A warp owns
// 32 channels f of a part, and of those of Q 16 kTiles, which divide 32 kWords.
SPK_ENTRY(spk_attention_gather)(
    const gradient* SPK_RESTRICT grad, const unsigned* SPK_RESTRICT q, gradient* SPK_RESTRICT sums,
    gradient* SPK_RESTRICT transposed, long long parts, long long heads, long long L)
{
    const int width = 32 * kWords, slices = 2 * kWords / kTiles;
    const unsigned groups = (L + 31) / 32, all_heads = heads, tasks = parts * heads * kWords * slices;
    for (unsigned task = first_warp(); task < tasks; task += warp_stride()) {
        const unsigned rest = task / slices, head = rest / kWords % all_heads, part = rest / kWords / all_heads;
        const int f0 = rest % kWords * 32, e0 = task % slices * 16 * kTiles;
        const unsigned* columns = q + (long long)head * groups * width + e0 + group();
        const gradient* from = grad + head * L * width + f0 + 4 * group();
        const unsigned g0 = kCausal ? part * (kChunk / 32) : (unsigned)((long long)groups * part / parts);
        const unsigned end = kCausal ? g0 + kChunk / 32 : (unsigned)((long long)groups * (part + 1) / parts);
        float c[kTiles][4][4];
#pragma unroll
        for (int n = 0; n < 16 * kTiles; ++n) c[n / 16][n / 4 % 4][n % 4] = 0.0f;
        for (unsigned g = g0; g < end && g < groups; ++g)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                unsigned a[kTiles][4], b[4][kParts][2];
                load_tokens(from, 32ll * g + 16 * half, L, b);
#pragma unroll
                for (int m = 0; m < kTiles; ++m)
#pragma unroll
                    for (int n = 0; n < 4; ++n)
                        a[m][n] = spread_two(
                            columns[g * width + 16 * m + n % 2 * 8], 16 * half + 2 * quad() + n / 2 * 8);
#pragma unroll
                for (int p = 0; p < 4; ++p)
#pragma unroll
                    for (int n = 0; n < kParts; ++n)
#pragma unroll
                        for (int m = 0; m < kTiles; ++m) multiply_add(c[m][p], a[m], b[p][n]);
            }
        const long long at = ((long long)part * heads + head) * width * width;
#pragma unroll
        for (int m = 0; m < kTiles; ++m)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int e = e0 + 16 * m + 8 * r, f = f0 + 8 * quad();
                float row[8];
#pragma unroll
                for (int n = 0; n < 8; ++n) row[n] = c[m][n % 4][2 * r + n / 4];
                store_all<8>(sums + at + place(e + group(), f), row);
                transpose_groups(row);
                store_all<8>(transposed + at + place(f + group(), e), row);
            }
    }
}

#endif
#ifdef SPK_SCAN

// Replaces what every chunk holds by the sum of what those after it hold: [2, chunks, count], a multiple of 8.
SPK_ENTRY(spk_attention_scan)(gradient* sums, long long chunks, long long count)
{
    constexpr int ahead = 4;  // chunks whose loads are in flight together
    sums += blockIdx.y * chunks * count;
    const long long threads = (long long)gridDim.x * blockDim.x;
    for (long long n = 8 * ((long long)blockIdx.x * blockDim.x + threadIdx.x); n < count; n += 8 * threads) {
        float after[8] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
        for (long long last = chunks - 1; last >= 0; last -= ahead) {
            float own[ahead][8];
#pragma unroll
            for (int k = 0; k < ahead; ++k)
                if (last >= k) load_all<8>(sums + (last - k) * count + n, own[k]);
#pragma unroll
            for (int k = 0; k < ahead; ++k) {
                if (last < k) break;
                store_all<8>(sums + (last - k) * count + n, after);
#pragma unroll
                for (int m = 0; m < 8; ++m) after[m] = __fadd_rn(after[m], own[k][m]);
            }
        }
    }
}

#endif
#if defined(SPK_GRADIENTS) || defined(SPK_MAP_BACK) || defined(SPK_MAP_TILES)

// The word of a token, 0 beyond the last.
__device__ inline unsigned word_of(const unsigned* rows, int i, long long end, int w)
{
    return i < end ? rows[(long long)i * kWords + w] : 0;
}

// Eight neighbours as two columns, or halves of rows, of four, in parts.
__device__ inline void load_eight(const bf16* from, unsigned (*parts)[2][2])
{
    const uint4 eight = *reinterpret_cast<const uint4*>(from);
    parts[0][0][0] = eight.x;
    parts[0][0][1] = eight.y;
    parts[0][1][0] = eight.z;
    parts[0][1][1] = eight.w;
}

__device__ inline void load_eight(const float* from, unsigned (*parts)[2][2])
{
    float x[8];
    load_all<8>(from, x);
#pragma unroll
    for (int n = 0; n < 4; ++n) {
        unsigned pair[kParts];
        split(x[2 * n], x[2 * n + 1], pair);
#pragma unroll
        for (int part = 0; part < kParts; ++part) parts[part][n / 2][n % 2] = pair[part];
    }
}

// Token i at the lane's eight channels of word w, or zeros beyond the last: numbers, or bits.
template <int kNumbers, class T>
__device__ inline void load_token(const T* rows, int i, long long end, int w, unsigned (*parts)[2][2])
{
#pragma unroll
    for (int n = 0; n < 4 * kNumbers; ++n) parts[n / 4][n / 2 % 2][n % 2] = 0;
    if (i < end) load_eight(rows + ((long long)i * kWords + w) * 32 + 8 * quad(), parts);
}

template <int kNumbers>
__device__ inline void load_token(const unsigned* rows, int i, long long end, int w, unsigned (*parts)[2][2])
{
    const unsigned word = word_of(rows, i, end, w);
#pragma unroll
    for (int n = 0; n < 4; ++n) parts[0][n / 2][n % 2] = spread_two(word, 8 * quad() + 2 * n);
}

// Rows i0 + group and 8 more at word w, as left sides of the two products that make up the word.
template <int kNumbers, class T>
__device__ inline void load_left(const T* rows, int i0, long long end, int w, unsigned (*a)[kNumbers][4])
{
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        unsigned parts[kNumbers][2][2];
        load_token<kNumbers>(rows, i0 + group() + 8 * r, end, w, parts);
#pragma unroll
        for (int n = 0; n < kNumbers; ++n)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                a[half][n][r] = parts[n][half][0];
                a[half][n][2 + r] = parts[n][half][1];
            }
    }
}

// Columns 16 half and those after it of a tile as the left side of a product, in kOut parts.
template <int kOut>
__device__ inline void as_left(const float (*x)[4], int half, unsigned (*left)[4])
{
#pragma unroll
    for (int n = 0; n < 4; ++n) {
        const float *pair = x[2 * half + n / 2] + n % 2 * 2;
        unsigned parts[kParts];
        if (kOut == 1) parts[0] = rounded(pair[0], pair[1]);
        else split(pair[0], pair[1], parts);
#pragma unroll
        for (int part = 0; part < kOut; ++part) left[part][n] = parts[part];
    }
}

// c += left C of 16 tokens from j0 on, C spikes by columns.
template <int kLeft>
__device__ inline void add_spikes(const unsigned (*left)[4], const unsigned* columns, int j0, float (*c)[4])
{
#pragma unroll
    for (int p = 0; p < 4 * kWords; ++p) {
        const unsigned word = columns[j0 / 32 * 32 * kWords + 32 * (p / 4) + 4 * group() + p % 4];
        const unsigned b[2] = {spread_two(word, j0 % 32 + 2 * quad()), spread_two(word, j0 % 32 + 2 * quad() + 8)};
#pragma unroll
        for (int n = 0; n < kLeft; ++n) multiply_add(c[p], left[n], b);
    }
}

// c += left C of 16 tokens from i0 on, C gradients [tokens, 32 kWords] before `end`.
__device__ inline void add_gradients(
    const unsigned (*left)[4], const gradient* rows, long long i0, long long end, float (*c)[4])
{
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
        unsigned right[4][kParts][2];
        load_tokens(rows + 32 * w + 4 * group(), i0, end, right);
#pragma unroll
        for (int n = 0; n < 4 * kParts; ++n)
            multiply_add(c[4 * w + n / kParts], left[0], right[n / kParts][n % kParts]);
    }
}

#endif
#ifdef SPK_GRADIENTS

// What a head's three products read, at a step.
struct Back {
    const gradient* grad;                                           // G
    const unsigned *rows_q, *columns_q, *rows_k, *columns_k, *rows_v;
    const bf16* states;                                             // S by bytes, of every chunk if kCausal
    const gradient *sums, *transposed;                              // R
    long long L, S;
};

// c += A M^T: 16 rows of A from i0 on, in kLeft parts, and a right side M, in kRight.
template <int kLeft, int kRight, class TA, class TM>
__device__ inline void add_product(const TA* rows, int i0, long long end, const TM* matrix, float (*c)[4])
{
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
        unsigned a[2][kLeft][4];
        load_left<kLeft>(rows, i0, end, w, a);
#pragma unroll
        for (int p = 0; p < 4 * kWords; ++p) {
            unsigned b[kRight][2][2];
            load_eight(matrix + (p * kWords + w) * 256 + 8 * lane(), b);
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int n = 0; n < kLeft * kRight; ++n)
                    multiply_add(c[p], a[half][n / kRight], b[n % kRight][half]);
        }
    }
}

// A B^T of 16 rows from i0 and 16 from j0 on as the left side of the next product, in kOut parts; `later`: for j >= i
// alone, else for j <= i.
template <int kLeft, int kRight, int kOut, class TA, class TB>
__device__ inline void map_of(
    const TA* a_rows, const TB* b_rows, int i0, int j0, long long end, bool later, unsigned (*left)[4])
{
    float map[2][4];
#pragma unroll
    for (int n = 0; n < 8; ++n) map[n / 4][n % 4] = 0.0f;
#pragma unroll 1  // more of it takes registers that there are not at 128 channels
    for (int w = 0; w < kWords; ++w) {
        unsigned a[2][kLeft][4];
        load_left<kLeft>(a_rows, i0, end, w, a);
#pragma unroll
        for (int tokens = 0; tokens < 2; ++tokens) {
            unsigned b[kRight][2][2];
            load_token<kRight>(b_rows, j0 + 8 * tokens + group(), end, w, b);
#pragma unroll
            for (int half = 0; half < 2; ++half)
#pragma unroll
                for (int n = 0; n < kLeft * kRight; ++n)
                    multiply_add(map[tokens], a[half][n / kRight], b[n % kRight][half]);
        }
    }
#pragma unroll
    for (int n = 0; n < 8; ++n) {
        const int i = i0 + group() + n % 4 / 2 * 8, j = j0 + 8 * (n / 4) + 2 * quad() + n % 2;
        if (later ? j < i : j > i) map[n / 4][n % 4] = 0.0f;
    }
    as_left<kOut>(map, 0, left);
}

// Of 16 queries from i0 on: c = G S^T; channel 32 w + 8 quad + 4 n + p is column n of the lane's in c[4 w + p].
__device__ inline void gradient_of_q(const Back& x, int i0, float (*c)[4])
{
    const long long size = 1024 * kWords * kWords;
    const bf16* states = x.states + (kCausal ? i0 / kChunk * kPieces * size : 0);
#pragma unroll
    for (int piece = kPieces - 1; piece >= 0; --piece) {
        if (piece < kPieces - 1)
#pragma unroll
            for (int n = 0; n < 16 * kWords; ++n) c[n / 4][n % 4] = __fmul_rn(c[n / 4][n % 4], 256.0f);
        add_product<kParts, 1>(x.grad, i0, x.L, states + piece * size, c);
    }
    for (int j0 = i0 / kChunk * kChunk; kCausal && j0 <= i0; j0 += 16) {
        unsigned left[kParts][4];
        map_of<kParts, 1, kParts>(x.grad, x.rows_v, i0, j0, x.L, false, left);
        add_spikes<kParts>(left, x.columns_k, j0, c);
    }
}

// Where the chunk of causal tokens ends.
__device__ inline int chunk_end(const Back& x, int j0)
{
    const int end = (j0 / kChunk + 1) * kChunk;
    return end < x.L ? end : x.L;
}

// Of 16 keys from j0 on: c = V R^T.
__device__ inline void gradient_of_k(const Back& x, int j0, float (*c)[4])
{
    add_product<1, kParts>(x.rows_v, j0, x.S, x.sums, c);
    for (int i0 = j0; kCausal && i0 < chunk_end(x, j0); i0 += 16) {
        unsigned left[kParts][4];
        map_of<1, kParts, kParts>(x.rows_v, x.grad, j0, i0, x.L, true, left);
        add_spikes<kParts>(left, x.columns_q, i0, c);
    }
}

// Of 16 values from j0 on: c = K R. Counts of at most 128 are bfloat16 numbers.
__device__ inline void gradient_of_v(const Back& x, int j0, float (*c)[4])
{
    add_product<1, kParts>(x.rows_k, j0, x.S, x.transposed, c);
    for (int i0 = j0; kCausal && i0 < chunk_end(x, j0); i0 += 16) {
        unsigned left[1][4];
        map_of<1, 1, 1>(x.rows_k, x.rows_q, j0, i0, x.L, true, left);
        add_gradients(left, x.grad, i0, x.L, c);
    }
}

// A row of (A B^T) C as numbers, of rows `from` to `to` of B and C that are not masked: rare and slow. The lane is
// first one of these rows, then channel 32 w + lane of sums[w].
template <class TA, class TB, class TC>
__device__ inline void sum_numbers(
    const TA* a, const TB* b, const TC* c, const bool* mask, long long from, long long to, long long b_step,
    long long c_step, long long E, float* sums)
{
#pragma unroll 1
    for (long long j0 = from; j0 < to; j0 += 32) {
        const long long mine = j0 + lane();
        float product = 0.0f;
#pragma unroll 1
        for (long long e = 0; mine < to && !(mask && mask[mine]) && e < E; ++e)
            product = __fmaf_rn(to_float(a[e]), to_float(b[mine * b_step + e]), product);
#pragma unroll 1
        for (int j = 0; j < 32; ++j) {
            const float shared = __uint_as_float(__shfl_sync(kAllLanes, __float_as_uint(product), j));
            if (j0 + j >= to || (mask && mask[j0 + j])) continue;
#pragma unroll
            for (int w = 0; w < kWords; ++w)
                if (32 * w + lane() < E)
                    sums[w] = __fmaf_rn(shared, to_float(c[(j0 + j) * c_step + 32 * w + lane()]), sums[w]);
        }
    }
}

// Gradients of q, k and v, one a row of the grid, of any strides but 1 along E. A warp owns 16 tokens of a head at a
// time.
SPK_ENTRY(spk_attention_gradients)(
    const gradient* SPK_RESTRICT grad, const unsigned* SPK_RESTRICT rows_q, const unsigned* SPK_RESTRICT columns_q,
    const unsigned* SPK_RESTRICT rows_k, const unsigned* SPK_RESTRICT columns_k, const unsigned* SPK_RESTRICT rows_v,
    const bf16* SPK_RESTRICT states, const gradient* SPK_RESTRICT sums, const gradient* SPK_RESTRICT transposed,
    const int* SPK_RESTRICT odd, const storage* SPK_RESTRICT q, const storage* SPK_RESTRICT k,
    const storage* SPK_RESTRICT v, const bool* SPK_RESTRICT query_mask, const bool* SPK_RESTRICT key_mask,
    storage* SPK_RESTRICT grad_q, storage* SPK_RESTRICT grad_k, storage* SPK_RESTRICT grad_v, long long T, long long B,
    long long H, long long L, long long S, long long E, long long q_t, long long q_b, long long q_h, long long q_l,
    long long k_t, long long k_b, long long k_h, long long k_l, long long v_t, long long v_b, long long v_h,
    long long v_l, long long grad_q_t, long long grad_q_b, long long grad_q_h, long long grad_q_l, long long grad_k_t,
    long long grad_k_b, long long grad_k_h, long long grad_k_l, long long grad_v_t, long long grad_v_b,
    long long grad_v_h, long long grad_v_l)
{
    const bool of_q = blockIdx.y == 0, of_k = blockIdx.y == 1, numbers = *odd;
    const int width = 32 * kWords;
    const unsigned tokens = of_q ? L : S, tiles = (tokens + 15) / 16, all_heads = H, batch = B;
    const long long groups_q = (L + 31) / 32, groups_k = (S + 31) / 32, chunks = (L + kChunk - 1) / kChunk;
    const bool* mask = of_q ? query_mask : key_mask;
    storage* out = of_q ? grad_q : of_k ? grad_k : grad_v;
    const long long out_t = of_q ? grad_q_t : of_k ? grad_k_t : grad_v_t;
    const long long out_b = of_q ? grad_q_b : of_k ? grad_k_b : grad_v_b;
    const long long out_h = of_q ? grad_q_h : of_k ? grad_k_h : grad_v_h;
    const long long out_l = of_q ? grad_q_l : of_k ? grad_k_l : grad_v_l;
    for (unsigned task = first_warp(); task < T * B * H * tiles; task += warp_stride()) {
        const unsigned step = task / tiles, h = step % all_heads, b = step / all_heads % batch;
        const unsigned t = step / all_heads / batch;
        const int i0 = task % tiles * 16;
        const long long head = step;
        const long long chunk_of_sums = kCausal ? i0 / kChunk * T * B * H + head : head;
        const Back x = {grad + head * L * width,
                        rows_q + head * L * kWords,
                        columns_q + head * groups_q * width,
                        rows_k + head * S * kWords,
                        columns_k + head * groups_k * width,
                        rows_v + head * S * kWords,
                        states + head * (kCausal ? chunks : 1) * kPieces * width * width,
                        sums + chunk_of_sums * width * width,
                        transposed + chunk_of_sums * width * width,
                        L,
                        S};
        storage* to = out + t * out_t + b * out_b + h * out_h;
        if (numbers) {
            const storage* of_q_head = q + t * q_t + b * q_b + h * q_h;
            const storage *of_k_head = k + t * k_t + b * k_b + h * k_h, *of_v_head = v + t * v_t + b * v_b + h * v_h;
            const bool* no_query = query_mask ? query_mask + b * L : nullptr;
            const bool* no_key = key_mask ? key_mask + b * S : nullptr;
#pragma unroll 1
            for (long long i = i0; i < i0 + 16 && i < tokens; ++i) {
                const long long from = kCausal && !of_q ? i : 0, end = kCausal && of_q ? i + 1 : of_q ? S : L;
                float sums_of[kWords];
#pragma unroll
                for (int w = 0; w < kWords; ++w) sums_of[w] = 0.0f;
                if (mask && mask[b * tokens + i]) {
                } else if (of_q) {
                    sum_numbers(x.grad + i * width, of_v_head, of_k_head, no_key, from, end, v_l, k_l, E, sums_of);
                } else if (of_k) {
                    sum_numbers(of_v_head + i * v_l, x.grad, of_q_head, no_query, from, end, width, q_l, E, sums_of);
                } else {
                    sum_numbers(of_k_head + i * k_l, of_q_head, x.grad, no_query, from, end, q_l, width, E, sums_of);
                }
#pragma unroll
                for (int w = 0; w < kWords; ++w)
                    if (32 * w + lane() < E) from_float(to[i * out_l + 32 * w + lane()], sums_of[w]);
            }
            continue;
        }
        float c[4 * kWords][4];
#pragma unroll
        for (int n = 0; n < 16 * kWords; ++n) c[n / 4][n % 4] = 0.0f;
        if (of_q) gradient_of_q(x, i0, c);
        else if (of_k) gradient_of_k(x, i0, c);
        else gradient_of_v(x, i0, c);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const long long i = i0 + group() + 8 * r;
            if (i >= tokens) continue;
            const bool silent = mask && mask[b * tokens + i];
#pragma unroll
            for (int w = 0; w < kWords; ++w) {
                const int channel = 32 * w + 8 * quad();
                float y[8];
#pragma unroll
                for (int n = 0; n < 8; ++n) y[n] = silent ? 0.0f : c[4 * w + n % 4][2 * r + n / 4];
                store_channels(to + i * out_l + channel, E - channel, y);
            }
        }
    }
}

#endif
