// ONNX Runtime by its C API: graphs on the CPU, or with the CUDA provider on an NVIDIA GPU.
#include <onnxruntime_c_api.h>

#include <map>
#include <set>

#include "engine.hpp"
#include "sentences.hpp"

namespace clip_export {
namespace {

// The first API with Session_GetEpGraphAssignmentInfo, which says where nodes run; ONNX Runtime 1.24 brought it. Releases
// before 1.25 have no CUDA kernel for Attention either.
constexpr std::uint32_t api_version = 24;
static_assert(ORT_API_VERSION >= api_version, "the headers of ONNX Runtime 1.24 or later are needed");

const OrtApi &api() {
    const OrtApi *found = OrtGetApiBase()->GetApi(api_version);
    if (!found) {
        throw MissingDependencyError(std::string("ONNX Runtime ") + OrtGetApiBase()->GetVersionString() + " is too old",
                                     "install ONNX Runtime 1.24 or later");
    }
    return *found;
}

std::string version() { return OrtGetApiBase()->GetVersionString(); }

struct Failure {
    std::string words;
};

// Throws Failure with the words of a status that is none of success.
void check(OrtStatus *status) {
    if (!status) return;
    Failure failure{api().GetErrorMessage(status)};
    api().ReleaseStatus(status);
    throw failure;
}

// Something of ONNX Runtime's that is released once.
template <typename T, void (*OrtApi::*Release)(T *)> struct Released {
    void operator()(T *object) const { (api().*Release)(object); }
};
#define CLIP_EXPORT_ORT(TYPE) std::unique_ptr<Ort##TYPE, Released<Ort##TYPE, &OrtApi::Release##TYPE>>

using Env = CLIP_EXPORT_ORT(Env);
using Session = CLIP_EXPORT_ORT(Session);
using SessionOptions = CLIP_EXPORT_ORT(SessionOptions);
using MemoryInfo = CLIP_EXPORT_ORT(MemoryInfo);
using Value = CLIP_EXPORT_ORT(Value);
using TypeInfo = CLIP_EXPORT_ORT(TypeInfo);
using ShapeInfo = CLIP_EXPORT_ORT(TensorTypeAndShapeInfo);
using CudaOptions =
    std::unique_ptr<OrtCUDAProviderOptionsV2, Released<OrtCUDAProviderOptionsV2, &OrtApi::ReleaseCUDAProviderOptions>>;

// Makes one: MAKE is a call that takes the place of its result last.
template <typename Owner, typename Make> Owner made(Make make) {
    typename Owner::pointer raw = nullptr;
    check(make(&raw));
    return Owner(raw);
}

// What computes shapes: a few integers, which kernels need on the CPU anyway. As in backends/_ort_session.py.
const std::set<std::string> &shape_operators() {
    static const std::set<std::string> names = {
        "Shape", "Size",   "Constant", "ConstantOfShape", "Range", "Identity",  "Cast", "Where", "Equal",
        "Concat", "Expand", "Gather",   "Reshape",         "Slice", "Squeeze",   "Unsqueeze",
        "Add",   "Sub",    "Mul",      "Div",             "Mod",   "Min",       "Max",  "ReduceProd"};
    return names;
}

void use_cuda(OrtSessionOptions *options, int index) {
    CudaOptions cuda = made<CudaOptions>([](auto out) { return api().CreateCUDAProviderOptions(out); });
    std::string number = std::to_string(index);
    // TF32 keeps 10 bits of a float32's 23: not fp32.
    const char *keys[] = {"device_id", "use_tf32", "cudnn_conv_algo_search"}, *values[] = {number.c_str(), "0", "HEURISTIC"};
    check(api().UpdateCUDAProviderOptions(cuda.get(), keys, values, 3));
    check(api().SessionOptionsAppendExecutionProvider_CUDA_V2(options, cuda.get()));
    check(api().AddSessionConfigEntry(options, "session.record_ep_graph_assignment_info", "1"));
}

// Throws BackendError, naming the operators, if any node that computes more than shapes is not on the GPU.
void check_placement(const OrtSession *session, const std::string &graph) {
    const OrtEpAssignedSubgraph *const *subgraphs = nullptr;
    std::size_t count = 0;
    check(api().Session_GetEpGraphAssignmentInfo(session, &subgraphs, &count));
    std::map<std::string, int> strays;
    bool any = false;
    for (std::size_t i = 0; i < count; ++i) {
        const char *provider = nullptr;
        const OrtEpAssignedNode *const *nodes = nullptr;
        std::size_t node_count = 0;
        check(api().EpAssignedSubgraph_GetEpName(subgraphs[i], &provider));
        check(api().EpAssignedSubgraph_GetNodes(subgraphs[i], &nodes, &node_count));
        bool cuda = std::string(provider) == "CUDAExecutionProvider";
        any = any || cuda;
        for (std::size_t n = 0; n < node_count && !cuda; ++n) {
            const char *type = nullptr;
            check(api().EpAssignedNode_GetOperatorType(nodes[n], &type));
            if (!shape_operators().count(type)) ++strays[type];
        }
    }
    if (strays.empty() && any) return;
    std::vector<std::string> names;
    for (const auto &[type, times] : strays) names.push_back(std::to_string(times) + " " + type);
    throw BackendError("ONNX Runtime " + version() + " has no CUDA kernel for " +
                           (names.empty() ? "all nodes" : joined(names)) + " of " + graph + ", and would run them on the CPU",
                       "pip install --upgrade 'onnxruntime-gpu>=1.25', or use device cpu");
}

class OnnxRuntimeEngine : public Engine {
  public:
    explicit OnnxRuntimeEngine(const EngineRequest &request) {
        int index = device_index(request.device);
        std::string name = request.path.filename().string();
        try {
            env_ = made<Env>([](auto out) { return api().CreateEnv(ORT_LOGGING_LEVEL_ERROR, "clip_export", out); });
            check(api().DisableTelemetryEvents(env_.get()));
            auto options = made<SessionOptions>([](auto out) { return api().CreateSessionOptions(out); });
            if (request.options->threads > 0) check(api().SetIntraOpNumThreads(options.get(), request.options->threads));
            if (index >= 0) use_cuda(options.get(), index);
            session_ = made<Session>([&](auto out) {
                return api().CreateSession(env_.get(), request.path.c_str(), options.get(), out);
            });
            if (index >= 0) check_placement(session_.get(), name);
            memory_ = made<MemoryInfo>([](auto out) { return api().CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, out); });
            read_outputs();
        } catch (const Failure &failure) {
            if (index >= 0) {
                throw DeviceError("ONNX Runtime cannot use " + request.device + " for " + name + ": " + failure.words,
                                  "check nvidia-smi, or use device cpu");
            }
            throw BackendError("ONNX Runtime cannot open " + name + ": " + failure.words, "rebuild the bundle");
        }
    }

