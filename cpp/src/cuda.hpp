// NVIDIA's driver, loaded when it is first needed: memory, streams, events and graphs, each owned by one object. So a
// program starts where there is no driver, and says so only when a GPU is asked for.
#pragma once

#include <cstddef>
#include <string>
#include <utility>

#include <cuda.h>

#include "engine.hpp"

namespace clip_export::cuda {

// What it throws where there is no room: a DeviceError that a caller can tell from others.
struct OutOfMemory : DeviceError {
    using DeviceError::DeviceError;
};

// The functions that are used, by the names that the driver exports them under.
struct Driver {
    static const Driver &get(); // throws DeviceError where there is no driver

    CUresult (*init)(unsigned);
    CUresult (*error_name)(CUresult, const char **);
    CUresult (*device_count)(int *);
    CUresult (*device_get)(CUdevice *, int);
    CUresult (*device_attribute)(int *, CUdevice_attribute, CUdevice);
    CUresult (*retain_context)(CUcontext *, CUdevice);
    CUresult (*push_context)(CUcontext);
    CUresult (*pop_context)(CUcontext *);
    CUresult (*memory_info)(std::size_t *, std::size_t *);
    CUresult (*allocate)(CUdeviceptr *, std::size_t);
    CUresult (*free)(CUdeviceptr);
    CUresult (*allocate_host)(void **, std::size_t, unsigned);
    CUresult (*free_host)(void *);
    CUresult (*copy_to_device)(CUdeviceptr, const void *, std::size_t, CUstream);
    CUresult (*copy_to_host)(void *, CUdeviceptr, std::size_t, CUstream);
    CUresult (*copy_on_device)(CUdeviceptr, CUdeviceptr, std::size_t, CUstream);
    CUresult (*set_bytes)(CUdeviceptr, unsigned char, std::size_t, CUstream);
    CUresult (*create_stream)(CUstream *, unsigned);
    CUresult (*destroy_stream)(CUstream);
    CUresult (*synchronize_stream)(CUstream);
    CUresult (*stream_wait)(CUstream, CUevent, unsigned);
    CUresult (*create_event)(CUevent *, unsigned);
    CUresult (*destroy_event)(CUevent);
    CUresult (*record_event)(CUevent, CUstream);
    CUresult (*begin_capture)(CUstream, CUstreamCaptureMode);
    CUresult (*end_capture)(CUstream, CUgraph *);
    CUresult (*instantiate_graph)(CUgraphExec *, CUgraph, unsigned long long);
    CUresult (*destroy_graph)(CUgraph);
    CUresult (*destroy_graph_exec)(CUgraphExec);
    CUresult (*launch_graph)(CUgraphExec, CUstream);
};

// Throws OutOfMemory or DeviceError for what is no success.
void check(CUresult status, const char *what);

// The primary context of one GPU, which TensorRT's own CUDA runtime uses as well.
class Device {
  public:
    explicit Device(int index); // throws DeviceError: no driver, no GPU, none of that number
    Gpu status() const;
    CUcontext context() const { return context_; }

  private:
    CUdevice handle_ = 0;
    CUcontext context_ = nullptr;
};

// Makes a GPU that of the calling thread, as long as it lives.
class Current {
  public:
    explicit Current(const Device &device) { check(Driver::get().push_context(device.context()), "cuCtxPushCurrent"); }
    ~Current() {
        CUcontext context;
        Driver::get().pop_context(&context);
    }
    Current(const Current &) = delete;
    Current &operator=(const Current &) = delete;
};

// Something of the driver's that is given back once; its GPU has to be current then, and done with it.
template <typename Handle, typename Free> class Owned {
  public:
    Owned() = default;
    explicit Owned(Handle handle) : handle_(handle) {}
    Owned(Owned &&other) noexcept : handle_(std::exchange(other.handle_, Handle{})) {}
    Owned &operator=(Owned &&other) noexcept {
        std::swap(handle_, other.handle_);
        return *this;
    }
    ~Owned() {
        if (handle_) Free{}(handle_);
    }
    Handle get() const { return handle_; }

  private:
    Handle handle_{};
};

#define CLIP_EXPORT_CUDA_OWNED(NAME, HANDLE, FREE)                                                                     \
    struct Free##NAME {                                                                                                \
        void operator()(HANDLE handle) const { Driver::get().FREE(handle); }                                           \
    };                                                                                                                 \
    using NAME = Owned<HANDLE, Free##NAME>;

CLIP_EXPORT_CUDA_OWNED(DeviceMemory, CUdeviceptr, free)
CLIP_EXPORT_CUDA_OWNED(PinnedMemory, void *, free_host)
CLIP_EXPORT_CUDA_OWNED(Stream, CUstream, destroy_stream)
CLIP_EXPORT_CUDA_OWNED(Event, CUevent, destroy_event)
CLIP_EXPORT_CUDA_OWNED(Graph, CUgraph, destroy_graph)
CLIP_EXPORT_CUDA_OWNED(GraphExec, CUgraphExec, destroy_graph_exec)
#undef CLIP_EXPORT_CUDA_OWNED

DeviceMemory allocate(std::size_t bytes);
PinnedMemory allocate_pinned(std::size_t bytes);
Stream make_stream();
Event make_event();

} // namespace clip_export::cuda
