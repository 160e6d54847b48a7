// LIF over all T steps: equations in op.py, their derivatives and the choice of kVector and kSteps in README.md.
//
// x: [T, N], or [1, N] if kStatic; v0: [N], if kScalarV0 one number, or null for v_reset; v_last: [N]; everything else
// [T, N]; time-major and contiguous. State float. Null where a gradient did not come in or is not wanted.
// Launch: a thread owns kVector neighbouring neurons and walks over t; blocks of 128 threads, grid (any, 1, 1), which
// strides over N. N is a multiple of kVector. One dimension, no shared memory but in lif_backward.

constexpr int kBatch = 4;  // steps whose loads are in flight together; divides kSteps

// Loads are not guarded: after a branch a conversion from 16 bits would wait for each of them. What lies outside is read
// somewhere inside, and not used.
__device__ inline long long at_most(long long x, long long most) { return x < most ? x : most; }

__device__ inline Neuron make_neuron(const float* r_tau, float leak, float v_threshold, float v_reset, float a, float b)
{
    return {kTensorTau ? *r_tau : leak, v_threshold, v_reset, a, b};
}

// V[0] of kVector neurons; one number for all if kScalarV0, at rest if there is none.
__device__ inline void load_v0(const float* v0, float v_rest, long long n, float* v)
{
    if (!kScalarV0) return load(v0 + n, v);
#pragma unroll
    for (int j = 0; j < kVector; ++j) v[j] = v0 ? *v0 : v_rest;
}

#ifdef SPK_FORWARD

// Writes spikes, or one bit a neuron if kPacked (bit n % 32 of word n / 32 in packed [T, ceil(N / 32)]; kVector is 1),
// the last potential and, if kVSeq, every potential. Moves 2 elements of storage a neuron-step (packed: 1 and a bit).
SPK_ENTRY(spk_lif_forward)(
    const storage* SPK_RESTRICT x, const float* SPK_RESTRICT v0, const float* SPK_RESTRICT r_tau,
    storage* SPK_RESTRICT spikes, unsigned* SPK_RESTRICT packed, float* SPK_RESTRICT v_last,
    float* SPK_RESTRICT v_seq, long long T, long long N, float leak, float v_threshold, float v_reset)
{
    const Neuron neuron = make_neuron(r_tau, leak, v_threshold, v_reset, 0.0f, 0.0f);
    const long long lane = threadIdx.x % 32;
    const long long stride = (long long)gridDim.x * blockDim.x * kVector;
    long long first = ((long long)blockIdx.x * blockDim.x + threadIdx.x - lane) * kVector;  // of the warp
    for (; first < N; first += stride) {  // whole warps stay together for the ballot
        const long long n = first + lane * kVector;
        const bool inside = n < N;
        const long long from = inside ? n : 0;
        float v[kVector], x_t[kBatch][kVector], s[kVector];
        load_v0(v0, v_reset, from, v);
        if (kStatic) load(x + from, x_t[0]);
        for (long long t0 = 0; t0 < T; t0 += kBatch) {
#pragma unroll
            for (int k = 0; k < kBatch; ++k)
                if (!kStatic) load(x + at_most(t0 + k, T - 1) * N + from, x_t[k]);
#pragma unroll
            for (int k = 0; k < kBatch; ++k) {
                const long long t = t0 + k;
                if (t >= T) break;
#pragma unroll
                for (int j = 0; j < kVector; ++j) {
                    const float h = neuron.charge(x_t[kStatic ? 0 : k][j], v[j]);
                    s[j] = neuron.fires(h) ? 1.0f : 0.0f;
                    v[j] = neuron.reset(h);
                }
                if (kPacked) {
                    const unsigned word = __ballot_sync(0xFFFFFFFFu, inside && s[0] != 0.0f);
                    if (lane == 0) packed[t * ((N + 31) / 32) + n / 32] = word;
                } else if (inside) {
                    store(spikes + t * N + n, s);
                }
                if (inside && kVSeq) store(v_seq + t * N + n, v);
            }
        }
        if (inside) store(v_last + n, v);
    }
}

#endif
#ifdef SPK_BACKWARD

// Brings V over kSteps steps of x, or of the same current if kStatic.
__device__ inline void scan(const Neuron& neuron, const storage* x, const float* same, long long N, float* v)
{
    for (int k0 = 0; k0 < kSteps; k0 += kBatch) {
        float x_t[kBatch][kVector];
#pragma unroll
        for (int k = 0; k < kBatch; ++k)
            if (!kStatic) load(x + (k0 + k) * N, x_t[k]);
#pragma unroll
        for (int k = 0; k < kBatch; ++k)
#pragma unroll
            for (int j = 0; j < kVector; ++j) v[j] = neuron.reset(neuron.charge(kStatic ? same[j] : x_t[k][j], v[j]));
    }
}

