// TensorRT-RTX: plans that were built on any machine for named GPUs, and are finished by the GPU that loads them. Its
// namespace has the name and not the contents of TensorRT's, and gets one of its own (-Dnvinfer1=...), so that both can be
// in one program.
#include "tensorrt_slot.hpp"

#ifndef TRT_MAJOR_RTX
#error "these are headers of TensorRT; those of TensorRT-RTX are in its SDK"
#endif

#define CLIP_EXPORT_TEXT(NUMBER) #NUMBER
#define CLIP_EXPORT_SONAME(MAJOR) "libtensorrt_rtx.so." CLIP_EXPORT_TEXT(MAJOR)

namespace clip_export {
namespace {

const Flavour flavour = {"tensorrt-rtx", "TensorRT-RTX", CLIP_EXPORT_SONAME(TRT_MAJOR_RTX),
                         "install TensorRT-RTX, and let the loader find libtensorrt_rtx"};

} // namespace

Backend tensorrt_rtx_backend() { return {flavour.backend, true, library_version, open_plan, gpu_of}; }

} // namespace clip_export
