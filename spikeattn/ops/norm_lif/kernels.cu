// LayerNorm over the last axis, then LIF over all T steps: definition in reference.py, launch and bytes in README.md.
//
// x: [T, R, D], or [1, R, D] if kStatic, R rows of D; mask: [R], true where the current is zero, or null; v0: [R,
// D]; if kScalarV0 one number, or null for v_reset; v_last: [R, D]; mean, rstd: [T or 1, R]; contiguous. State float.
// Launch: a block of kThreads threads owns a row and walks over t; a thread holds kElements elements, kVector
// neighbours at a time, the first kInside surely within the row: D <= kThreads * kElements, and kVector divides D. Grid
// (any, 1, 1) strides over the rows. A warp has a block of its own: the compiler then knows what all its lanes share.

constexpr int kMaxElements = 32;  // of kElements

// Where in its row element e of this thread lies: vectors of the threads beside each other, then the next of each.
__device__ inline int lane_place() { return (int)threadIdx.x * kVector; }
__device__ inline int place(int e) { return lane_place() + e / kVector * kVector * kThreads + e % kVector; }
__device__ inline bool is_inside(int e, int D) { return e < kInside || place(e) < D; }

// Zero outside. Loads are not guarded: after a branch a conversion from 16 bits would wait for each of them; what lies
// outside is read elsewhere in the row.
template <class T>
__device__ inline void load_row(const T* row, int D, float* to)
{
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
        if (e % kVector == 0) load(row + (is_inside(e, D) ? place(e) : 0), to + e);
        if (!is_inside(e, D)) to[e] = 0.0f;
    }
}

// V[0] of a row; one number for all if kScalarV0, at rest if there is none.
__device__ inline void load_v0(const float* v0, float v_rest, long long row, int D, float* v)
{
    if (!kScalarV0) return load_row(v0 + row * D, D, v);
#pragma unroll
    for (int e = 0; e < kElements; ++e) v[e] = v0 ? *v0 : v_rest;
}

template <class How = Cached, class T>
__device__ inline void store_row(T* row, int D, const float* from)
{
#pragma unroll
    for (int e = 0; e < kElements; e += kVector)
        if (is_inside(e, D)) store<How>(row + place(e), from + e);
}

// A step of a row as it lies in memory: a load is on its way until its first use. Zero outside.
struct Step {
    __align__(16) unsigned words[kMaxElements];  // as many elements in each as fit, but no two vectors

    // From this thread's place in a row; nothing is read, and all is zero, if not `wanted`.
    template <class How>
    __device__ void fetch(const storage* from, int D, bool wanted)
    {
        const int bytes = kVector * (int)sizeof(storage), size = bytes < 4 ? 1 : bytes / 4;
#pragma unroll
        for (int e = 0; e < kElements; e += kVector) {
            unsigned* to = words + e / kVector * size;
            if (wanted && is_inside(e, D)) {
                move<How>(reinterpret_cast<storage*>(to), from + e * kThreads);
            } else {
#pragma unroll
                for (int i = 0; i < size; ++i) to[i] = 0;
            }
        }
    }

    __device__ static float part(unsigned word, int, f32) { return __uint_as_float(word); }

    template <class T>
    __device__ static float part(unsigned word, int i, T x)
    {
        x.bits = (unsigned short)(word >> 16 * i);
        return to_float(x);
    }

    __device__ float element(int e) const
    {
        const int in_word = sizeof(storage) == 4 || kVector == 1 ? 1 : 2;
        return part(words[e / in_word], e % in_word, storage());
    }
};

__device__ inline float normal(float x, float mean, float rstd) { return __fmul_rn(__fsub_rn(x, mean), rstd); }

// `count` sums over a warp at once, a power of two; sum i comes out in lanes 32 / count * i and on. With each halving
// of the lanes that a sum is spread over, a lane keeps half of the sums: lanes 16 apart first, then 8, 4, 2 and 1.
__device__ inline float warp_sums(int count, float* x)
{
    int apart = 16;
#pragma unroll
    for (int n = count / 2; n > 0; n /= 2, apart /= 2)
#pragma unroll
        for (int i = 0; i < n; ++i) {
            const bool upper = threadIdx.x & apart;
            const float give = upper ? x[i] : x[i + n];
            x[i] = __fadd_rn(upper ? x[i + n] : x[i], __shfl_xor_sync(0xFFFFFFFFu, give, apart));
        }
#pragma unroll
    for (; apart > 0; apart /= 2) x[0] = __fadd_rn(x[0], __shfl_xor_sync(0xFFFFFFFFu, x[0], apart));
    return x[0];
}

