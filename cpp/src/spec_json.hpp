// The `spec` of a manifest.
#pragma once

#include <clip_export/spec.hpp>

#include "json.hpp"

namespace clip_export {

// Throws SpecError for unknown, missing and mistyped keys, and for values that cannot be.
ModelSpec spec_from_json(const Json &data, const std::string &where);

} // namespace clip_export
