// Attention whose map fires, by tiles of the map: forward where map.cu has no room for a query's potentials, and the
// way back. After kernels.cu and gradients.cu, whose helpers this uses. With P the fired map, dM = scale dL/dM and dP =
// dO V^T, which the neurons' backward takes to dL/dM:
//   O = P V,   dL/dQ = dM K,   dL/dK = dM^T Q,   dL/dV = P^T dO.

#if defined(SPK_MAP_TILES) || defined(SPK_MAP_BACK)

// What a warp works on: neurons of 16 rows from i0 and 32 columns from j0 on, queries by keys, or keys by queries if
// kOfKeys. A lane holds 16: of rows group and group + 8, column 8 p + 2 quad + b, as n = 4 p + 2 r + b.
struct Pairs {
    const Attention& x;
    const gradient* grad;    // dO of all heads and steps
    const unsigned* rows_v;  // likewise
    unsigned head;
    int i0, j0;
    bool numbers;

    __device__ long long rows() const { return kOfKeys ? x.S : x.L; }
    __device__ long long columns() const { return kOfKeys ? x.L : x.S; }
    __device__ int row(int n) const { return i0 + group() + n % 4 / 2 * 8; }
    __device__ int column(int n) const { return j0 + 8 * (n / 4) + 2 * quad() + n % 2; }
    __device__ int query(int n) const { return kOfKeys ? column(n) : row(n); }
    __device__ int key(int n) const { return kOfKeys ? row(n) : column(n); }

    // Whether a causal query sees a key.
    __device__ bool sees(int n) const { return !kCausal || key(n) <= query(n); }

    __device__ const gradient* grads(long long t) const { return grad + (t * x.heads + head) * x.L * 32 * kWords; }
    __device__ const storage* value(long long t, int j) const
    {
        return x.source_v.row(t, head / (unsigned)x.H, head % (unsigned)x.H, j);
    }

    __device__ float factor(const float* scales, long long t, int n) const
    {
        return query(n) < x.L ? scales[t * x.scale_t + query(n) * x.scale_l] : 0.0f;
    }

    // M[t] of the lane's neurons.
    __device__ void currents(long long t, const float* scales, float* y) const
    {
        const long long step = t * x.heads + head;
        const unsigned* of_q = x.q + step * x.L * kWords;
        const unsigned* of_k = x.k + step * x.S * kWords;
        int counts[4][4];
#pragma unroll
        for (int n = 0; n < 16; ++n) counts[n / 4][n % 4] = 0;
#pragma unroll
        for (int w = 0; w < kWords && !numbers; ++w) {
            const unsigned *left = kOfKeys ? of_k : of_q, *right = kOfKeys ? of_q : of_k;
            unsigned a[4];
            spread_rows(word_of(left, i0 + group(), rows(), w), word_of(left, i0 + group() + 8, rows(), w), a);
#pragma unroll
            for (int p = 0; p < 4; ++p) {
                unsigned b[2];
                spread_column(word_of(right, j0 + 8 * p + group(), columns(), w), b);
                multiply_add(counts[p], a, b);
            }
        }
#pragma unroll
        for (int n = 0; n < 16; ++n) y[n] = (float)counts[n / 4][n % 4];
        if (numbers) {
#pragma unroll 1
            for (int n = 0; n < 16; ++n) {
                const float product = x.dot(t, head, query(n), key(n));
#pragma unroll
                for (int m = 0; m < 16; ++m) y[m] = m == n ? product : y[m];
            }
        }
#pragma unroll
        for (int n = 0; n < 16; ++n) y[n] = sees(n) ? __fmul_rn(y[n], factor(scales, t, n)) : 0.0f;
    }

    // dP[t] of the lane's neurons.
    __device__ void gradients(long long t, float (*d)[4]) const
    {
        const unsigned* of_v = rows_v + (t * x.heads + head) * x.S * kWords;
#pragma unroll
        for (int n = 0; n < 16; ++n) d[n / 4][n % 4] = 0.0f;
        if (numbers) {
#pragma unroll 1
            for (int n = 0; n < 16; ++n) {
                const storage* v = value(t, key(n));
                float product = 0.0f;
#pragma unroll 1
                for (int e = 0; v && query(n) < x.L && e < x.E; ++e)
                    product = __fmaf_rn(to_float(grads(t)[query(n) * 32ll * kWords + e]), to_float(v[e]), product);
#pragma unroll
                for (int m = 0; m < 16; ++m) d[m / 4][m % 4] = m == n ? product : d[m / 4][m % 4];
            }
            return;
        }
        if (kOfKeys) add<1, kParts>(of_v, grads(t), d);
        else add<kParts, 1>(grads(t), of_v, d);
    }