// Reads x once more to compute H: kSteps steps at a time, which stay in registers on the way back. If T is larger,
// a first pass writes V at the start of every segment but the first to checkpoints [(T - 1) / kSteps, N].
// Writes grad_x (of x's shape: static steps are summed from the last to the first), grad_v0 and, if kTensorTau, one
// partial sum of dL/d(1 / tau) a block to partial_r_tau [gridDim.x], through 4 floats of dynamic shared memory.
// Moves 3 elements of storage a neuron-step (4 with checkpoints, which add 8 / kSteps bytes; 4 with kTensorTau).
SPK_ENTRY(spk_lif_backward)(
    const storage* SPK_RESTRICT grad_spikes, const float* SPK_RESTRICT grad_v, const float* SPK_RESTRICT grad_v_seq,
    const storage* SPK_RESTRICT x, const float* SPK_RESTRICT v0, const float* SPK_RESTRICT r_tau,
    storage* SPK_RESTRICT grad_x, float* SPK_RESTRICT grad_v0, float* SPK_RESTRICT partial_r_tau,
    float* checkpoints, long long T, long long N, float leak, float v_threshold, float v_reset, float a, float b)
{
    const Neuron neuron = make_neuron(r_tau, leak, v_threshold, v_reset, a, b);
    const long long stride = (long long)gridDim.x * blockDim.x * kVector;
    const long long last_segment = (T - 1) / kSteps;
    float sum_r_tau = 0.0f;
    for (long long n = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * kVector; n < N; n += stride) {
        float v[kVector], carry[kVector], h[kSteps][kVector], same[kVector], total[kVector];
        load_v0(v0, v_reset, n, v);
        if (kStatic) load(x + n, same);
        for (long long segment = 0; segment < last_segment; ++segment) {
            scan(neuron, x + (kStatic ? 0 : segment * kSteps * N) + n, same, N, v);
            store(checkpoints + segment * N + n, v);
        }
#pragma unroll
        for (int j = 0; j < kVector; ++j) carry[j] = total[j] = 0.0f;
        if (grad_v) load(grad_v + n, carry);
        for (long long segment = last_segment; segment >= 0; --segment) {
            const long long t0 = segment * kSteps;
            float start[kVector];
            if (segment) load(checkpoints + (segment - 1) * N + n, start);
            else load_v0(v0, v_reset, n, start);
#pragma unroll
            for (int j = 0; j < kVector; ++j) v[j] = start[j];
#pragma unroll
            for (int k = 0; k < kSteps; ++k)
                if (!kStatic) load(x + at_most(t0 + k, T - 1) * N + n, h[k]);
#pragma unroll
            for (int k = 0; k < kSteps; ++k)
#pragma unroll
                for (int j = 0; j < kVector; ++j) {
                    h[k][j] = neuron.charge(kStatic ? same[j] : h[k][j], v[j]);
                    v[j] = neuron.reset(h[k][j]);
                }
#pragma unroll
            for (int k0 = kSteps - kBatch; k0 >= 0; k0 -= kBatch) {
                float grad_s[kBatch][kVector];
#pragma unroll
                for (int k = 0; k < kBatch; ++k)
                    load(grad_spikes + at_most(t0 + k0 + k, T - 1) * N + n, grad_s[k]);
#pragma unroll
                for (int k = k0 + kBatch - 1; k >= k0; --k) {
                    const long long t = t0 + k;
                    if (t >= T) continue;
                    float other[kVector], grad[kVector];  // grad_v_seq, then X[t] for the gradient of tau
                    if (kVSeq) load(grad_v_seq + t * N + n, other);
#pragma unroll
                    for (int j = 0; j < kVector; ++j) {
                        if (kVSeq) carry[j] = __fadd_rn(carry[j], other[j]);
                        grad[j] = neuron.grad_h(grad_s[k - k0][j], carry[j], h[k][j]);
                    }
                    if (kTensorTau) {
                        if (kDecayInput && !kStatic) load(x + t * N + n, other);
#pragma unroll
                        for (int j = 0; j < kVector; ++j) {
                            const float before = k > 0 ? neuron.reset(h[k > 0 ? k - 1 : 0][j]) : start[j];  // V[t-1]
                            const float x_t = kStatic ? same[j] : other[j];
                            sum_r_tau = __fadd_rn(sum_r_tau, neuron.grad_leak(grad[j], before, x_t));
                        }
                    }
#pragma unroll
                    for (int j = 0; j < kVector; ++j) {
                        grad[j] = neuron.step_back(grad[j], carry[j]);
                        total[j] = __fadd_rn(total[j], grad[j]);
                    }
                    if (!kStatic) store(grad_x + t * N + n, grad);
                }
            }
        }
        if (kStatic) store(grad_x + n, total);
        if (grad_v0) store(grad_v0 + n, carry);
    }
    if (kTensorTau) {
        SPK_DYNAMIC_SMEM(float, warps);  // [4]
        sum_r_tau = warp_sum(sum_r_tau);
        if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = sum_r_tau;
        __syncthreads();
        if (threadIdx.x == 0)
            partial_r_tau[blockIdx.x] = __fadd_rn(__fadd_rn(warps[0], warps[1]), __fadd_rn(warps[2], warps[3]));
    }
}

#endif
