// LayerNorm over the last axis, then LIF over all T steps: definition in reference.py, launch and bytes in README.md.
//
// x: [T, R, D], or [1, R, D] if kStatic, R rows of D; mask: [R], true where the current is zero, or null; v0: [R,
// D]; if kScalarV0 one number, or null for v_reset; v_last: [R, D]; mean, rstd: [T or 1, R]; contiguous. State float.
// Launch: kThreads threads own a row and walk over t; thread r holds kElements elements, so D <= kThreads * kElements,
// equal if kFull: r, r + kThreads, ..., or neighbours if kContiguous, where kVector = kElements divides D. Blocks of
// max(kThreads, 128) threads; grid (any, 1, 1) strides over the rows. kBatch: steps whose loads and sums go together on
// the way back.

// The row of this thread's group before striding, and how far a stride goes.
__device__ inline long long first_row() { return ((long long)blockIdx.x * blockDim.x + threadIdx.x) / kThreads; }
__device__ inline long long row_stride() { return (long long)gridDim.x * blockDim.x / kThreads; }

// Where in its row element e of this thread lies.
__device__ inline int place(int e)
{
    const int r = threadIdx.x % kThreads;
    return kContiguous ? kElements * r + e : kThreads * e + r;
}

__device__ inline bool is_inside(int e, long long D) { return kFull || place(e) < D; }

// Zero outside. Loads are not guarded: after a branch a conversion from 16 bits would wait for each of them; what lies
// outside is read elsewhere in the row.
template <class T>
__device__ inline void load_row(const T* row, long long D, float* to)
{
    if (kContiguous) load(row + (is_inside(0, D) ? place(0) : 0), to);
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
        if (!kContiguous) to[e] = to_float(row[is_inside(e, D) ? place(e) : 0]);
        if (!is_inside(e, D)) to[e] = 0.0f;
    }
}

// V[0] of a row; one number for all if kScalarV0, at rest if there is none.
__device__ inline void load_v0(const float* v0, float v_rest, long long row, long long D, float* v)
{
    if (!kScalarV0) return load_row(v0 + row * D, D, v);
#pragma unroll
    for (int e = 0; e < kElements; ++e) v[e] = v0 ? *v0 : v_rest;
}

template <class T>
__device__ inline void store_row(T* row, long long D, const float* from)
{
    if (kContiguous) {
        if (is_inside(0, D)) store(row + place(0), from);
        return;
    }
#pragma unroll
    for (int e = 0; e < kElements; ++e)
        if (is_inside(e, D)) from_float(row[place(e)], from[e]);
}

// Sum over a row as `ordered_sum` of the definition has it, for 32 or 128 threads: thread r holds the partial sums r,
// r + kThreads, ... of 128. Uses 128 floats of shared memory if threads are 128.
__device__ inline float ordered_sum(const float* x)
{
    const int mine = 128 / kThreads;
    float partial[4];
#pragma unroll
    for (int e = 0; e < kElements; ++e) partial[e % mine] = e < mine ? x[e] : __fadd_rn(partial[e % mine], x[e]);
    if (kThreads == 32)
        return warp_sum(__fadd_rn(__fadd_rn(partial[0], partial[2]), __fadd_rn(partial[1], partial[3])));
    SPK_DYNAMIC_SMEM(float, sums);
    __syncthreads();  // the sum before this one has been read
    sums[threadIdx.x] = partial[0];
    __syncthreads();
    const float* lane = sums + threadIdx.x % 32;
    return warp_sum(__fadd_rn(__fadd_rn(lane[0], lane[64]), __fadd_rn(lane[32], lane[96])));
}

