// OpenVINO: graphs on the CPU. It reads the Attention operator of opset 23 from release 2026.0 on.
#include <mutex>

#include <openvino/openvino.hpp>

#include "engine.hpp"
#include "sentences.hpp"

namespace clip_export {
namespace {

std::string version() {
    std::string build = ov::get_openvino_version().buildNumber;
    return build.substr(0, build.find('-'));
}

std::string first_line(const std::string &text) {
    std::size_t from = text.find_first_not_of("\n ");
    return from == std::string::npos ? "it gave no reason" : printable(text.substr(from));
}

ov::element::Type type_of(Dtype dtype) { return dtype == Dtype::uint8 ? ov::element::u8 : ov::element::i32; }

class OpenVinoEngine : public Engine {
  public:
    explicit OpenVinoEngine(const EngineRequest &request) {
        ov::AnyMap properties = {ov::hint::inference_precision(ov::element::f32),
                                 ov::hint::performance_mode(ov::hint::PerformanceMode::LATENCY)};
        if (request.options->threads > 0) properties.emplace(ov::inference_num_threads(request.options->threads));
        try {
            model_ = core_.compile_model(core_.read_model(request.path.string()), "CPU", properties);
            for (const auto &output : model_.outputs()) outputs_.push_back(output.get_any_name());
        } catch (const std::exception &error) {
            throw BackendError("OpenVINO " + version() + " cannot open " + request.path.filename().string() + ": " +
                                   first_line(error.what()),
                               "OpenVINO 2026.0 or later reads the Attention operator of opset 23; or rebuild the bundle");
        }
    }

    const std::vector<std::string> &outputs() const override { return outputs_; }

    Shape output_shape(const std::string &output) const override {
        ov::PartialShape declared = model_.output(output).get_partial_shape();
        Shape shape;
        if (declared.rank().is_dynamic()) return shape;
        for (const ov::Dimension &size : declared) shape.push_back(size.is_static() ? size.get_length() : -1);
        return shape;
    }

    std::map<std::string, Array> run(const std::vector<Feed> &feeds) const override {
        try {
            ov::InferRequest request = take();
            for (const Feed &feed : feeds) {
                ov::Shape shape(feed.shape.begin(), feed.shape.end());
                request.set_tensor(feed.name, ov::Tensor(type_of(feed.dtype), shape, const_cast<void *>(feed.data)));
            }
            request.infer();
            std::map<std::string, Array> arrays;
            for (const std::string &name : outputs_) {
                ov::Tensor tensor = request.get_tensor(name);
                const float *values = tensor.data<float>();
                ov::Shape shape = tensor.get_shape();
                arrays[name] = {Shape(shape.begin(), shape.end()), std::vector<float>(values, values + tensor.get_size())};
            }
            give_back(std::move(request));
            return arrays;
        } catch (const std::exception &error) { // the request goes with it: what is in it is not known
            throw BackendError("OpenVINO failed on " + described(feeds) + ": " + first_line(error.what()));
        }
    }

  private:
    ov::InferRequest take() const {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            if (!idle_.empty()) {
                ov::InferRequest request = std::move(idle_.back());
                idle_.pop_back();
                return request;
            }
        }
        return const_cast<ov::CompiledModel &>(model_).create_infer_request(); // changes nothing in it
    }

    void give_back(ov::InferRequest request) const {
        std::lock_guard<std::mutex> lock(mutex_);
        idle_.push_back(std::move(request));
    }

    ov::Core core_; // first, so that it goes last: it owns the plugin's library
    ov::CompiledModel model_;
    std::vector<std::string> outputs_;
    mutable std::mutex mutex_;
    mutable std::vector<ov::InferRequest> idle_;
};

std::unique_ptr<Engine> open(const EngineRequest &request) {
    if (device_index(request.device) >= 0) {
        throw BackendError("backend openvino runs on the CPU, found device " + request.device,
                           "use device cpu, or another backend");
    }
    return std::make_unique<OpenVinoEngine>(request);
}

} // namespace

Backend openvino_backend() { return {"openvino", false, version, open, nullptr}; }

} // namespace clip_export
