#include <algorithm>

#include "engine.hpp"
#include "sentences.hpp"

namespace clip_export {

#ifdef CLIP_EXPORT_HAS_TENSORRT
Backend tensorrt_backend();
#endif
#ifdef CLIP_EXPORT_HAS_TENSORRT_RTX
Backend tensorrt_rtx_backend();
#endif
#ifdef CLIP_EXPORT_HAS_ONNXRUNTIME
Backend onnxruntime_backend();
#endif
#ifdef CLIP_EXPORT_HAS_OPENVINO
Backend openvino_backend();
#endif

namespace {

struct Known {
    const char *name, *option;
};
constexpr Known known[] = {{"tensorrt", "CLIP_EXPORT_TENSORRT"},
                           {"tensorrt-rtx", "CLIP_EXPORT_TENSORRT_RTX"},
                           {"onnxruntime", "CLIP_EXPORT_ONNXRUNTIME"},
                           {"openvino", "CLIP_EXPORT_OPENVINO"}};

} // namespace

const std::vector<Backend> &compiled_in() {
    static const std::vector<Backend> found = {
#ifdef CLIP_EXPORT_HAS_TENSORRT
        tensorrt_backend(),
#endif
#ifdef CLIP_EXPORT_HAS_TENSORRT_RTX
        tensorrt_rtx_backend(),
#endif
#ifdef CLIP_EXPORT_HAS_ONNXRUNTIME
        onnxruntime_backend(),
#endif
#ifdef CLIP_EXPORT_HAS_OPENVINO
        openvino_backend(),
#endif
    };
    return found;
}

std::vector<std::string> backends() {
    std::vector<std::string> names;
    for (const Backend &backend : compiled_in()) names.push_back(backend.name);
    return names;
}

const Backend &backend_named(const std::string &name) {
    for (const Backend &backend : compiled_in()) {
        if (name == backend.name) return backend;
    }
    std::vector<std::string> names;
    for (const Known &backend : known) {
        names.push_back(backend.name);
        if (name == backend.name) {
            std::vector<std::string> held = backends();
            throw MissingDependencyError("backend " + name + " is not compiled in, only " +
                                             (held.empty() ? "none" : joined(held)),
                                         std::string("configure cpp/ with -D") + backend.option + "=ON, and see what it says");
        }
    }
    throw BackendError("there is no backend " + repr(name), "choose one of: " + joined(names));
}

int device_index(const std::string &device) {
    if (device == "cpu") return -1;
    std::string number = device.rfind("cuda:", 0) == 0 ? device.substr(5) : device == "cuda" ? "0" : "";
    bool digits = !number.empty() && number.size() < 4 && number.find_first_not_of("0123456789") == std::string::npos;
    if (!digits) {
        throw BackendError("expected device cpu or cuda:N, found " + repr(device), "choose cpu, or the number of a GPU");
    }
    return std::stoi(number);
}

std::size_t elements(const Shape &shape) {
    std::size_t count = 1;
    for (std::int64_t size : shape) count *= static_cast<std::size_t>(size);
    return count;
}

std::string text_of(const Shape &shape) {
    std::vector<std::string> sizes;
    for (std::int64_t size : shape) sizes.push_back(std::to_string(size));
    return "[" + joined(sizes) + "]";
}

std::string described(const std::vector<Feed> &feeds) {
    std::vector<std::string> words;
    for (const Feed &feed : feeds) words.push_back(feed.name + " " + text_of(feed.shape));
    return joined(words);
}

void Engine::run_on_device(const std::vector<Feed> &, const std::string &, void *, void *) const {
    throw BackendError("the results of device cpu are on the CPU", "load with device cuda:0, or call it");
}

} // namespace clip_export