// 2 kBatch sums over a row at once, in any fixed order: their shuffles overlap, and they share the barriers. Uses
// kBatch kThreads / 16 floats of shared memory if threads are over 32.
__device__ inline void row_sums(float* x)
{
    const int count = 2 * kBatch, warps = kThreads / 32;
#pragma unroll
    for (int i = 0; i < count; ++i) x[i] = warp_sum(x[i]);
    if (kThreads == 32) return;
    SPK_DYNAMIC_SMEM(float, sums);
    __syncthreads();  // the sums before these have been read
#pragma unroll
    for (int i = 0; i < count; ++i)
        if (threadIdx.x % 32 == 0) sums[i * warps + threadIdx.x / 32] = x[i];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < count; ++i) {
        x[i] = 0.0f;
        for (int w = 0; w < warps; ++w) x[i] = __fadd_rn(x[i], sums[i * warps + w]);
    }
}

// Replaces x by (x - mean) * rstd * weight + bias.
__device__ inline void normalise(float* x, float mean, float rstd, const float* weight, const float* bias, bool masked)
{
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
        const float normal = __fmul_rn(__fsub_rn(x[e], mean), rstd);
        x[e] = masked ? 0.0f : __fadd_rn(__fmul_rn(normal, weight[e]), bias[e]);
    }
}

#ifdef SPK_FORWARD

// Writes spikes, the last potential, mean and rstd. Moves 2 elements of storage a neuron-step.
SPK_ENTRY(spk_norm_lif_forward)(
    const storage* SPK_RESTRICT x, const float* SPK_RESTRICT weight, const float* SPK_RESTRICT bias,
    const bool* SPK_RESTRICT mask, const float* SPK_RESTRICT v0, storage* SPK_RESTRICT spikes,
    float* SPK_RESTRICT v_last, float* SPK_RESTRICT mean, float* SPK_RESTRICT rstd, long long T, long long R,
    long long D, float eps, float leak, float v_threshold, float v_reset)
{
    const Neuron neuron = {leak, v_threshold, v_reset, 0.0f, 0.0f};
    const int r = threadIdx.x % kThreads;
    float w[kElements], b[kElements];
    load_row(weight, D, w);
    load_row(bias, D, b);
    for (long long row = first_row(); row < R; row += row_stride()) {
        const bool masked = mask && mask[row];
        float v[kElements], next[kElements], current[kElements], s[kElements];
        load_v0(v0, v_reset, row, D, v);
        load_row(x + row * D, D, next);
        for (long long t = 0; t < T; ++t) {
            if (!kStatic || t == 0) {
#pragma unroll
                for (int e = 0; e < kElements; ++e) current[e] = next[e];
                // The next row is on its way while this one is summed.
                if (!kStatic && t + 1 < T) load_row(x + ((t + 1) * R + row) * D, D, next);
                const float m = __fdiv_rn(ordered_sum(current), (float)D);
#pragma unroll
                for (int e = 0; e < kElements; ++e) {
                    const float centred = is_inside(e, D) ? __fsub_rn(current[e], m) : 0.0f;
                    s[e] = __fmul_rn(centred, centred);
                }
                const float variance = __fdiv_rn(ordered_sum(s), (float)D);
                const float rs = __frcp_rn(__fsqrt_rn(__fadd_rn(variance, eps)));
                if (r == 0) {
                    mean[t * R + row] = m;
                    rstd[t * R + row] = rs;
                }
                normalise(current, m, rs, w, b, masked);
            }
#pragma unroll
            for (int e = 0; e < kElements; ++e) {
                const float h = neuron.charge(current[e], v[e]);
                s[e] = neuron.fires(h) ? 1.0f : 0.0f;
                v[e] = neuron.reset(h);
            }
            store_row(spikes + (t * R + row) * D, D, s);
        }
        store_row(v_last + row * D, D, v);
    }
}

#endif
#ifdef SPK_BACKWARD

