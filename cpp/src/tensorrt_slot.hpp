// One execution context with its stream and buffers, and an engine that lends such slots to threads.
#pragma once

#include <condition_variable>
#include <cstring>

#include "profiles.hpp"
#include "tensorrt_plan.hpp"

namespace clip_export {
namespace {

constexpr std::size_t most_graphs = 16; // of one slot; each has an execution context of its own
constexpr std::size_t alignment = 256;  // of addresses that TensorRT takes

using Shapes = std::map<std::string, Shape>;

// What one thread at a time needs to run a profile of a plan. Its GPU is current whenever it is used.
class Slot {
  public:
    Slot(PlanEngine &plan, int profile, bool graphs) : profile(profile), plan_(plan), graphs_(graphs && !library_captures) {
        stream_ = cuda::make_stream();
        activations_ = cuda::allocate(plan.activation_bytes(profile));
        context_ = plan.new_context(profile, stream_.get());
        Shapes largest;
        for (const auto &[name, span] : plan.profiles[profile]) largest[name] = span.max;
        Shapes outputs = set_shapes(*context_, largest);
        give_memory(*context_);
        for (const Tensor &tensor : plan.inputs) add_buffer(tensor, largest.at(tensor.name));
        for (const Tensor &tensor : plan.outputs) add_buffer(tensor, outputs.at(tensor.name));
    }

    ~Slot() { cuda::Driver::get().synchronize_stream(stream_.get()); }

    // Rows `start` on of feeds in host memory, into `results`, which have room for them.
    void run(const Part &part, std::int64_t start, const std::vector<Feed> &feeds, std::map<std::string, Array> &results) {
        const cuda::Driver &driver = cuda::Driver::get();
        Shapes shapes;
        for (const Feed &feed : feeds) {
            Buffer &buffer = buffers_.at(feed.name);
            shapes[feed.name] = with_rows(feed.shape, part.size);
            std::size_t row = row_bytes(feed);
            auto pinned = static_cast<std::uint8_t *>(buffer.pinned.get());
            std::memcpy(pinned, static_cast<const std::uint8_t *>(feed.data) + start * row, part.rows * row);
            std::memset(pinned + part.rows * row, 0, (part.size - part.rows) * row); // rows of padding
            cuda::check(driver.copy_to_device(buffer.memory.get(), pinned, part.size * row, stream_.get()), "cuMemcpyHtoDAsync");
        }
        Shapes given = launch(shapes);
        for (const auto &[name, shape] : given) {
            Buffer &buffer = buffers_.at(name);
            std::size_t bytes = elements(with_rows(shape, part.rows)) * sizeof(float);
            cuda::check(driver.copy_to_host(buffer.pinned.get(), buffer.memory.get(), bytes, stream_.get()), "cuMemcpyDtoHAsync");
        }
        cuda::check(driver.synchronize_stream(stream_.get()), "cuStreamSynchronize");
        for (const auto &[name, shape] : given) {
            Array &array = results[name];
            std::size_t row = elements(shape) / shape[0];
            if (array.shape.empty()) array.shape = with_rows(shape, feeds[0].shape[0]);
            array.values.resize(elements(array.shape));
            std::memcpy(array.values.data() + start * row, buffers_.at(name).pinned.get(), part.rows * row * sizeof(float));
        }
    }

    // The same for feeds on the GPU and one output that stays there. Where addresses allow it, the plan reads and writes
    // the caller's memory itself; nothing is waited for.
    void run_on_device(const Part &part, std::int64_t start, const std::vector<Feed> &feeds, const std::string &output,
                       CUdeviceptr target) {
        const cuda::Driver &driver = cuda::Driver::get();
        Shapes shapes, given;
        for (const Feed &feed : feeds) shapes[feed.name] = with_rows(feed.shape, part.size);
        given = set_shapes(*context_, shapes);
        configured_.clear();
        for (const auto &[name, buffer] : buffers_) set_address(*context_, name, buffer.memory.get());
        for (const Feed &feed : feeds) {
            std::size_t row = row_bytes(feed);
            CUdeviceptr source = reinterpret_cast<CUdeviceptr>(feed.data) + start * row, memory = buffers_.at(feed.name).memory.get();
            if (part.size == part.rows && source % alignment == 0) {
                set_address(*context_, feed.name, source);
                continue;
            }
            cuda::check(driver.copy_on_device(memory, source, part.rows * row, stream_.get()), "cuMemcpyDtoDAsync");
            cuda::check(driver.set_bytes(memory + part.rows * row, 0, (part.size - part.rows) * row, stream_.get()), "cuMemsetD8Async");
        }
        const Shape &shape = given.at(output);
        std::size_t row = elements(shape) / shape[0] * sizeof(float);
        CUdeviceptr place = target + start * row;
        bool direct = part.size == part.rows && place % alignment == 0;
        if (direct) set_address(*context_, output, place);
        execute(*context_);
        if (!direct) {
            CUdeviceptr memory = buffers_.at(output).memory.get();
            cuda::check(driver.copy_on_device(place, memory, part.rows * row, stream_.get()), "cuMemcpyDtoDAsync");
        }
    }