// Sum over a row as `ordered_sum` of the definition has it. 32 threads hold four of its 128 partial sums each, which
// are neighbours if kVector is 4 and else 32 apart; 128 threads, with kVector 1, hold one. Uses 128 floats of shared
// memory if threads are 128.
__device__ inline float ordered_sum(const float* x)
{
    const int mine = 128 / kThreads;
    float partial[4];
#pragma unroll
    for (int e = 0; e < kElements; ++e) partial[e % mine] = e < mine ? x[e] : __fadd_rn(partial[e % mine], x[e]);
    if (kVector == 4) {
        float sum = warp_sums(4, partial);
        sum = __fadd_rn(sum, __shfl_xor_sync(0xFFFFFFFFu, sum, 16));
        return __fadd_rn(sum, __shfl_xor_sync(0xFFFFFFFFu, sum, 8));
    }
    if (kThreads == 32)
        return warp_sum(__fadd_rn(__fadd_rn(partial[0], partial[2]), __fadd_rn(partial[1], partial[3])));
    SPK_DYNAMIC_SMEM(float, sums);
    __syncthreads();  // the sum before this one has been read
    sums[threadIdx.x] = partial[0];
    __syncthreads();
    const float* lane = sums + threadIdx.x % 32;
    return warp_sum(__fadd_rn(__fadd_rn(lane[0], lane[64]), __fadd_rn(lane[32], lane[96])));
}

#ifdef SPK_FORWARD

// sum / D, where D is a power of two that is known by a product, which has the same bits.
__device__ inline float over_row(float sum, int D)
{
    const int full = kThreads * kElements;
    if (kInside == kElements && (full & (full - 1)) == 0) return __fmul_rn(sum, 1.0f / (float)full);
    return __fdiv_rn(sum, (float)D);
}

// Writes spikes, the last potential, mean and rstd. Moves 2 elements of storage a neuron-step.
SPK_ENTRY(spk_norm_lif_forward)(
    const storage* SPK_RESTRICT x, const float* SPK_RESTRICT weight, const float* SPK_RESTRICT bias,
    const bool* SPK_RESTRICT mask, const float* SPK_RESTRICT v0, storage* SPK_RESTRICT spikes,
    float* SPK_RESTRICT v_last, float* SPK_RESTRICT mean, float* SPK_RESTRICT rstd, long long T, long long R,
    long long D, float eps, float leak, float v_threshold, float v_reset)
{
    const Neuron neuron = {leak, v_threshold, v_reset, 0.0f, 0.0f};
    const int width = (int)D;
    float w[kElements], b[kElements];
    load_row(weight, width, w);
    load_row(bias, width, b);
    for (long long row = blockIdx.x; row < R; row += gridDim.x) {
        const bool masked = mask && mask[row];
        float v[kElements], current[kElements], s[kElements];
        Step next;
        load_v0(v0, v_reset, row, width, v);
        next.fetch<Cached>(x + row * D + lane_place(), width, true);
        for (long long t = 0; t < T; ++t) {
            const long long at = t * R + row;
            if (!kStatic || t == 0) {
#pragma unroll
                for (int e = 0; e < kElements; ++e) current[e] = next.element(e);
                // The next step is on its way while this one is summed.
                if (!kStatic) next.fetch<Cached>(x + (at + R) * D + lane_place(), width, t + 1 < T);
                const float m = over_row(ordered_sum(current), width);
#pragma unroll
                for (int e = 0; e < kElements; ++e) {
                    const float centred = is_inside(e, width) ? __fsub_rn(current[e], m) : 0.0f;
                    s[e] = __fmul_rn(centred, centred);
                }
                const float variance = over_row(ordered_sum(s), width);
                const float rs = __frcp_rn(__fsqrt_rn(__fadd_rn(variance, eps)));
                if (threadIdx.x == 0) {
                    mean[at] = m;
                    rstd[at] = rs;
                }
#pragma unroll
                for (int e = 0; e < kElements; ++e)
                    current[e] = masked ? 0.0f : __fadd_rn(__fmul_rn(normal(current[e], m, rs), w[e]), b[e]);
            }
#pragma unroll
            for (int e = 0; e < kElements; ++e) {
                const float h = neuron.charge<false>(current[e], v[e]);
                s[e] = neuron.fires(h) ? 1.0f : 0.0f;
                v[e] = neuron.reset(h);
            }
            store_row(spikes + at * D, width, s);
        }
        store_row(v_last + row * D, width, v);
    }
}

#endif
#ifdef SPK_BACKWARD

constexpr int kMaxSteps = 4, kMaxHeld = 8;  // of kSteps and of kElements, on the way back

