// Which optimization profile runs a batch, and how a batch is cut and padded so that one does: backends/profiles.py.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <vector>

#include <clip_export/bundle.hpp>

namespace clip_export {

// Some rows of a batch and how they are run: `rows` of them, padded to `size`, with profile number `profile`.
struct Part {
    std::int64_t rows, size;
    int profile;
};

// How a batch of `rows` is run, in the order of its rows; `rest` are the shapes of one row of each input. Throws InputError
// where no profile holds them.
std::vector<Part> split(std::int64_t rows, const std::vector<Profile> &profiles, const std::map<std::string, Shape> &rest);

} // namespace clip_export
