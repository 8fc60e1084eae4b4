// TensorRT 10.12 or later: plans that were built on the kind of GPU that they run on.
#include "tensorrt_slot.hpp"

#define CLIP_EXPORT_TEXT(NUMBER) #NUMBER
#define CLIP_EXPORT_SONAME(MAJOR) "libnvinfer.so." CLIP_EXPORT_TEXT(MAJOR)

namespace clip_export {
namespace {

const Flavour flavour = {"tensorrt", "TensorRT", CLIP_EXPORT_SONAME(NV_TENSORRT_MAJOR),
                         "install NVIDIA's TensorRT of the major version that clip_export was compiled for"};

} // namespace

Backend tensorrt_backend() { return {flavour.backend, true, library_version, open_plan, gpu_of}; }

} // namespace clip_export
