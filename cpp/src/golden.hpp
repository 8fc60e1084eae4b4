// The golden texts of a bundle: what its tokenizer has to make of them, from golden.safetensors.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace clip_export {

struct GoldenTexts {
    std::vector<std::string> texts;
    std::vector<std::int32_t> input_ids, eot_index; // [n, context_length], [n]
};

// Throws BundleIntegrityError for a file that does not hold together; no texts where it has none.
GoldenTexts read_golden_texts(std::string_view bytes, int context_length);

} // namespace clip_export
