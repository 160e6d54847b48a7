// Every kernel for one storage type (-DSPK_STORAGE=f32), with what a device knows at compile time as variables.
#include "hostsim.hpp"

#define HOSTSIM_CONSTANTS(each)                                                                               \
    each(kVector) each(kSteps) each(kPacked) each(kStatic) each(kTensorTau) each(kDecayInput) each(kHardReset) \
        each(kDetachReset) each(kDivide) each(kSurrogate) each(kVSeq)

#define DECLARE(name) static int name;
HOSTSIM_CONSTANTS(DECLARE)

extern "C" int hostsim_set(const char* name, int value)
{
#define SET(constant) \
    if (std::strcmp(name, #constant) == 0) return constant = value, 1;
    HOSTSIM_CONSTANTS(SET)
    return 0;
}

#include "_cuda/spikeattn.cuh"
#include "ops/lif/kernels.cu"

HOSTSIM_EXPORT(spk_lif_forward)
HOSTSIM_EXPORT(spk_lif_backward)