__device__ inline float from_lane(float x, int lane)
{
    return __uint_as_float(__shfl_sync(0xFFFFFFFFu, __float_as_uint(x), lane));
}

// The input of one row. Masked, it is not read: zeros, of which a bias of zero makes currents of zero.
struct Row {
    const storage* x;  // this thread's place in step 0
    const float *mean, *rstd;
    long long R, stride;  // elements from a step to the next
    int T, D;
    bool masked;

    __device__ const storage* at(int t) const { return x + (kStatic ? 0 : t * stride); }
    // How far on step t + 1 is: nowhere, if t is the last.
    __device__ long long next(int t) const { return kStatic || (!kWhole && t + 1 >= T) ? 0 : stride; }

    // Mean and reciprocal deviation of step first + k in lane k.
    __device__ void fetch_norms(int first, float& m, float& rs) const
    {
        const int t = first + (int)threadIdx.x % kSteps;
        const long long at = kStatic ? 0 : (kWhole || t < T ? t : T - 1) * R;
        m = masked ? 0.0f : mean[at];
        rs = masked ? 0.0f : rstd[at];
    }
};

// Brings V over `count` steps from t0, whole batches of kSteps; keeps V before each batch in kept [batches][kThreads *
// kElements] unless null. Every step of the next batch is on its way as soon as that of this one has been used.
__device__ inline void scan(
    const Neuron& neuron, const Row& row, const float* weight, const float* bias, const float* same, int t0, int count,
    float* v, float* kept)
{
    Step step[kMaxSteps];
    float m, rs;
    const storage* x = row.at(t0);
    if (!kStatic) row.fetch_norms(t0, m, rs);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
        if (!kStatic) step[k].fetch<Cached>(x, row.D, !row.masked);
        x += row.next(t0 + k);
    }
    for (int t = t0; t < t0 + count; t += kSteps) {
        if (kept) {
#pragma unroll
            for (int e = 0; e < kElements; e += kVector) store(kept + place(e), v + e);
            kept += kThreads * kElements;
        }
        const float m_batch = m, rs_batch = rs;
        if (!kStatic) row.fetch_norms(t + kSteps, m, rs);
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
            float current[kElements];
            if (kStatic) {
#pragma unroll
                for (int e = 0; e < kElements; ++e) current[e] = same[e];
            } else {
                const float m_t = from_lane(m_batch, k), rs_t = from_lane(rs_batch, k);
#pragma unroll
                for (int e = 0; e < kElements; ++e)
                    current[e] = __fadd_rn(__fmul_rn(normal(step[k].element(e), m_t, rs_t), weight[e]), bias[e]);
                step[k].fetch<Cached>(x, row.D, !row.masked);
                x += row.next(t + kSteps + k);
            }
#pragma unroll
            for (int e = 0; e < kElements; ++e) v[e] = neuron.reset(neuron.charge<false>(current[e], v[e]));
        }
    }
}

// `count` sums over a row at once, a power of two, in a fixed order. Uses 2 count kThreads / 32 floats of shared memory
// if threads are over 32; sums take turns in its halves, so that one barrier is enough.
__device__ inline void row_sums(int count, float* x, float* shared, int& turn)
{
    const int lanes = 32 / count, lane = threadIdx.x % 32, warps = kThreads / 32;
    float sum = warp_sums(count, x);
    if (kThreads > 32) {
        float* sums = shared + turn * count * warps;
        turn = 1 - turn;
        if (lane % lanes == 0) sums[threadIdx.x / 32 * count + lane / lanes] = sum;
        __syncthreads();
        sum = 0.0f;
#pragma unroll 4
        for (int w = 0; w < warps; ++w) sum = __fadd_rn(sum, sums[w * count + lane / lanes]);
    }
#pragma unroll
    for (int i = 0; i < count; ++i) x[i] = from_lane(sum, i * lanes);
}