    const std::vector<std::string> &outputs() const override { return outputs_; }
    Shape output_shape(const std::string &output) const override { return shapes_.at(output); }

    std::map<std::string, Array> run(const std::vector<Feed> &feeds) const override {
        try {
            return run_unchecked(feeds);
        } catch (const Failure &failure) {
            throw BackendError("ONNX Runtime failed on " + described(feeds) + ": " + failure.words);
        }
    }

  private:
    void read_outputs() {
        OrtAllocator *allocator = nullptr;
        std::size_t count = 0;
        check(api().GetAllocatorWithDefaultOptions(&allocator));
        check(api().SessionGetOutputCount(session_.get(), &count));
        for (std::size_t i = 0; i < count; ++i) {
            char *name = nullptr;
            check(api().SessionGetOutputName(session_.get(), i, allocator, &name));
            outputs_.push_back(name);
            check(api().AllocatorFree(allocator, name));
            shapes_[outputs_.back()] = declared_shape(i);
        }
    }

    Shape declared_shape(std::size_t output) const {
        auto type = made<TypeInfo>([&](auto out) { return api().SessionGetOutputTypeInfo(session_.get(), output, out); });
        const OrtTensorTypeAndShapeInfo *info = nullptr; // owned by `type`
        std::size_t axes = 0;
        check(api().CastTypeInfoToTensorInfo(type.get(), &info));
        if (!info) throw Failure{"an output is no tensor"};
        check(api().GetDimensionsCount(info, &axes));
        Shape shape(axes);
        check(api().GetDimensions(info, shape.data(), axes));
        return shape;
    }

    Value value_of(const Feed &feed) const {
        auto type = feed.dtype == Dtype::uint8 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 : ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
        return made<Value>([&](auto out) {
            return api().CreateTensorWithDataAsOrtValue(memory_.get(), const_cast<void *>(feed.data),
                                                        elements(feed.shape) * item_bytes(feed.dtype), feed.shape.data(),
                                                        feed.shape.size(), type, out);
        });
    }

    std::map<std::string, Array> run_unchecked(const std::vector<Feed> &feeds) const {
        std::vector<Value> inputs;
        std::vector<const OrtValue *> given;
        std::vector<const char *> input_names, output_names;
        for (const Feed &feed : feeds) {
            inputs.push_back(value_of(feed));
            given.push_back(inputs.back().get());
            input_names.push_back(feed.name.c_str());
        }
        for (const std::string &name : outputs_) output_names.push_back(name.c_str());
        std::vector<OrtValue *> raw(outputs_.size(), nullptr);
        check(api().Run(session_.get(), nullptr, input_names.data(), given.data(), given.size(), output_names.data(),
                        raw.size(), raw.data()));
        std::vector<Value> results(raw.begin(), raw.end());
        std::map<std::string, Array> arrays;
        for (std::size_t i = 0; i < results.size(); ++i) arrays[outputs_[i]] = array_of(results[i].get());
        return arrays;
    }

    static Array array_of(const OrtValue *value) {
        auto info = made<ShapeInfo>([&](auto out) { return api().GetTensorTypeAndShape(value, out); });
        ONNXTensorElementDataType type;
        std::size_t axes = 0;
        check(api().GetTensorElementType(info.get(), &type));
        if (type != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) throw Failure{"an output is not of float32"};
        check(api().GetDimensionsCount(info.get(), &axes));
        Array array{Shape(axes), {}};
        check(api().GetDimensions(info.get(), array.shape.data(), axes));
        void *data = nullptr;
        check(api().GetTensorMutableData(const_cast<OrtValue *>(value), &data));
        const float *values = static_cast<const float *>(data);
        array.values.assign(values, values + elements(array.shape));
        return array;
    }

    Env env_;
    Session session_;
    MemoryInfo memory_;
    std::vector<std::string> outputs_;
    std::map<std::string, Shape> shapes_;
};

std::unique_ptr<Engine> open(const EngineRequest &request) { return std::make_unique<OnnxRuntimeEngine>(request); }

} // namespace

Backend onnxruntime_backend() { return {"onnxruntime", false, version, open, nullptr}; }

} // namespace clip_export