    CUstream stream() const { return stream_.get(); }

    const int profile;

  private:
    struct Buffer {
        cuda::DeviceMemory memory;
        cuda::PinnedMemory pinned;
    };
    struct Captured {
        std::unique_ptr<nvinfer1::IExecutionContext> context; // stays as it was captured
        cuda::GraphExec graph;
        Shapes outputs;
    };

    static Shape with_rows(Shape shape, std::int64_t rows) {
        shape[0] = rows;
        return shape;
    }
    static std::size_t row_bytes(const Feed &feed) { return elements(with_rows(feed.shape, 1)) * item_bytes(feed.dtype); }

    void add_buffer(const Tensor &tensor, const Shape &shape) {
        std::size_t bytes = elements(shape) * tensor.item_bytes;
        buffers_[tensor.name] = {cuda::allocate(bytes), cuda::allocate_pinned(bytes)};
    }

    // Enqueue one run on the slot's own buffers: a shape that comes for the second time as a graph.
    Shapes launch(const Shapes &shapes) {
        auto captured = captured_.find(shapes);
        if (captured == captured_.end() && graphs_ && seen_.count(shapes) && captured_.size() < most_graphs) capture(shapes);
        captured = captured_.find(shapes);
        if (captured != captured_.end()) {
            cuda::check(cuda::Driver::get().launch_graph(captured->second.graph.get(), stream_.get()), "cuGraphLaunch");
            return captured->second.outputs;
        }
        seen_.insert(shapes);
        if (configured_ != shapes) {
            configured_.clear();
            configured_outputs_ = configure(*context_, shapes);
            configured_ = shapes;
        }
        execute(*context_);
        return configured_outputs_;
    }

    // Keep what a run launches as a graph; what cannot be captured goes on being launched kernel by kernel.
    void capture(const Shapes &shapes) {
        const cuda::Driver &driver = cuda::Driver::get();
        bool capturing = false;
        try {
            Captured made;
            made.context = plan_.new_context(profile, stream_.get());
            made.outputs = configure(*made.context, shapes);
            give_memory(*made.context);
            execute(*made.context); // the first run after a change of shape makes what a capture must not make
            cuda::check(driver.begin_capture(stream_.get(), CU_STREAM_CAPTURE_MODE_THREAD_LOCAL), "cuStreamBeginCapture");
            capturing = true;
            execute(*made.context);
            CUgraph raw = nullptr;
            capturing = false;
            cuda::check(driver.end_capture(stream_.get(), &raw), "cuStreamEndCapture");
            cuda::Graph graph(raw);
            CUgraphExec exec = nullptr;
            cuda::check(driver.instantiate_graph(&exec, graph.get(), 0), "cuGraphInstantiate");
            made.graph = cuda::GraphExec(exec);
            captured_[shapes] = std::move(made);
        } catch (const BackendError &) { // for want of memory, or since something in it cannot be captured
            CUgraph raw = nullptr;
            if (capturing && driver.end_capture(stream_.get(), &raw) == CUDA_SUCCESS && raw) cuda::Graph dropped(raw);
            graphs_ = false;
        }
    }

    Shapes configure(nvinfer1::IExecutionContext &context, const Shapes &shapes) {
        Shapes outputs = set_shapes(context, shapes);
        for (const auto &[name, buffer] : buffers_) set_address(context, name, buffer.memory.get());
        return outputs;
    }

    Shapes set_shapes(nvinfer1::IExecutionContext &context, const Shapes &shapes) {
        for (const auto &[name, shape] : shapes) {
            if (!context.setInputShape(name.c_str(), dims_of(shape))) plan_.fail("refuses " + name + " " + text_of(shape) + " in");
        }
        if (context.inferShapes(0, nullptr) != 0) plan_.fail("cannot infer the output shapes of");
        Shapes outputs;
        for (const Tensor &tensor : plan_.outputs) {
            Shape shape = shape_of(context.getTensorShape(tensor.name.c_str()));
            if (shape.empty() || *std::min_element(shape.begin(), shape.end()) < 0) {
                throw BackendError("the shape of " + tensor.name + " of " + plan_.name + " depends on its values: " + text_of(shape),
                                   "build from a graph whose shapes depend on shapes alone");
            }
            outputs[tensor.name] = shape;
        }
        return outputs;
    }

    void set_address(nvinfer1::IExecutionContext &context, const std::string &name, CUdeviceptr address) {
        if (!context.setTensorAddress(name.c_str(), reinterpret_cast<void *>(address))) {
            plan_.fail("refuses the memory of " + name + " in");
        }
    }

    // All contexts of a slot share its activation memory: they run in one stream, one after the other.
    void give_memory(nvinfer1::IExecutionContext &context) {
        context.setDeviceMemoryV2(reinterpret_cast<void *>(activations_.get()),
                                  static_cast<std::int64_t>(plan_.activation_bytes(profile)));
    }

    void execute(nvinfer1::IExecutionContext &context) {
        if (!context.enqueueV3(reinterpret_cast<cudaStream_t>(stream_.get()))) plan_.fail("failed while running");
    }

