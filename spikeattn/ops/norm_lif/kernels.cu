// LayerNorm over the last axis, then LIF over all T steps: definition in reference.py, launch and bytes in README.md.
//
// x: [T, R, D], or [1, R, D] if kStatic, R rows of D; mask: [R], true where the current is zero, or null; v0: [R,
// D], or one number if kScalarV0; v_last: [R, D]; mean, rstd: [T or 1, R]; contiguous. State float.
// Launch: kThreads threads own a row and walk over t; thread r holds elements r, r + kThreads, ..., kElements of them,
// so D <= kThreads * kElements. Blocks of max(kThreads, 128) threads; grid (any, 1, 1) strides over the rows.
// kBatch: steps whose loads are in flight together on the way back.

// The row of this thread's group before striding, and how far a stride goes.
__device__ inline long long first_row() { return ((long long)blockIdx.x * blockDim.x + threadIdx.x) / kThreads; }
__device__ inline long long row_stride() { return (long long)gridDim.x * blockDim.x / kThreads; }

template <class T>
__device__ inline void load_row(const T* row, long long D, float* to)
{
    const int r = threadIdx.x % kThreads;
#pragma unroll
    for (int e = 0; e < kElements; ++e) to[e] = kThreads * e + r < D ? to_float(row[kThreads * e + r]) : 0.0f;
}

// V[0] of a row; one number for all if kScalarV0.
__device__ inline void load_v0(const float* v0, long long row, long long D, float* v)
{
    if (!kScalarV0) return load_row(v0 + row * D, D, v);
#pragma unroll
    for (int e = 0; e < kElements; ++e) v[e] = *v0;
}

template <class T>
__device__ inline void store_row(T* row, long long D, const float* from)
{
    const int r = threadIdx.x % kThreads;
#pragma unroll
    for (int e = 0; e < kElements; ++e)
        if (kThreads * e + r < D) from_float(row[kThreads * e + r], from[e]);
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

// Two sums over a row at once, in any fixed order. Uses kThreads / 16 floats of shared memory if threads are over 32.
__device__ inline void row_sums(float& a, float& b)
{
    a = warp_sum(a);
    b = warp_sum(b);
    if (kThreads == 32) return;
    SPK_DYNAMIC_SMEM(float, sums);
    const int warps = kThreads / 32;
    __syncthreads();  // the sums before these have been read
    if (threadIdx.x % 32 == 0) {
        sums[threadIdx.x / 32] = a;
        sums[warps + threadIdx.x / 32] = b;
    }
    __syncthreads();
    a = b = 0.0f;
    for (int w = 0; w < warps; ++w) {
        a = __fadd_rn(a, sums[w]);
        b = __fadd_rn(b, sums[warps + w]);
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
        load_v0(v0, row, D, v);
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
                    const float centred = kThreads * e + r < D ? __fsub_rn(current[e], m) : 0.0f;
                    s[e] = __fmul_rn(centred, centred);
                }
                const float variance = __fdiv_rn(ordered_sum(s), (float)D);
                const float rs = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(variance, eps)));
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

