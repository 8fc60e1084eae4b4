// Texts and images in, embeddings out: a bundle, its tokenizer and preprocessing, and the engines that run here.
//
//     auto clip = clip_export::Clip::open("engines/demo");
//     std::vector<float> embedding = clip.encode_text({"a red circle"});   // [1 * embedding_dim], of length 1
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <clip_export/bundle.hpp>
#include <clip_export/errors.hpp>
#include <clip_export/preprocess.hpp>
#include <clip_export/tokenizer.hpp>

namespace clip_export {

// How a bundle is opened. Everything has the default that Python's clip_export.load has.
struct Options {
    std::string backend;   // tensorrt, tensorrt-rtx, onnxruntime, openvino; "": the best that works here
    std::string device;    // cpu, cuda:0; "": what the backend runs on
    std::string precision; // of the plan or graph; "": the fastest plan, fp32 of the graphs
    bool check_files = true; // hash every file
    int threads = 0;         // of one engine on the CPU; 0: all cores
    int batch_size = 0;      // the most that an engine is given at once; 0: what suits it
    Mojibake mojibake = Mojibake::refuse;
    std::function<void(const std::string &)> warn; // by default: a line on stderr

    // Of plans alone.
    bool cuda_graphs = true;      // launch a shape that comes again as a whole
    int max_contexts = 4;         // threads that run at once; each takes activation memory
    bool allow_host_code = false; // open version-compatible plans, which carry code that runs on this machine
};

// The backends that are compiled in, the best first.
std::vector<std::string> backends();

// One CLIP model, or one tower of it. May be shared by threads.
class Clip {
  public:
    // Throws BundleError for a bundle that is damaged or whose golden texts are tokenized in another way here, NoPlanError,
    // BackendError, DeviceError or MissingDependencyError where no engine can be opened.
    static Clip open(const std::filesystem::path &path, const Options &options = {});

    ~Clip();
    Clip(Clip &&) noexcept;
    Clip &operator=(Clip &&) noexcept;

    // Embeddings, [n * embedding_dim(tower)], each of length 1 unless `normalize` is false. Throw TextError or ImageError
    // naming the input, InputError where the bundle has no such tower or was built without embeddings.
    std::vector<float> encode_text(const std::vector<std::string> &texts, bool normalize = true,
                                   std::optional<bool> truncate = std::nullopt) const;
    std::vector<float> encode_images(const std::vector<ImageView> &images, bool normalize = true) const;
    std::vector<float> encode_image(const std::uint8_t *rgb, std::int64_t width, std::int64_t height,
                                    bool normalize = true) const;
    // From what preprocess() gives: n * 3 * crop_size * crop_size levels.
    std::vector<float> encode_pixels(const std::uint8_t *pixels, std::size_t n, bool normalize = true) const;

    // Zero copy on a GPU: n images of pixels as preprocess() gives them, in device memory, to n embeddings in device memory.
    // What `stream` (a cudaStream_t) holds so far is waited for, and whatever comes after it in `stream` finds the
    // embeddings complete. Throws InputError where no engine of a GPU runs the tower.
    void encode_image_device(const void *device_pixels, std::size_t n, void *stream, void *device_embeddings,
                             bool normalize = true) const;

    // exp(logit_scale) * cosine (+ logit_bias), [n_images * n_texts]. Throws InputError where there is no logit scale.
    std::vector<float> similarity(const std::vector<ImageView> &images, const std::vector<std::string> &texts) const;

    Tokens tokenize(const std::vector<std::string> &texts, std::optional<bool> truncate = std::nullopt) const;
    std::vector<std::uint8_t> preprocess(const std::vector<ImageView> &images) const;

    bool has(Tower tower) const;
    int embedding_dim(Tower tower) const; // throws InputError for a tower that is not there or gives no embedding
    double logit_factor() const;
    const ModelSpec &spec() const;
    const std::string &engine() const; // what runs it, as in "openvino, cpu"

  private:
    struct Parts;
    explicit Clip(std::unique_ptr<Parts> parts);
    std::unique_ptr<Parts> parts_;
};

} // namespace clip_export
