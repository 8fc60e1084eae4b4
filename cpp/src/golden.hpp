// The golden texts of a bundle: what its tokenizer has to make of them, from golden.safetensors.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include <clip_export/bundle.hpp>

namespace clip_export {

struct GoldenTexts {
    std::vector<std::string> texts;
    std::vector<std::int32_t> input_ids, eot_index; // [n, context_length], [n]
};

// That these can be the samples of a bundle: its context length, its crop size, the outputs of its graphs. Reads the head
// alone, so that no size of a spec is believed, and no room made for it, before there are samples of that size.
// Throws BundleIntegrityError.
void check_golden_shapes(std::string_view bytes, const Manifest &manifest);

// Throws BundleIntegrityError for a file that does not hold together; no texts where it has none.
GoldenTexts read_golden_texts(std::string_view bytes, int context_length);

} // namespace clip_export
