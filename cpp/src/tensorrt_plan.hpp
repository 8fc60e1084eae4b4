// A plan that was read and can run, of TensorRT or TensorRT-RTX: the two share one API under one namespace, so this is
// compiled once for each, within a source that says which (backend_tensorrt.cpp, backend_tensorrt_rtx.cpp). Neither library
// is linked: it is loaded when it is first needed.
#pragma once

#include <algorithm>
#include <cctype>
#include <mutex>
#include <set>

#include <NvInferRuntime.h>
#include <dlfcn.h>

#include "cuda.hpp"
#include "engine.hpp"
#include "sentences.hpp"
#include "files.hpp"

namespace clip_export {
namespace {

struct Flavour {
    const char *backend, *title, *soname, *install;
};
extern const Flavour flavour; // of the source that this is compiled in

// One loaded TensorRT: what of it is exported as C.
struct Library {
    void *(*create_runtime)(void *logger, std::int32_t version);
    std::string version;

    static const Library &get() {
        static const Library library = load(); // tried again at the next call where it has thrown
        return library;
    }

    std::string title() const { return std::string(flavour.title) + " " + version; }

  private:
    static Library load() {
        void *handle = dlopen(flavour.soname, RTLD_NOW | RTLD_LOCAL);
        if (!handle) {
            throw MissingDependencyError(std::string(flavour.title) + " is not installed: " + printable(dlerror()), flavour.install);
        }
        Library library{reinterpret_cast<decltype(create_runtime)>(symbol(handle, "createInferRuntime_INTERNAL")), ""};
        std::vector<std::string> numbers;
        for (const char *name : {"getInferLibMajorVersion", "getInferLibMinorVersion", "getInferLibPatchVersion",
                                 "getInferLibBuildVersion"}) {
            numbers.push_back(std::to_string(reinterpret_cast<std::int32_t (*)()>(symbol(handle, name))()));
        }
        library.version = joined(numbers, ".");
        return library;
    }

    static void *symbol(void *handle, const char *name) {
        void *found = dlsym(handle, name);
        if (!found) {
            throw MissingDependencyError(std::string(flavour.title) + " is too old: it lacks " + name, flavour.install);
        }
        return found;
    }
};

// Keeps the errors: they are the only place where TensorRT says why.
class Logger : public nvinfer1::ILogger {
  public:
    void log(Severity severity, const char *text) noexcept override {
        if (severity > Severity::kERROR) return;
        std::lock_guard<std::mutex> lock(mutex_);
        if (words_.size() < 20) words_.push_back(text);
    }

    std::string take() {
        std::lock_guard<std::mutex> lock(mutex_);
        std::string said = joined(words_, "; ");
        words_.clear();
        return said;
    }

  private:
    std::mutex mutex_;
    std::vector<std::string> words_;
};

struct Tensor {
    std::string name;
    nvinfer1::DataType type;
    std::size_t item_bytes;
    Shape shape; // as declared: -1 for what varies
};

Shape shape_of(const nvinfer1::Dims &dims) { return Shape(dims.d, dims.d + std::max(dims.nbDims, 0)); }

nvinfer1::Dims dims_of(const Shape &shape) {
    nvinfer1::Dims dims{};
    dims.nbDims = static_cast<std::int32_t>(shape.size());
    std::copy(shape.begin(), shape.end(), dims.d);
    return dims;
}

bool speaks_of_memory(std::string words) {
    std::transform(words.begin(), words.end(), words.begin(), [](unsigned char c) { return std::tolower(c); });
    return words.find("out of memory") != std::string::npos || words.find("outofmemory") != std::string::npos ||
           words.find("cudaerrormemoryallocation") != std::string::npos;
}

class PlanEngine {
  public:
    PlanEngine(const EngineRequest &request, const cuda::Device &device);

    std::unique_ptr<nvinfer1::IExecutionContext> new_context(int profile, CUstream stream);
    std::size_t activation_bytes(int profile) const {
        return static_cast<std::size_t>(engine_->getDeviceMemorySizeForProfileV2(profile));
    }
    // The error for something that TensorRT just refused, with the words that it logged.
    [[noreturn]] void fail(const std::string &what);

