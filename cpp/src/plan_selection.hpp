// Which plan of a bundle runs on this machine, and why each other does not: clip_export/plan_selection.py.
#pragma once

#include <optional>
#include <string>

#include <clip_export/bundle.hpp>

namespace clip_export {

Selection select(const Manifest &manifest, const Machine &machine, const std::optional<std::string> &precision);

} // namespace clip_export