    template <int kLeft, int kRight, class TA, class TB>
    __device__ void add(const TA* left, const TB* right, float (*d)[4]) const
    {
#pragma unroll 1
        for (int w = 0; w < kWords; ++w) {
            unsigned a[2][kLeft][4];
            load_left<kLeft>(left, i0, rows(), w, a);
#pragma unroll
            for (int p = 0; p < 4; ++p) {
                unsigned b[kRight][2][2];
                load_token<kRight>(right, j0 + 8 * p + group(), columns(), w, b);
#pragma unroll
                for (int n = 0; n < 2 * kLeft * kRight; ++n)
                    multiply_add(d[p], a[n % 2][n / 2 / kRight], b[n / 2 % kRight][n % 2]);
            }
        }
    }
};

// Adds to what `to` holds, or writes if this is the first: of the lane's rows those before `rows`.
__device__ inline void add_rows(const float (*c)[4], int i0, long long rows, bool first, float* to)
{
#pragma unroll
    for (int n = 0; n < 2 * kWords; ++n) {
        const int w = n / 2, r = n % 2, i = i0 + group() + 8 * r;
        if (i >= rows) continue;
        float *at = to + ((long long)i * kWords + w) * 32 + 8 * quad(), sum[8];
#pragma unroll
        for (int m = 0; m < 8; ++m) sum[m] = 0.0f;
        if (!first) load_all<8>(at, sum);
#pragma unroll
        for (int m = 0; m < 8; ++m) sum[m] = __fadd_rn(sum[m], c[4 * w + m % 4][2 * r + m / 4]);
        store_all<8>(at, sum);
    }
}

// c = tile C as numbers, row j of C given by `row`, null where there is none; `shared`: 512 floats of the warp.
template <class Row>
__device__ inline void multiply_numbers(const float (*tile)[4], Row row, long long E, float* shared, float (*c)[4])
{
#pragma unroll
    for (int n = 0; n < 16; ++n)
        shared[(group() + n % 4 / 2 * 8) * 32 + 8 * (n / 4) + 2 * quad() + n % 2] = tile[n / 4][n % 4];
    __syncwarp();
#pragma unroll 1
    for (int n = 0; n < 16 * kWords; ++n) {
        const int r = n % 2, m = n / 2 % 8, w = n / 16, channel = 32 * w + 8 * quad() + m;
        float sum = 0.0f;
#pragma unroll 1
        for (int j = 0; j < 32; ++j) {
            const auto* of = row(j);
            if (of && channel < E) sum = __fmaf_rn(shared[(group() + 8 * r) * 32 + j], to_float(of[channel]), sum);
        }
#pragma unroll
        for (int k = 0; k < 16 * kWords; ++k)
            if (k == n) c[4 * (k / 16) + k / 2 % 8 % 4][2 * (k % 2) + k / 2 % 8 / 4] = sum;
    }
    __syncwarp();  // the tile has been read
}

#endif
#ifdef SPK_MAP_TILES

