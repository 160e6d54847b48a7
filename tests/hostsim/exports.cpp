// Every kernel for one storage type (-DSPK_STORAGE=f32), with what a device knows at compile time as variables.
#include "hostsim.hpp"

#define SPK_FORWARD
#define SPK_BACKWARD
#define SPK_PACK
#define SPK_STATES
#define SPK_STATES_BACK
#define SPK_GATHER
#define SPK_SCAN
#define SPK_GRADIENTS
#define SPK_MAP
#define SPK_MAP_BACK
#define SPK_MAP_TILES

#define HOSTSIM_CONSTANTS(each)                                                                               \
    each(kVector) each(kSteps) each(kPacked) each(kStatic) each(kTensorTau) each(kDecayInput) each(kHardReset) \
        each(kDetachReset) each(kDivide) each(kSurrogate) each(kVSeq) each(kThreads) each(kElements) \
        each(kWhole) each(kInside) each(kBlocks) each(kScalarV0) \
        each(kWords) each(kRows) each(kGroups) each(kSplit) each(kPieces) each(kStateFirst) each(kCausal) each(kFires) \
        each(kAligned) each(kTiles) each(kOfKeys)

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
namespace lif {
#include "ops/lif/kernels.cu"
}
namespace norm_lif {
#include "ops/norm_lif/kernels.cu"
}
namespace spiking_attention {
#include "ops/spiking_attention/kernels.cu"
#include "ops/spiking_attention/attend.cu"
#include "ops/spiking_attention/gradients.cu"
#include "ops/spiking_attention/map.cu"
#include "ops/spiking_attention/pairs.cu"
#include "ops/spiking_attention/pack.cu"
#include "ops/spiking_attention/states.cu"
}
using namespace lif;
using namespace norm_lif;
using namespace spiking_attention;

HOSTSIM_EXPORT(spk_lif_forward)
HOSTSIM_EXPORT(spk_lif_backward)
HOSTSIM_EXPORT(spk_norm_lif_forward)
HOSTSIM_EXPORT(spk_norm_lif_backward)
HOSTSIM_EXPORT(spk_attention_pack)
HOSTSIM_EXPORT(spk_attention_states)
HOSTSIM_EXPORT(spk_attention_states_back)
HOSTSIM_EXPORT(spk_attention_gather)
HOSTSIM_EXPORT(spk_attention_scan)
HOSTSIM_EXPORT(spk_attention_gradients)
HOSTSIM_EXPORT(spk_attention_forward)
HOSTSIM_EXPORT(spk_attention_backward)
HOSTSIM_EXPORT(spk_attention_map)
HOSTSIM_EXPORT(spk_attention_map_tiles)
HOSTSIM_EXPORT(spk_attention_map_back)
