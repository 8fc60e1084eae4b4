// A bundle's tokenizer.json, in the format of the tokenizers library: what of it CLIP's tokenizers have.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <clip_export/spec.hpp>

#include "bpe.hpp"
#include "words.hpp"

namespace clip_export {

// A token that is found literally, anywhere in a text: before normalization, or after it.
struct AddedToken {
    std::u32string content;
    std::int32_t id;
    bool normalized;
};

struct TokenizerFile {
    Bpe bpe;
    WordClasses classes;                  // of openai and open_clip
    std::vector<AddedToken> added;        // of huggingface, the longest first
    std::vector<std::int32_t> frame;      // of huggingface: the ids that are put around every text
    bool has_plain_texts = false;         // no added token can occur in a plain text
};

// Throws SpecError for what cannot be read, and for what CLIP's tokenizers do not have: it is never passed over.
TokenizerFile read_tokenizer_json(std::string_view json, Dialect dialect);

} // namespace clip_export