// From g = dL/d current and the normalised n of `count` steps of a row, a power of two: writes grad_x, a step `stride`
// after the other, and adds to the gradients of weight and bias. Changes g. Means are over the row:
// grad_x = rstd * (g w - mean(g w) - n mean(g w n)). Writes the first `valid` steps; g of the rest is zero.
__device__ inline void norm_back(
    int count, int valid, float (*g)[kMaxHeld], const float (*n)[kMaxHeld], const float* rstd,
    const float* weight, const Row& row, storage* grad_x, long long stride, float* grad_weight, float* grad_bias,
    float* shared, int& turn)
{
    if (row.masked) {
#pragma unroll
        for (int k = 0; k < count; ++k) {
#pragma unroll
            for (int e = 0; e < kElements; ++e) g[k][e] = 0.0f;
            if (k < valid) store_row<WrittenOnce>(grad_x + k * stride, row.D, g[k]);
        }
        return;
    }
    float sums[2 * kMaxSteps];
#pragma unroll
    for (int k = 0; k < count; ++k) {
        float sum = 0.0f, sum_n = 0.0f;
#pragma unroll
        for (int e = 0; e < kElements; ++e) {
            grad_weight[e] = __fmaf_rn(g[k][e], n[k][e], grad_weight[e]);
            grad_bias[e] = __fadd_rn(grad_bias[e], g[k][e]);
            g[k][e] = __fmul_rn(g[k][e], weight[e]);
            sum = __fadd_rn(sum, g[k][e]);
            sum_n = __fmaf_rn(g[k][e], n[k][e], sum_n);
        }
        sums[2 * k] = sum;
        sums[2 * k + 1] = sum_n;
    }
    row_sums(2 * count, sums, shared, turn);
    const float share = __frcp_rn((float)row.D);
#pragma unroll
    for (int k = 0; k < count; ++k) {
        const float mean_g = __fmul_rn(sums[2 * k], share), mean_n = __fmul_rn(sums[2 * k + 1], share);
#pragma unroll
        for (int e = 0; e < kElements; ++e)
            g[k][e] = __fmul_rn(rstd[k], __fmaf_rn(-n[k][e], mean_n, __fsub_rn(g[k][e], mean_g)));
        if (k < valid) store_row<WrittenOnce>(grad_x + k * stride, row.D, g[k]);
    }
}