// From grad = dL/d current and x of `count` steps of a row, which may be changed: writes grad_x, a step `stride` before
// the other, and adds to the gradients of weight and bias. With n the normalised row,
// grad_x = rstd * (g w - mean(g w) - n mean(g w n)).
__device__ inline void norm_back(
    int count, float* grad, float* x, const float* mean, const float* rstd, const float* weight, long long D,
    storage* grad_x, long long stride, float* grad_weight, float* grad_bias)
{
    float sums[2 * kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
        float sum = 0.0f, sum_n = 0.0f;
        if (k < count) {
#pragma unroll
            for (int e = 0; e < kElements; ++e) {
                const int i = k * kElements + e;
                const float g = grad[i], n = __fmul_rn(__fsub_rn(x[i], mean[k]), rstd[k]);
                grad_weight[e] = __fadd_rn(grad_weight[e], __fmul_rn(g, n));
                grad_bias[e] = __fadd_rn(grad_bias[e], g);
                const float scaled = is_inside(e, D) ? __fmul_rn(g, weight[e]) : 0.0f;
                sum = __fadd_rn(sum, scaled);
                sum_n = __fadd_rn(sum_n, __fmul_rn(scaled, n));
                grad[i] = scaled;
                x[i] = n;
            }
        }
        sums[2 * k] = sum;
        sums[2 * k + 1] = sum_n;
    }
    row_sums(sums);
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
        if (k >= count) break;
        const float mean_g = __fdiv_rn(sums[2 * k], (float)D), mean_n = __fdiv_rn(sums[2 * k + 1], (float)D);
#pragma unroll
        for (int i = k * kElements; i < (k + 1) * kElements; ++i)
            x[i] = __fmul_rn(rstd[k], __fsub_rn(__fsub_rn(grad[i], mean_g), __fmul_rn(x[i], mean_n)));
        store_row(grad_x - k * stride, D, x + k * kElements);
    }
}

// Brings V from step t0 to step t1; keeps H[t0 ... t1 - 1] in trajectory [steps][kElements][kThreads] unless null.
__device__ inline void scan(
    const Neuron& neuron, const storage* x, const float* mean, const float* rstd, const float* weight,
    const float* bias, bool masked, long long t0, long long t1, long long R, long long row, long long D, float* v,
    float* trajectory)
{
    float current[kBatch][kElements], m[kBatch], rs[kBatch];
    for (long long t = t0; t < t1; t += kBatch) {
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
            const long long at = (kStatic ? 0 : t + k < t1 ? t + k : t1 - 1) * R + row;
            load_row(x + at * D, D, current[k]);
            m[k] = mean[at];
            rs[k] = rstd[at];
        }
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
            if (t + k >= t1) break;
            normalise(current[k], m[k], rs[k], weight, bias, masked);
#pragma unroll
            for (int e = 0; e < kElements; ++e) {
                const float h = neuron.charge(current[k][e], v[e]);
                v[e] = neuron.reset(h);
                if (trajectory) trajectory[((t + k - t0) * kElements + e) * kThreads + threadIdx.x % kThreads] = h;
            }
        }
    }
}

