#include "cuda.hpp"

#include <algorithm>

#include <dlfcn.h>

namespace clip_export::cuda {
namespace {

DeviceError no_driver() {
    return DeviceError("there is no NVIDIA driver on this machine: libcuda was not found",
                       "install the NVIDIA driver (in a container: start it with --gpus all), or use backend onnxruntime");
}

DeviceError no_gpu() {
    return DeviceError("the NVIDIA driver finds no GPU",
                       "check nvidia-smi and CUDA_VISIBLE_DEVICES (in a container: --gpus all), or use backend onnxruntime");
}

template <typename Function> void find(void *library, const char *name, Function &function) {
    function = reinterpret_cast<Function>(dlsym(library, name));
    if (!function) {
        throw DeviceError(std::string("the NVIDIA driver is too old: it has no ") + name, "update the driver");
    }
}

Driver load() {
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!library) throw no_driver();
    Driver driver{};
    find(library, "cuInit", driver.init);
    find(library, "cuGetErrorName", driver.error_name);
    find(library, "cuDeviceGetCount", driver.device_count);
    find(library, "cuDeviceGet", driver.device_get);
    find(library, "cuDeviceGetAttribute", driver.device_attribute);
    find(library, "cuDevicePrimaryCtxRetain", driver.retain_context);
    find(library, "cuCtxPushCurrent_v2", driver.push_context);
    find(library, "cuCtxPopCurrent_v2", driver.pop_context);
    find(library, "cuMemGetInfo_v2", driver.memory_info);
    find(library, "cuMemAlloc_v2", driver.allocate);
    find(library, "cuMemFree_v2", driver.free);
    find(library, "cuMemHostAlloc", driver.allocate_host);
    find(library, "cuMemFreeHost", driver.free_host);
    find(library, "cuMemcpyHtoDAsync_v2", driver.copy_to_device);
    find(library, "cuMemcpyDtoHAsync_v2", driver.copy_to_host);
    find(library, "cuMemcpyDtoDAsync_v2", driver.copy_on_device);
    find(library, "cuMemsetD8Async", driver.set_bytes);
    find(library, "cuStreamCreate", driver.create_stream);
    find(library, "cuStreamDestroy_v2", driver.destroy_stream);
    find(library, "cuStreamSynchronize", driver.synchronize_stream);
    find(library, "cuStreamWaitEvent", driver.stream_wait);
    find(library, "cuEventCreate", driver.create_event);
    find(library, "cuEventDestroy_v2", driver.destroy_event);
    find(library, "cuEventRecord", driver.record_event);
    find(library, "cuStreamBeginCapture_v2", driver.begin_capture);
    find(library, "cuStreamEndCapture", driver.end_capture);
    find(library, "cuGraphInstantiateWithFlags", driver.instantiate_graph);
    find(library, "cuGraphDestroy", driver.destroy_graph);
    find(library, "cuGraphExecDestroy", driver.destroy_graph_exec);
    find(library, "cuGraphLaunch", driver.launch_graph);
    return driver;
}

} // namespace

const Driver &Driver::get() {
    static const Driver driver = load(); // tried again at the next call where it has thrown
    return driver;
}

void check(CUresult status, const char *what) {
    if (status == CUDA_SUCCESS) return;
    if (status == CUDA_ERROR_NO_DEVICE) throw no_gpu();
    if (status == CUDA_ERROR_STUB_LIBRARY) throw no_driver();
    if (status == CUDA_ERROR_SYSTEM_DRIVER_MISMATCH) {
        throw DeviceError("the NVIDIA driver's library and its kernel module are of different versions", "restart the machine");
    }
    if (status == CUDA_ERROR_OUT_OF_MEMORY) {
        throw OutOfMemory(std::string("the GPU is out of memory (") + what + ")",
                          "free GPU memory: nvidia-smi shows who holds it");
    }
    const char *name = nullptr;
    Driver::get().error_name(status, &name);
    throw DeviceError(std::string("the GPU failed in ") + what + ": " + (name ? name : std::to_string(status).c_str()),
                      "restart the program; nvidia-smi shows the GPU");
}

Device::Device(int index) {
    const Driver &driver = Driver::get();
    int count = 0;
    check(driver.init(0), "cuInit");
    check(driver.device_count(&count), "cuDeviceGetCount");
    if (count == 0) throw no_gpu();
    if (index < 0 || index >= count) {
        std::string found = count == 1 ? "one GPU, number 0"
                                       : std::to_string(count) + " GPUs, numbers 0 to " + std::to_string(count - 1);
        throw DeviceError("there is no GPU number " + std::to_string(index) + ": this machine has " + found,
                          "choose one of these");
    }
    check(driver.device_get(&handle_, index), "cuDeviceGet");
    check(driver.retain_context(&context_, handle_), "cuDevicePrimaryCtxRetain");
}

Gpu Device::status() const {
    const Driver &driver = Driver::get();
    int major = 0, minor = 0;
    std::size_t free = 0, total = 0;
    check(driver.device_attribute(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, handle_), "cuDeviceGetAttribute");
    check(driver.device_attribute(&minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, handle_), "cuDeviceGetAttribute");
    Current current(*this);
    check(driver.memory_info(&free, &total), "cuMemGetInfo");
    return {"sm_" + std::to_string(major) + std::to_string(minor), static_cast<std::int64_t>(free)};
}

DeviceMemory allocate(std::size_t bytes) {
    CUdeviceptr pointer = 0;
    check(Driver::get().allocate(&pointer, std::max<std::size_t>(bytes, 1)), "cuMemAlloc");
    return DeviceMemory(pointer);
}

PinnedMemory allocate_pinned(std::size_t bytes) {
    void *pointer = nullptr;
    check(Driver::get().allocate_host(&pointer, std::max<std::size_t>(bytes, 1), 0), "cuMemHostAlloc");
    return PinnedMemory(pointer);
}

Stream make_stream() {
    CUstream stream = nullptr;
    check(Driver::get().create_stream(&stream, CU_STREAM_NON_BLOCKING), "cuStreamCreate");
    return Stream(stream);
}

Event make_event() {
    CUevent event = nullptr;
    check(Driver::get().create_event(&event, CU_EVENT_DISABLE_TIMING), "cuEventCreate");
    return Event(event);
}

} // namespace clip_export::cuda
