// Which engine runs a bundle here: a plan that fits this GPU, or its graphs; and if none does, why. As clip_export/choice.py.
#pragma once

#include <map>
#include <string>

#include <clip_export/bundle.hpp>
#include <clip_export/clip.hpp>

#include "engine.hpp"

namespace clip_export {

struct Choice {
    const Backend *backend = nullptr;
    std::string device, precision;
    std::map<Tower, Plan> plans; // empty where graphs are run
    std::size_t batch_size = 32;
    std::string title; // as in "tensorrt-rtx 1.7.1.116, sm_89" or "openvino, cpu"
};

// Throws BundleError, NoPlanError, BackendError, DeviceError or MissingDependencyError.
Choice choose(const Bundle &bundle, const Options &options);

} // namespace clip_export
