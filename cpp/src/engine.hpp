// A graph or a plan that runs: what every backend offers, and knows nothing of CLIP.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include <clip_export/bundle.hpp>
#include <clip_export/clip.hpp>

namespace clip_export {

enum class Dtype { uint8, int32 };

inline std::size_t item_bytes(Dtype dtype) { return dtype == Dtype::uint8 ? 1 : 4; }
inline const char *name_of(Dtype dtype) { return dtype == Dtype::uint8 ? "uint8" : "int32"; }

std::size_t elements(const Shape &shape);
std::string text_of(const Shape &shape); // as in [2, 77]

// One input of a run, not owned; in the memory of the host, or of the GPU where a function says so.
struct Feed {
    std::string name;
    Dtype dtype;
    Shape shape;
    const void *data;
};

std::string described(const std::vector<Feed> &feeds); // as in "input_ids [2, 77], eot_index [2]"

struct Array {
    Shape shape;
    std::vector<float> values;
};

class Engine {
  public:
    Engine() = default;
    Engine(const Engine &) = delete;
    Engine &operator=(const Engine &) = delete;
    virtual ~Engine() = default;

    virtual const std::vector<std::string> &outputs() const = 0;

    // The shape that an output is declared with, -1 for what varies; empty where nothing is declared.
    virtual Shape output_shape(const std::string &output) const = 0;

    // Arrays by output name. Safe from several threads. Throws BackendError.
    virtual std::map<std::string, Array> run(const std::vector<Feed> &feeds) const = 0;

    // Whether it can leave results on a GPU; and the run that does, for feeds on the GPU, ordered into `stream`.
    virtual bool on_device() const { return false; }
    virtual void run_on_device(const std::vector<Feed> &feeds, const std::string &output, void *target, void *stream) const;
};

// What an engine is opened for: a graph, or a plan where there is one.
struct EngineRequest {
    std::filesystem::path path;
    const Plan *plan = nullptr;
    std::string device; // cpu, cuda:0
    std::function<void(const std::string &)> warn;
    const Options *options = nullptr;
};

struct Gpu {
    std::string compute_capability;
    std::int64_t free_bytes;
};

// A backend that is compiled in.
struct Backend {
    const char *name;
    bool runs_plans;
    std::string (*version)();
    std::unique_ptr<Engine> (*open)(const EngineRequest &request);
    Gpu (*gpu)(const std::string &device); // of one that runs plans. Throws DeviceError where there is none.
};

const std::vector<Backend> &compiled_in();

// Throws MissingDependencyError for one that is not compiled in, BackendError for one that there is not.
const Backend &backend_named(const std::string &name);

// The number of a GPU in `cuda:N`, 0 in `cuda`, -1 for `cpu`. Throws BackendError.
int device_index(const std::string &device);

} // namespace clip_export