// As lif_backward, by segments of `steps` steps, batches of kSteps of which only the last of all may be short; kWhole:
// it is not. A first walk over a segment keeps V before each batch in shared memory; then, from the last batch to the
// first, H of a batch is computed again and stays in registers until its sums over the row are there. V at the start of
// every segment but the first goes to checkpoints [(T - 1) / steps, R, D]. Writes grad_x (static steps are summed from
// the last to the first), grad_v0 and, for each block, partial sums of the gradients of weight and bias to partials
// [gridDim.x, 2, D]. Dynamic shared memory: what row_sums uses for a batch, then kThreads * kElements floats for each
// batch of a segment but the last. Moves 3 elements of storage a neuron-step (4 with checkpoints, which add 8 / steps
// bytes), and x once more, for which the other two leave room in the cache. Registers leave room for kBlocks blocks on
// a multiprocessor.
SPK_ENTRY(spk_norm_lif_backward, __launch_bounds__(kThreads, kBlocks))(
    const storage* SPK_RESTRICT grad_spikes, const float* SPK_RESTRICT grad_v, const storage* SPK_RESTRICT x,
    const float* SPK_RESTRICT weight, const float* SPK_RESTRICT bias, const bool* SPK_RESTRICT mask,
    const float* SPK_RESTRICT v0, const float* SPK_RESTRICT mean, const float* SPK_RESTRICT rstd,
    storage* SPK_RESTRICT grad_x, float* SPK_RESTRICT grad_v0, float* SPK_RESTRICT partials, float* checkpoints,
    long long T, long long R, long long D, long long steps, float leak, float v_threshold, float v_reset, float a,
    float b)
{
    const Neuron neuron = {leak, v_threshold, v_reset, a, b};
    const int width = (int)D, last_segment = (int)((T - 1) / steps), kept_row = kThreads * kElements;
    SPK_DYNAMIC_SMEM(float, shared);
    float* kept = shared + (kThreads > 32 ? 2 * 2 * kSteps * kThreads / 32 : 0);
    int turn = 0;
    float w[kElements], grad_w[kElements], grad_b[kElements];
    load_row(weight, width, w);
#pragma unroll
    for (int e = 0; e < kElements; ++e) grad_w[e] = grad_b[e] = 0.0f;
    for (long long r = blockIdx.x; r < R; r += gridDim.x) {
        const Row row = {x + r * D + lane_place(), mean + r, rstd + r, R, R * D, (int)T, width, mask && mask[r]};
        float bi[kElements], v[kElements], carry[kElements], total[1][kMaxHeld], same[kElements];
        load_row(bias, width, bi);
        load_v0(v0, v_reset, r, width, v);
        Step only;
        float m_only, rs_only;
        if (kStatic) {
            only.fetch<ReadOnce>(row.x, width, !row.masked);
            row.fetch_norms(0, m_only, rs_only);
        }
#pragma unroll
        for (int e = 0; e < kElements; ++e) {
            if (row.masked) bi[e] = 0.0f;
            carry[e] = total[0][e] = 0.0f;
            if (kStatic) same[e] = __fadd_rn(__fmul_rn(normal(only.element(e), m_only, rs_only), w[e]), bi[e]);
        }
        for (int segment = 0; segment < last_segment; ++segment) {
            scan(neuron, row, w, bi, same, segment * (int)steps, (int)steps, v, nullptr);
            store_row(checkpoints + (segment * R + r) * D, width, v);
        }
        if (grad_v) load_row(grad_v + r * D, width, carry);
        for (int segment = last_segment; segment >= 0; --segment) {
            const int t0 = segment * (int)steps, t1 = segment < last_segment ? t0 + (int)steps : (int)T;
            if (segment) load_row(checkpoints + ((segment - 1) * R + r) * D, width, v);
            else load_v0(v0, v_reset, r, width, v);
            int batch = (t1 - t0 - 1) / kSteps;
            scan(neuron, row, w, bi, same, t0, batch * kSteps, v, kept);
            for (;;) {
                const int first = t0 + batch * kSteps;
                Step step[kMaxSteps], grads[2];
                float n[kMaxSteps][kMaxHeld], g[kMaxSteps][kMaxHeld];  // g is H at first
                float m, rs, rs_all[kMaxSteps];
                const storage* x_t = row.at(first);
                if (!kStatic) row.fetch_norms(first, m, rs);
#pragma unroll
                for (int k = 0; k < kSteps; ++k) {
                    if (!kStatic) step[k].fetch<ReadOnce>(x_t, width, !row.masked);
                    if (k + 1 < kSteps) x_t += row.next(first + k);
                }
                const int end = kWhole || first + kSteps <= T ? first + kSteps : (int)T;
                const storage* grad_t = grad_spikes + ((end - 1) * R + r) * D + lane_place();
#pragma unroll
                for (int k = kSteps - 1; k >= 0 && k >= kSteps - 2; --k) {
                    grads[k % 2].fetch<ReadOnce>(grad_t, width, true);
                    if (kWhole || first + k < T) grad_t -= row.stride;
                }
#pragma unroll
                for (int k = 0; k < kSteps; ++k) {
                    const float m_t = kStatic ? 0.0f : from_lane(m, k);
                    rs_all[k] = kStatic ? 0.0f : from_lane(rs, k);
#pragma unroll
                    for (int e = 0; e < kElements; ++e) {
                        n[k][e] = kStatic ? 0.0f : normal(step[k].element(e), m_t, rs_all[k]);
                        const float current = kStatic ? same[e] : __fadd_rn(__fmul_rn(n[k][e], w[e]), bi[e]);
                        g[k][e] = neuron.charge<false>(current, v[e]);
                        v[e] = neuron.reset(g[k][e]);
                    }
                }
#pragma unroll
                for (int k = kSteps - 1; k >= 0; --k) {
                    if (kWhole || first + k < T) {
#pragma unroll
                        for (int e = 0; e < kElements; ++e) {
                            const float grad_h = neuron.grad_h<false>(grads[k % 2].element(e), carry[e], g[k][e]);
                            g[k][e] = neuron.step_back<false>(grad_h, carry[e]);
                            total[0][e] = __fadd_rn(total[0][e], g[k][e]);
                        }
                    } else {
#pragma unroll
                        for (int e = 0; e < kElements; ++e) g[k][e] = 0.0f;
                    }
                    if (k < 2) continue;
                    grads[k % 2].fetch<ReadOnce>(grad_t, width, true);
                    if (kWhole || first + k - 2 < T) grad_t -= row.stride;
                }
                storage* to = grad_x + (first * R + r) * D;
                if (!kStatic)
                    norm_back(kSteps, end - first, g, n, rs_all, w, row, to, R * D, grad_w, grad_b, shared, turn);
                if (batch-- == 0) break;
#pragma unroll
                for (int e = 0; e < kElements; e += kVector) load(kept + batch * kept_row + place(e), v + e);
            }
        }
        if (kStatic) {
            float n[1][kMaxHeld];
#pragma unroll
            for (int e = 0; e < kElements; ++e) n[0][e] = normal(only.element(e), m_only, rs_only);
            norm_back(1, 1, total, n, &rs_only, w, row, grad_x + r * D, 0, grad_w, grad_b, shared, turn);
        }
        if (grad_v0) store_row(grad_v0 + r * D, width, carry);
    }
    store_row(partials + (long long)blockIdx.x * 2 * D, width, grad_w);
    store_row(partials + ((long long)blockIdx.x * 2 + 1) * D, width, grad_b);
}

#endif
