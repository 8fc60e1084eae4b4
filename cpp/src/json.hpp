// JSON that strangers wrote: nlohmann's parser, with limits on depth, and strict where a manifest has to be.
#pragma once

#include <stdexcept>
#include <string>
#include <string_view>

#include <nlohmann/json.hpp>

namespace clip_export {

using Json = nlohmann::ordered_json;

struct JsonError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// `strict`: no duplicate keys, no numbers beyond 64 bits or that are no number; keys stay in their order. Throws JsonError
// saying what is wrong, also for more than 100 levels.
Json parse_json(std::string_view bytes, bool strict);

} // namespace clip_export