// O in float32 [T, heads, L, 32 kWords]: a warp owns 16 queries, and goes from 32 keys to the next 32 with all steps of
// them. Shared memory: 16 floats a thread, for numbers.
SPK_ENTRY(spk_attention_map_tiles)(
    const unsigned* SPK_RESTRICT q, const unsigned* SPK_RESTRICT k, const unsigned* SPK_RESTRICT columns_v,
    const float* SPK_RESTRICT scale, const int* SPK_RESTRICT odd, const storage* SPK_RESTRICT source_q,
    const storage* SPK_RESTRICT source_k, const storage* SPK_RESTRICT source_v, const bool* SPK_RESTRICT query_mask,
    const bool* SPK_RESTRICT key_mask, float* to, long long T, long long heads, long long H, long long L, long long S,
    long long E, long long scale_t, long long scale_b, long long scale_h, long long scale_l, long long q_t,
    long long q_b, long long q_h, long long q_l, long long k_t, long long k_b, long long k_h, long long k_l,
    long long v_t, long long v_b, long long v_h, long long v_l, float leak, float v_threshold, float v_reset)
{
    const Source from_q = {source_q, query_mask, L, q_t, q_b, q_h, q_l};
    const Source from_k = {source_k, key_mask, S, k_t, k_b, k_h, k_l};
    const Source from_v = {source_v, key_mask, S, v_t, v_b, v_h, v_l};
    const Attention x = {q, k, nullptr, nullptr, scale, odd, from_q, from_k, from_v, heads, H, L, S, E,
                         scale_t, scale_b, scale_h, scale_l};
    const Neuron neuron = {leak, v_threshold, v_reset, 0.0f, 0.0f};
    SPK_DYNAMIC_SMEM(float, smem);
    float* shared = smem + threadIdx.x / 32 * 512;
    Pairs pairs = {x, nullptr, nullptr, 0, 0, 0, *odd != 0};
    const unsigned tiles = (L + 15) / 16, tasks = heads * tiles;
    const long long groups = (S + 31) / 32;
    for (unsigned task = first_warp(); task < tasks; task += warp_stride()) {
        pairs.head = task / tiles;
        pairs.i0 = task % tiles * 16;
        const float* scales = x.scales(pairs.head, 0);
        const int end = kCausal && pairs.i0 + 16 < S ? pairs.i0 + 16 : S;
        for (pairs.j0 = 0; pairs.j0 < end; pairs.j0 += 32) {
            float membrane[16], y[16];
#pragma unroll
            for (int n = 0; n < 16; ++n) membrane[n] = v_reset;
            for (long long t = 0; t < T; ++t) {
                const long long step = t * heads + pairs.head;
                float fired[4][4], c[4 * kWords][4];
                pairs.currents(t, scales, y);
#pragma unroll
                for (int n = 0; n < 16; ++n) {
                    const float h = neuron.charge<false>(y[n], membrane[n]);
                    fired[n / 4][n % 4] = neuron.fires(h) ? 1.0f : 0.0f;
                    membrane[n] = neuron.reset(h);
                }
#pragma unroll
                for (int n = 0; n < 16 * kWords; ++n) c[n / 4][n % 4] = 0.0f;
                if (pairs.numbers) {
                    const auto row = [&](int j) { return pairs.value(t, pairs.j0 + j); };
                    multiply_numbers(fired, row, E, shared, c);
                } else {
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        unsigned left[1][4];
                        as_left<1>(fired, half, left);
                        add_spikes<1>(left, columns_v + step * groups * 32 * kWords, pairs.j0 + 16 * half, c);
                    }
                }
                add_rows(c, pairs.i0, L, pairs.j0 == 0, to + step * L * 32 * kWords);
            }
        }
    }
}

#endif
#ifdef SPK_MAP_BACK