    std::vector<Tensor> inputs, outputs;
    std::vector<Profile> profiles;
    std::string name;

  private:
    void check_validity(const std::string &blob);
    [[noreturn]] void unreadable(const std::string &blob, bool host_code);
    void read_tensors();
    void configure(const EngineRequest &request);

    Logger logger_; // first, so that it goes last
    std::unique_ptr<nvinfer1::IRuntime> runtime_;
    std::unique_ptr<nvinfer1::ICudaEngine> engine_;
    std::unique_ptr<nvinfer1::IRuntimeConfig> config_;
    std::mutex mutex_; // making and deleting contexts is not safe from several threads
};

PlanEngine::PlanEngine(const EngineRequest &request, const cuda::Device &device) : name(request.path.filename().string()) {
    if (request.plan && request.plan->options.count("strip_weights")) {
        throw BackendError(name + " was built without its weights", "load it with Python, or build the plan with its weights");
    }
    std::string blob = read_file(request.path, name);
    cuda::Current current(device);
    runtime_.reset(static_cast<nvinfer1::IRuntime *>(Library::get().create_runtime(&logger_, NV_TENSORRT_VERSION)));
    if (!runtime_) fail("cannot start, to run");
    if (request.options->allow_host_code) runtime_->setEngineHostCodeAllowed(true);
    check_validity(blob);
    engine_.reset(runtime_->deserializeCudaEngine(blob.data(), blob.size()));
    if (!engine_) unreadable(blob, request.options->allow_host_code);
    read_tensors();
    configure(request);
}

void PlanEngine::fail(const std::string &what) {
    std::string said = logger_.take();
    std::string message = Library::get().title() + " " + what + " " + name + ": " + (said.empty() ? "it gave no reason" : printable(said));
    if (speaks_of_memory(said)) throw cuda::OutOfMemory(message, "free GPU memory: nvidia-smi shows who holds it");
    throw BackendError(message, std::string("build the plan again for this machine: clip-export build BUNDLE --engine ") +
                                    flavour.backend + "; or use backend onnxruntime");
}

void PlanEngine::unreadable(const std::string &blob, bool host_code) {
    std::string said = logger_.take(), title = Library::get().title();
    bool code = said.find("host code") != std::string::npos || said.find("lean runtime") != std::string::npos;
    if (code && !host_code) {
        throw BackendError(name + " is a version-compatible plan: it carries code that would run on this machine",
                           "if you trust where it comes from, set Options::allow_host_code");
    }
    if (speaks_of_memory(said)) {
        throw DeviceError("not enough GPU memory for " + name + ": it has " + std::to_string(blob.size() >> 20) + " MiB",
                          "free GPU memory: nvidia-smi shows who holds it");
    }
    throw BackendError(title + " cannot open " + name + " (" + std::to_string(blob.size()) +
                           " bytes): it is damaged, or of another version or GPU",
                       std::string("build the plan again for this machine: clip-export build BUNDLE --engine ") + flavour.backend);
}

void PlanEngine::read_tensors() {
    for (std::int32_t i = 0; i < engine_->getNbIOTensors(); ++i) {
        std::string tensor = engine_->getIOTensorName(i);
        nvinfer1::DataType type = engine_->getTensorDataType(tensor.c_str());
        bool input = engine_->getTensorIOMode(tensor.c_str()) == nvinfer1::TensorIOMode::kINPUT;
        bool known = input ? type == nvinfer1::DataType::kUINT8 || type == nvinfer1::DataType::kINT32
                           : type == nvinfer1::DataType::kFLOAT;
        if (!known) {
            throw BackendError(name + ": " + tensor + " is of a type that no graph of clip-export has",
                               "build the plan again from the bundle's own graph");
        }
        (input ? inputs : outputs).push_back({tensor, type, type == nvinfer1::DataType::kUINT8 ? std::size_t{1} : 4,
                                    shape_of(engine_->getTensorShape(tensor.c_str()))});
    }
    for (std::int32_t number = 0; number < engine_->getNbOptimizationProfiles(); ++number) {
        Profile profile;
        for (const Tensor &tensor : inputs) {
            auto at = [&](nvinfer1::OptProfileSelector which) {
                return shape_of(engine_->getProfileShape(tensor.name.c_str(), number, which));
            };
            profile[tensor.name] = {at(nvinfer1::OptProfileSelector::kMIN), at(nvinfer1::OptProfileSelector::kOPT),
                                    at(nvinfer1::OptProfileSelector::kMAX)};
        }
        profiles.push_back(std::move(profile));
    }
}

std::unique_ptr<nvinfer1::IExecutionContext> PlanEngine::new_context(int profile, CUstream stream) {
    std::lock_guard<std::mutex> lock(mutex_);
    std::unique_ptr<nvinfer1::IExecutionContext> context(
        config_ ? engine_->createExecutionContext(config_.get())
                : engine_->createExecutionContext(nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED));
    if (!context) fail("cannot make an execution context for");
    if (!context->setOptimizationProfileAsync(profile, reinterpret_cast<cudaStream_t>(stream))) {
        fail("cannot choose profile " + std::to_string(profile) + " of");
    }
    return context;
}

#ifdef TRT_MAJOR_RTX

// The header of a plan, which TensorRT-RTX can read without opening it.
void PlanEngine::check_validity(const std::string &blob) {
    std::uint64_t diagnostics = 0;
    auto validity = runtime_->getEngineValidity(blob.data(), static_cast<std::int64_t>(blob.size()), &diagnostics);
    if (validity != nvinfer1::EngineValidity::kINVALID) return;
    using Cause = nvinfer1::EngineInvalidityDiagnostics;
    const std::pair<Cause, const char *> causes[] = {
        {Cause::kVERSION_MISMATCH, "it was built by another version"},
        {Cause::kUNSUPPORTED_CC, "it was built for another kind of GPU"},
        {Cause::kOLD_CUDA_DRIVER, "the NVIDIA driver is older than the one that it needs"},
        {Cause::kOLD_CUDA_RUNTIME, "the CUDA runtime is older than the one that it needs"},
        {Cause::kINSUFFICIENT_GPU_MEMORY, "this GPU has too little memory for it"},
        {Cause::kMALFORMED_ENGINE, "the file is damaged or no plan at all"},
        {Cause::kCUDA_ERROR, "the CUDA driver or runtime is not installed as it should be"}};
    std::vector<std::string> found;
    for (const auto &[cause, sentence] : causes) {
        if (diagnostics & static_cast<std::uint64_t>(cause)) found.push_back(sentence);
    }
    throw BackendError(Library::get().title() + " cannot run " + name + " here: " +
                           (found.empty() ? "its header does not fit this machine" : joined(found)),
                       std::string("build the plan again for this machine: clip-export build BUNDLE --engine ") + flavour.backend);
}

// TensorRT-RTX captures CUDA graphs by itself, one a context.
void PlanEngine::configure(const EngineRequest &request) {
    config_.reset(engine_->createRuntimeConfig());
    if (!config_) fail("cannot make a runtime config for");
    config_->setExecutionContextAllocationStrategy(nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED);
    config_->setDynamicShapesKernelSpecializationStrategy(nvinfer1::DynamicShapesKernelSpecializationStrategy::kLAZY);
    config_->setCudaGraphStrategy(request.options->cuda_graphs ? nvinfer1::CudaGraphStrategy::kWHOLE_GRAPH_CAPTURE
                                                               : nvinfer1::CudaGraphStrategy::kDISABLED);
}

constexpr bool library_captures = true;

#else

void PlanEngine::check_validity(const std::string &) {}
void PlanEngine::configure(const EngineRequest &) {}
constexpr bool library_captures = false;

#endif

} // namespace
} // namespace clip_export