    PlanEngine &plan_;
    bool graphs_;
    cuda::Stream stream_;
    cuda::DeviceMemory activations_;
    std::map<std::string, Buffer> buffers_;
    std::unique_ptr<nvinfer1::IExecutionContext> context_;
    std::map<Shapes, Captured> captured_;
    std::set<Shapes> seen_;
    Shapes configured_, configured_outputs_;
};

class TensorRtEngine : public Engine {
  public:
    explicit TensorRtEngine(const EngineRequest &request)
        : device_(device_index(request.device)), plan_(request, device_), graphs_(request.options->cuda_graphs),
          limit_(request.options->max_contexts) {
        for (const Tensor &tensor : plan_.outputs) outputs_.push_back(tensor.name);
    }

    ~TensorRtEngine() override {
        cuda::Driver::get().push_context(device_.context());
        idle_.clear();
        CUcontext context;
        cuda::Driver::get().pop_context(&context);
    }

    const std::vector<std::string> &outputs() const override { return outputs_; }
    Shape output_shape(const std::string &output) const override {
        for (const Tensor &tensor : plan_.outputs) {
            if (tensor.name == output) return tensor.shape;
        }
        return {};
    }
    bool on_device() const override { return true; }

    std::map<std::string, Array> run(const std::vector<Feed> &feeds) const override {
        std::map<std::string, Array> results;
        each_part(feeds, [&](Slot &slot, const Part &part, std::int64_t start) { slot.run(part, start, feeds, results); });
        return results;
    }

    void run_on_device(const std::vector<Feed> &feeds, const std::string &output, void *target, void *stream) const override {
        const cuda::Driver &driver = cuda::Driver::get();
        auto theirs = static_cast<CUstream>(stream);
        each_part(feeds, [&](Slot &slot, const Part &part, std::int64_t start) {
            cuda::Event before = cuda::make_event(), after = cuda::make_event();
            cuda::check(driver.record_event(before.get(), theirs), "cuEventRecord");
            cuda::check(driver.stream_wait(slot.stream(), before.get(), 0), "cuStreamWaitEvent");
            slot.run_on_device(part, start, feeds, output, reinterpret_cast<CUdeviceptr>(target));
            cuda::check(driver.record_event(after.get(), slot.stream()), "cuEventRecord");
            cuda::check(driver.stream_wait(theirs, after.get(), 0), "cuStreamWaitEvent");
        });
    }

  private:
    template <typename Work> void each_part(const std::vector<Feed> &feeds, Work work) const {
        Shapes rest;
        for (const Feed &feed : feeds) rest[feed.name] = Shape(feed.shape.begin() + 1, feed.shape.end());
        cuda::Current current(device_);
        std::int64_t start = 0;
        for (const Part &part : split(feeds[0].shape[0], plan_.profiles, rest)) {
            std::unique_ptr<Slot> slot = take(part.profile);
            try {
                work(*slot, part, start);
            } catch (...) { // what is in the slot is not known
                slot.reset();
                give_back(nullptr);
                throw;
            }
            give_back(std::move(slot));
            start += part.rows;
        }
    }

    // An idle slot of the profile, or a new one; at the limit an idle one of another profile goes, or a thread waits.
    std::unique_ptr<Slot> take(int profile) const {
        std::unique_ptr<Slot> evicted;
        {
            std::unique_lock<std::mutex> lock(mutex_);
            while (true) {
                auto found = std::find_if(idle_.begin(), idle_.end(), [&](const auto &slot) { return slot->profile == profile; });
                if (found != idle_.end()) {
                    std::unique_ptr<Slot> slot = std::move(*found);
                    idle_.erase(found);
                    return slot;
                }
                if (count_ < limit_) {
                    ++count_;
                    break;
                }
                if (!idle_.empty()) {
                    evicted = std::move(idle_.front());
                    idle_.erase(idle_.begin());
                    break;
                }
                changed_.wait(lock);
            }
        }
        evicted.reset();
        try {
            return std::make_unique<Slot>(plan_, profile, graphs_);
        } catch (...) {
            give_back(nullptr);
            throw;
        }
    }

    void give_back(std::unique_ptr<Slot> slot) const {
        std::lock_guard<std::mutex> lock(mutex_);
        if (slot) {
            idle_.push_back(std::move(slot));
        } else {
            --count_;
        }
        changed_.notify_one();
    }

    cuda::Device device_;
    mutable PlanEngine plan_;
    bool graphs_;
    int limit_;
    std::vector<std::string> outputs_;
    mutable std::mutex mutex_;
    mutable std::condition_variable changed_;
    mutable std::vector<std::unique_ptr<Slot>> idle_;
    mutable int count_ = 0; // idle and lent
};

std::string library_version() { return Library::get().version; }

std::unique_ptr<Engine> open_plan(const EngineRequest &request) {
    Library::get(); // before anything that takes long
    return std::make_unique<TensorRtEngine>(request);
}

Gpu gpu_of(const std::string &device) {
    Library::get();
    return cuda::Device(device_index(device)).status();
}

} // namespace
} // namespace clip_export
