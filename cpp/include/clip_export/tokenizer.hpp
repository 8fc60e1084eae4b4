// Texts -> token ids, equal id by id to Python's clip_export.tokenizer, in the dialects openai, open_clip and huggingface.
//
//     clip_export::Tokenizer tokenizer(spec, tokenizer_json);
//     clip_export::Tokens tokens = tokenizer({"a red circle"});   // tokens.input_ids: [1 * context_length]
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <clip_export/errors.hpp>
#include <clip_export/spec.hpp>

namespace clip_export {

// Token ids of n texts: `input_ids` [n, context_length], padded as the dialect pads; `eot_index` [n], the position whose
// hidden state is pooled.
struct Tokens {
    std::vector<std::int32_t> input_ids, eot_index;
    int context_length = 0;

    std::size_t size() const { return eot_index.size(); }
    const std::int32_t *row(std::size_t index) const { return input_ids.data() + index * context_length; }
};

// openai and open_clip repair text with ftfy, whose repair of mojibake (text decoded in a wrong encoding) is the one part
// of a dialect that is not here. Text that looks like mojibake to ftfy is refused, or tokenized without that repair and
// said to `warn`; it is never tokenized differently in silence.
enum class Mojibake { refuse, warn };

struct TokenizerOptions {
    Mojibake mojibake = Mojibake::refuse;
    std::function<void(const std::string &)> warn; // by default: a line on stderr
};

// May be shared by threads: nothing in it changes.
class Tokenizer {
  public:
    // `tokenizer_json` is a bundle's tokenizer.json. Throws SpecError where it cannot be read, or does not have the start
    // and end ids of `spec`.
    Tokenizer(const TokenizerSpec &spec, std::string_view tokenizer_json, TokenizerOptions options = {});
    ~Tokenizer();
    Tokenizer(Tokenizer &&) noexcept;
    Tokenizer &operator=(Tokenizer &&) noexcept;

    // Tokenize UTF-8 texts; `truncate` overrides the dialect's default for texts that do not fit. Throws TextError, naming
    // the index.
    Tokens operator()(const std::vector<std::string> &texts, std::optional<bool> truncate = std::nullopt) const;

    const TokenizerSpec &spec() const;

  private:
    struct Parts;
    std::unique_ptr<const Parts> parts_;
};

} // namespace clip_export