// From grad = dL/d current and x of a row: writes grad_x and adds to the gradients of weight and bias. With n the
// normalised row, grad_x = rstd * (g w - mean(g w) - n mean(g w n)).
__device__ inline void norm_back(
    const float* grad, const float* x, float mean, float rstd, const float* weight, long long D, storage* grad_x,
    float* grad_weight, float* grad_bias)
{
    const int r = threadIdx.x % kThreads;
    float n[kElements], sum = 0.0f, sum_n = 0.0f;
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
        n[e] = __fmul_rn(__fsub_rn(x[e], mean), rstd);
        const float scaled = __fmul_rn(grad[e], weight[e]);
        const bool inside = kThreads * e + r < D;
        sum = __fadd_rn(sum, inside ? scaled : 0.0f);
        sum_n = __fadd_rn(sum_n, inside ? __fmul_rn(scaled, n[e]) : 0.0f);
        grad_weight[e] = __fadd_rn(grad_weight[e], __fmul_rn(grad[e], n[e]));
        grad_bias[e] = __fadd_rn(grad_bias[e], grad[e]);
    }
    row_sums(sum, sum_n);
    sum = __fdiv_rn(sum, (float)D);
    sum_n = __fdiv_rn(sum_n, (float)D);
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
        const float scaled = __fmul_rn(grad[e], weight[e]);
        n[e] = __fmul_rn(rstd, __fsub_rn(__fsub_rn(scaled, sum), __fmul_rn(n[e], sum_n)));
    }
    store_row(grad_x, D, n);
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
            if (t + k >= t1) break;
            const long long at = (kStatic ? 0 : t + k) * R + row;
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
// [gridDim.x * blockDim.x / kThreads, 2, D]. Dynamic shared memory: kThreads / 16 floats, then blockDim.x * kElements *
// steps. Moves 3 elements of storage a neuron-step (4 with checkpoints, which add 8 / steps bytes) and one more that
// was read shortly before.
SPK_ENTRY(spk_norm_lif_backward, __launch_bounds__(kThreads > 256 ? kThreads : 256))(
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
    float* trajectory = smem + kThreads / 16 + threadIdx.x / kThreads * steps * kElements * kThreads;
    float w[kElements], bi[kElements], grad_w[kElements], grad_b[kElements];
    load_row(weight, D, w);
    load_row(bias, D, bi);
#pragma unroll
    for (int e = 0; e < kElements; ++e) grad_w[e] = grad_b[e] = 0.0f;
    for (long long row = first_row(); row < R; row += row_stride()) {
        const bool masked = mask && mask[row];
        float v[kElements], carry[kElements], total[kElements];
        load_v0(v0, row, D, v);
        for (long long segment = 0; segment < last_segment; ++segment) {
            const long long t0 = segment * steps;
            scan(neuron, x, mean, rstd, w, bi, masked, t0, t0 + steps, R, row, D, v, nullptr);
            store_row(checkpoints + (segment * R + row) * D, D, v);
        }
        load_row(grad_v + row * D, D, carry);
#pragma unroll
        for (int e = 0; e < kElements; ++e) total[e] = 0.0f;
        for (long long segment = last_segment; segment >= 0; --segment) {
            const long long t0 = segment * steps;
            const long long t1 = t0 + steps < T ? t0 + steps : T;
            if (segment) load_row(checkpoints + ((segment - 1) * R + row) * D, D, v);
            else load_v0(v0, row, D, v);
            scan(neuron, x, mean, rstd, w, bi, masked, t0, t1, R, row, D, v, trajectory);
            for (long long t = t1 - 1; t >= t0; t -= kBatch) {
                float grad[kBatch][kElements], x_t[kBatch][kElements], m[kBatch], rs[kBatch];
#pragma unroll
                for (int k = 0; k < kBatch; ++k) {
                    if (t - k < t0) break;
                    const long long at = (t - k) * R + row;
                    load_row(grad_spikes + at * D, D, grad[k]);
                    if (kStatic) continue;
                    load_row(x + at * D, D, x_t[k]);
                    m[k] = mean[at];
                    rs[k] = rstd[at];
                }
#pragma unroll
                for (int k = 0; k < kBatch; ++k) {
                    if (t - k < t0) break;
                    const long long at = (t - k) * R + row;
#pragma unroll
                    for (int e = 0; e < kElements; ++e) {
                        const float h = trajectory[((t - k - t0) * kElements + e) * kThreads + r];
                        grad[k][e] = neuron.step_back(neuron.grad_h(grad[k][e], carry[e], h), carry[e]);
                        if (masked) grad[k][e] = 0.0f;
                        total[e] = __fadd_rn(total[e], grad[k][e]);
                    }
                    if (!kStatic) norm_back(grad[k], x_t[k], m[k], rs[k], w, D, grad_x + at * D, grad_w, grad_b);
                }
            }
        }
        if (kStatic) {
            load_row(x + row * D, D, v);
            norm_back(total, v, mean[row], rstd[row], w, D, grad_x + row * D, grad_w, grad_b);
        }
        store_row(grad_v0 + row * D, D, carry);
    }
    store_row(partials + first_row() * 2 * D, D, grad_w);
    store_row(partials + (first_row() * 2 + 1) * D, D, grad_b);
}

#endif