// dL/dQ, or dL/dK and dL/dV if kOfKeys, in float32 [T, heads, rows, 32 kWords]. Potentials before each segment but the
// first wait in `checkpoints` [segments - 1, tiles, 16, 32], and H of a segment in shared memory: 16 (kSegment + 1)
// floats a thread, and 16 for numbers.
SPK_ENTRY(spk_attention_map_back)(
    const gradient* SPK_RESTRICT grad, const unsigned* SPK_RESTRICT q, const unsigned* SPK_RESTRICT columns_q,
    const unsigned* SPK_RESTRICT k, const unsigned* SPK_RESTRICT columns_k, const unsigned* SPK_RESTRICT rows_v,
    const float* SPK_RESTRICT scale, const int* SPK_RESTRICT odd, const storage* SPK_RESTRICT source_q,
    const storage* SPK_RESTRICT source_k, const storage* SPK_RESTRICT source_v, const bool* SPK_RESTRICT query_mask,
    const bool* SPK_RESTRICT key_mask, float* to, float* to_v, float* checkpoints, long long T, long long heads,
    long long H, long long L, long long S, long long E, long long scale_t, long long scale_b, long long scale_h,
    long long scale_l, long long q_t, long long q_b, long long q_h, long long q_l, long long k_t, long long k_b,
    long long k_h, long long k_l, long long v_t, long long v_b, long long v_h, long long v_l, float leak,
    float v_threshold, float v_reset, float a, float b)
{
    const Source from_q = {source_q, query_mask, L, q_t, q_b, q_h, q_l};
    const Source from_k = {source_k, key_mask, S, k_t, k_b, k_h, k_l};
    const Source from_v = {source_v, key_mask, S, v_t, v_b, v_h, v_l};
    const Attention x = {q, k, nullptr, nullptr, scale, odd, from_q, from_k, from_v, heads, H, L, S, E,
                         scale_t, scale_b, scale_h, scale_l};
    const Neuron neuron = {leak, v_threshold, v_reset, a, b};
    SPK_DYNAMIC_SMEM(float, smem);
    float *kept = smem + threadIdx.x, *kept_carry = kept + 16 * kSegment * blockDim.x;
    float* shared = smem + 16 * (kSegment + 1) * blockDim.x + threadIdx.x / 32 * 512;
    Pairs pairs = {x, grad, rows_v, 0, 0, 0, *odd != 0};
    const unsigned tiles = (pairs.rows() + 15) / 16, tasks = heads * tiles;
    const long long segments = (T + kSegment - 1) / kSegment, groups = (pairs.columns() + 31) / 32;
    for (unsigned task = first_warp(); task < tasks; task += warp_stride()) {
        pairs.head = task / tiles;
        pairs.i0 = task % tiles * 16;
        const float* scales = x.scales(pairs.head, 0);
        const int j1 = kCausal && !kOfKeys && pairs.i0 + 16 < pairs.columns() ? pairs.i0 + 16 : pairs.columns();
        const int start = kCausal && kOfKeys ? pairs.i0 / 32 * 32 : 0;
        for (pairs.j0 = start; pairs.j0 < j1; pairs.j0 += 32) {
            float membrane[16], y[16];
#pragma unroll
            for (int n = 0; n < 16; ++n) membrane[n] = v_reset;
            for (long long t = 0; t < (segments - 1) * kSegment; ++t) {
                pairs.currents(t, scales, y);
#pragma unroll
                for (int n = 0; n < 16; ++n) membrane[n] = neuron.reset(neuron.charge<false>(y[n], membrane[n]));
                if ((t + 1) % kSegment) continue;
                const long long at = (t / kSegment * (long long)tasks + task) * 512 + lane();
#pragma unroll
                for (int n = 0; n < 16; ++n) checkpoints[at + 32 * n] = membrane[n];
            }
#pragma unroll
            for (int n = 0; n < 16; ++n) kept_carry[n * blockDim.x] = 0.0f;
            for (long long segment = segments - 1; segment >= 0; --segment) {
                const long long t0 = segment * kSegment, t1 = t0 + kSegment < T ? t0 + kSegment : T;
                const long long from = ((segment - 1) * (long long)tasks + task) * 512 + lane();
#pragma unroll
                for (int n = 0; n < 16; ++n) membrane[n] = segment > 0 ? checkpoints[from + 32 * n] : v_reset;
                for (long long t = t0; t < t1; ++t) {
                    pairs.currents(t, scales, y);
#pragma unroll
                    for (int n = 0; n < 16; ++n) {
                        const float h = neuron.charge<false>(y[n], membrane[n]);
                        kept[(16 * (t - t0) + n) * blockDim.x] = h;
                        membrane[n] = neuron.reset(h);
                    }
                }
                for (long long t = t1 - 1; t >= t0; --t) {
                    const long long step = t * heads + pairs.head;
                    float d[4][4], c[4 * kWords][4];
                    unsigned left[kParts][4];
                    pairs.gradients(t, d);
#pragma unroll
                    for (int n = 0; n < 16; ++n) {
                        const float h = kept[(16 * (t - t0) + n) * blockDim.x];
                        float carry = kept_carry[n * blockDim.x];
                        const float of_h = neuron.grad_h<false>(d[n / 4][n % 4], carry, h);
                        const float of_m = __fmul_rn(neuron.step_back<false>(of_h, carry), pairs.factor(scales, t, n));
                        d[n / 4][n % 4] = pairs.sees(n) ? of_m : 0.0f;
                        kept_carry[n * blockDim.x] = carry;
                    }
#pragma unroll
                    for (int n = 0; n < 16 * kWords; ++n) c[n / 4][n % 4] = 0.0f;
                    if (pairs.numbers) {
                        const Source& other = kOfKeys ? from_q : from_k;
                        const auto row = [&](int j) {
                            return other.row(t, pairs.head / (unsigned)H, pairs.head % (unsigned)H, pairs.j0 + j);
                        };
                        multiply_numbers(d, row, E, shared, c);
                    } else {
                        const unsigned* columns = (kOfKeys ? columns_q : columns_k) + step * groups * 32 * kWords;
#pragma unroll
                        for (int half = 0; half < 2; ++half) {
                            as_left<kParts>(d, half, left);
                            add_spikes<kParts>(left, columns, pairs.j0 + 16 * half, c);
                        }
                    }
                    add_rows(c, pairs.i0, pairs.rows(), pairs.j0 == start, to + step * pairs.rows() * 32 * kWords);
                    if (!kOfKeys) continue;
#pragma unroll
                    for (int n = 0; n < 16; ++n)
                        d[n / 4][n % 4] = neuron.fires(kept[(16 * (t - t0) + n) * blockDim.x]) ? 1.0f : 0.0f;
#pragma unroll
                    for (int n = 0; n < 16 * kWords; ++n) c[n / 4][n % 4] = 0.0f;
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        as_left<1>(d, half, left);
                        add_gradients(left, pairs.grads(t), pairs.j0 + 16 * half, L, c);
                    }
                    add_rows(c, pairs.i0, S, pairs.j0 == start, to_v + step * S * 32 * kWords);
                }
            }
        }
    }
}

#endif