// As lif_backward, but H of a segment of `steps` steps lies in shared memory, where a long loop needs no unrolling: a
// row that is normalised has sums at every step. V at the start of every segment but the first goes to checkpoints
// [(T - 1) / steps, R, D]. Writes grad_x (static steps are summed from the last to the first), grad_v0 and, a group of
// kThreads threads each, one row of partial sums of the gradients of weight and bias to partials
// [gridDim.x * blockDim.x / kThreads, 2, D]. Dynamic shared memory: kBatch kThreads / 16 floats, then blockDim.x *
// kElements * steps. Moves 3 elements of storage a neuron-step (4 with checkpoints, which add 8 / steps
// bytes) and one more that was read shortly before.
SPK_ENTRY(spk_norm_lif_backward, __launch_bounds__(kThreads > 256 ? kThreads : 256, 1))(
    const storage* SPK_RESTRICT grad_spikes, const float* SPK_RESTRICT grad_v, const storage* SPK_RESTRICT x,
    const float* SPK_RESTRICT weight, const float* SPK_RESTRICT bias, const bool* SPK_RESTRICT mask,
    const float* SPK_RESTRICT v0, const float* SPK_RESTRICT mean, const float* SPK_RESTRICT rstd,
    storage* SPK_RESTRICT grad_x, float* SPK_RESTRICT grad_v0, float* SPK_RESTRICT partials, float* checkpoints,
    long long T, long long R, long long D, long long steps, float leak, float v_threshold, float v_reset, float a,
    float b)
{
    const Neuron neuron = {leak, v_threshold, v_reset, a, b};
    const long long last_segment = (T - 1) / steps;
    const int r = threadIdx.x % kThreads;
    SPK_DYNAMIC_SMEM(float, smem);
    float* trajectory = smem + kBatch * kThreads / 16 + threadIdx.x / kThreads * steps * kElements * kThreads;
    float w[kElements], bi[kElements], grad_w[kElements], grad_b[kElements];
    load_row(weight, D, w);
    load_row(bias, D, bi);
#pragma unroll
    for (int e = 0; e < kElements; ++e) grad_w[e] = grad_b[e] = 0.0f;
    for (long long row = first_row(); row < R; row += row_stride()) {
        const bool masked = mask && mask[row];
        float v[kElements], carry[kElements], total[kElements];
        load_v0(v0, v_reset, row, D, v);
        for (long long segment = 0; segment < last_segment; ++segment) {
            const long long t0 = segment * steps;
            scan(neuron, x, mean, rstd, w, bi, masked, t0, t0 + steps, R, row, D, v, nullptr);
            store_row(checkpoints + (segment * R + row) * D, D, v);
        }
#pragma unroll
        for (int e = 0; e < kElements; ++e) carry[e] = total[e] = 0.0f;
        if (grad_v) load_row(grad_v + row * D, D, carry);
        for (long long segment = last_segment; segment >= 0; --segment) {
            const long long t0 = segment * steps;
            const long long t1 = t0 + steps < T ? t0 + steps : T;
            if (segment) load_row(checkpoints + ((segment - 1) * R + row) * D, D, v);
            else load_v0(v0, v_reset, row, D, v);
            scan(neuron, x, mean, rstd, w, bi, masked, t0, t1, R, row, D, v, trajectory);
            for (long long t = t1 - 1; t >= t0; t -= kBatch) {
                float grad[kBatch * kElements], x_t[kBatch * kElements], m[kBatch], rs[kBatch];
#pragma unroll
                for (int k = 0; k < kBatch; ++k) {
                    const long long at = (t - k > t0 ? t - k : t0) * R + row;
                    load_row(grad_spikes + at * D, D, grad + k * kElements);
                    if (kStatic) continue;
                    load_row(x + at * D, D, x_t + k * kElements);
                    m[k] = mean[at];
                    rs[k] = rstd[at];
                }
                const int count = t - t0 + 1 < kBatch ? (int)(t - t0 + 1) : kBatch;
#pragma unroll
                for (int k = 0; k < kBatch; ++k) {
                    if (k >= count) break;
#pragma unroll
                    for (int e = 0; e < kElements; ++e) {
                        const float h = trajectory[((t - k - t0) * kElements + e) * kThreads + r];
                        float& g = grad[k * kElements + e];
                        g = neuron.step_back(neuron.grad_h(g, carry[e], h), carry[e]);
                        if (masked) g = 0.0f;
                        total[e] = __fadd_rn(total[e], g);
                    }
                }
                if (!kStatic)
                    norm_back(count, grad, x_t, m, rs, w, D, grad_x + (t * R + row) * D, R * D, grad_w, grad_b);
            }
        }
        if (kStatic) {
            load_row(x + row * D, D, v);
            norm_back(1, total, v, mean + row, rstd + row, w, D, grad_x + row * D, 0, grad_w, grad_b);
        }
        if (grad_v0) store_row(grad_v0 + row * D, D, carry);
    }
    store_row(partials + first_row() * 2 * D, D, grad_w);
    store_row(partials + (first_row() * 2 + 1) * D, D, grad_b);
}

#endif
