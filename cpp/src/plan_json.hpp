// What a manifest says of a plan.
#pragma once

#include <clip_export/bundle.hpp>

#include "json.hpp"

namespace clip_export {

// Throws SpecError. `inspector` is the file of its layers, "" where there is none.
Plan plan_from_json(const Json &data, const std::string &where, std::string &inspector);

bool is_sha256(const std::string &text);

} // namespace clip_export
