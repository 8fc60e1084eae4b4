#include <clip_export/tokenizer.hpp>

#include <algorithm>
#include <cstdio>
#include <unordered_map>

#include "cleaning.hpp"
#include "html.hpp"
#include "tokenizer_json.hpp"
#include "unicode.hpp"

namespace clip_export {
namespace {

using Ids = std::vector<std::int32_t>;

constexpr int longest_context = 1 << 20; // far beyond any model: a hostile bundle must not fill the memory

void to_stderr(const std::string &message) { std::fprintf(stderr, "warning: %s\n", message.c_str()); }

std::string listed(const Ids &ids) {
    std::string out = "[";
    for (std::size_t i = 0; i < ids.size(); ++i) out += (i ? ", " : "") + std::to_string(ids[i]);
    return out + "]";
}

std::string lower_ascii(std::string text) {
    for (char &c : text) {
        if (c >= 'A' && c <= 'Z') c += 'a' - 'A';
    }
    return text;
}

// The normalization of huggingface: NFC, white space as one space, lower case. White space parts words whatever it is,
// and never comes out in ids; only an added token may hold some.
std::u32string library_normalized(std::u32string_view text) {
    std::u32string composed = unicode::library_nfc(text), spaced;
    spaced.reserve(composed.size());
    bool in_space = false;
    for (char32_t code : composed) {
        bool space = unicode::is_library_space(code);
        if (!space) spaced += code;
        if (space && !in_space) spaced += U' ';
        in_space = space;
    }
    return unicode::library_lower(spaced);
}

// The words of one call and their ids: captions repeat their words.
class Memory {
  public:
    explicit Memory(const Bpe &bpe) : bpe_(bpe) {}

    void append(std::string_view word, Ids &ids) {
        if (word.size() > longest) return bpe_.encode(word, ids);
        auto [found, is_new] = known_.try_emplace(std::string(word));
        if (is_new) bpe_.encode(word, found->second);
        ids.insert(ids.end(), found->second.begin(), found->second.end());
        if (known_.size() > most) known_.clear();
    }

  private:
    static constexpr std::size_t longest = 64, most = 1 << 16;
    const Bpe &bpe_;
    std::unordered_map<std::string, Ids> known_;
};

} // namespace

struct Tokenizer::Parts {
    TokenizerSpec spec;
    TokenizerOptions options;
    TokenizerFile file;

    Ids encode(const std::string &text, std::size_t row, Memory &memory) const;
    void encode_words(std::u32string_view text, std::size_t row, Memory &memory, Ids &ids) const;
    void encode_pieces(std::u32string_view text, bool normalized, Memory &memory, Ids &ids) const;
    void require_ends() const;
    void require_fit(const std::vector<std::size_t> &lengths) const;
    void frame(const Ids &ids, std::int32_t *row) const;
    std::int32_t eot_index(const std::int32_t *row) const;
};

Ids Tokenizer::Parts::encode(const std::string &text, std::size_t row, Memory &memory) const {
    Ids ids;
    if (file.has_plain_texts && is_plain(text)) {
        split_plain(lower_ascii(text), [&](std::string_view word) { memory.append(word, ids); });
        return ids;
    }
    unicode::Decoded decoded = unicode::decode(text);
    if (decoded.invalid_at) {
        throw TextError("text " + std::to_string(row) + " cannot be encoded: byte " + std::to_string(*decoded.invalid_at) +
                            " begins no character of UTF-8",
                        "decode its bytes with errors='replace', or remove the text");
    }
    if (spec.dialect == Dialect::huggingface) {
        encode_pieces(decoded.text, false, memory, ids);
    } else {
        encode_words(decoded.text, row, memory, ids);
    }
    return ids;
}

void Tokenizer::Parts::encode_words(std::u32string_view text, std::size_t row, Memory &memory, Ids &ids) const {
    bool mojibake = false;
    std::u32string clean;
    try {
        clean = cleaned(text, spec.dialect, mojibake);
    } catch (const html::TooManyDigits &error) {
        throw TextError("text " + std::to_string(row) + " cannot be encoded: " + error.what(),
                        "decode its bytes with errors='replace', or remove the text");
    }
    if (mojibake) {
        std::string message = "text " + std::to_string(row) + " looks like mojibake, which the " + name_of(spec.dialect) +
                              " dialect repairs with ftfy, and clip_export in C++ does not";
        std::string hint = "run ftfy.fix_text on it first, or set TokenizerOptions::mojibake to Mojibake::warn";
        if (options.mojibake == Mojibake::refuse) throw TextError(message, hint);
        options.warn(message + "; it is tokenized as it stands");
    }
    auto append = [&](std::u32string_view word) { memory.append(unicode::encode(word), ids); };
    split_openai(clean, file.classes, spec.dialect, append);
}

// Added tokens first, in the text as it is and then in what is left of it once it is normalized: the leftmost, and of
// those the longest.
void Tokenizer::Parts::encode_pieces(std::u32string_view text, bool normalized, Memory &memory, Ids &ids) const {
    auto encode_rest = [&](std::u32string_view rest) {
        if (rest.empty()) return;
        if (!normalized) return encode_pieces(library_normalized(rest), true, memory, ids);
        split_huggingface(rest, [&](std::u32string_view word) { memory.append(unicode::encode(word), ids); });
    };
    std::size_t start = 0;
    for (std::size_t at = 0; at < text.size();) {
        auto stands_here = [&](const AddedToken &token) {
            return token.normalized == normalized && text.compare(at, token.content.size(), token.content) == 0;
        };
        auto found = std::find_if(file.added.begin(), file.added.end(), stands_here);
        if (found == file.added.end()) {
            ++at;
            continue;
        }
        encode_rest(text.substr(start, at - start));
        ids.push_back(found->id);
        start = at += found->content.size();
    }
    encode_rest(text.substr(start));
}

// That the JSON's start and end are the spec's, so that ids can be framed and cut without it.
void Tokenizer::Parts::require_ends() const {
    Ids found = file.frame;
    if (const std::u32string *words = special_words(spec.dialect)) {
        for (int which = 0; which < 2; ++which) file.bpe.encode(unicode::encode(words[which]), found);
    }
    Ids expected = {spec.start_id, spec.end_id};
    if (found != expected) {
        throw SpecError("expected start and end ids " + listed(expected) + " in dialect " + name_of(spec.dialect) +
                            ", the tokenizer has " + listed(found),
                        "use the tokenizer.json that was made for this dialect and checkpoint");
    }
    bool possible = spec.context_length >= 2 && spec.context_length <= longest_context;
    if (!possible) throw SpecError("context_length cannot be " + std::to_string(spec.context_length));
}

void Tokenizer::Parts::require_fit(const std::vector<std::size_t> &lengths) const {
    auto context = static_cast<std::size_t>(spec.context_length);
    std::size_t first = lengths.size(), count = 0;
    for (std::size_t row = lengths.size(); row-- > 0;) {
        if (lengths[row] + 2 > context) first = row, ++count;
    }
    if (count == 0) return;
    std::string more = count > 1 ? " (and " + std::to_string(count - 1) + " more are too long)" : "";
    throw TextError("text " + std::to_string(first) + " has " + std::to_string(lengths[first] + 2) +
                        " tokens with start and end, the context holds " + std::to_string(context) + more,
                    "shorten it, or pass truncate=True to keep its beginning");
}

// Start, ids, end, padding. What does not fit before the end is left out.
void Tokenizer::Parts::frame(const Ids &ids, std::int32_t *row) const {
    std::size_t kept = std::min(ids.size(), static_cast<std::size_t>(spec.context_length - 2));
    std::fill(row, row + spec.context_length, spec.pad_id);
    row[0] = spec.start_id;
    std::copy(ids.begin(), ids.begin() + kept, row + 1);
    row[kept + 1] = spec.end_id;
}

std::int32_t Tokenizer::Parts::eot_index(const std::int32_t *row) const {
    const std::int32_t *end = row + spec.context_length;
    const std::int32_t *found =
        spec.pooling == Pooling::argmax ? std::max_element(row, end) : std::find(row, end, spec.end_id);
    return found == end ? 0 : static_cast<std::int32_t>(found - row);
}

Tokenizer::Tokenizer(const TokenizerSpec &spec, std::string_view tokenizer_json, TokenizerOptions options) {
    if (!options.warn) options.warn = to_stderr;
    Parts parts{spec, std::move(options), read_tokenizer_json(tokenizer_json, spec.dialect)};
    parts.require_ends();
    parts_ = std::make_unique<const Parts>(std::move(parts));
}

Tokenizer::~Tokenizer() = default;
Tokenizer::Tokenizer(Tokenizer &&) noexcept = default;
Tokenizer &Tokenizer::operator=(Tokenizer &&) noexcept = default;

Tokens Tokenizer::operator()(const std::vector<std::string> &texts, std::optional<bool> truncate) const {
    const Parts &parts = *parts_;
    Memory memory(parts.file.bpe);
    Tokens tokens;
    tokens.context_length = parts.spec.context_length;
    tokens.input_ids.resize(texts.size() * tokens.context_length);
    tokens.eot_index.resize(texts.size());
    std::vector<std::size_t> lengths(texts.size());
    for (std::size_t row = 0; row < texts.size(); ++row) {
        Ids ids = parts.encode(texts[row], row, memory);
        std::int32_t *target = tokens.input_ids.data() + row * tokens.context_length;
        parts.frame(ids, target);
        tokens.eot_index[row] = parts.eot_index(target);
        lengths[row] = ids.size();
    }
    if (!truncate.value_or(parts.spec.truncate)) parts.require_fit(lengths);
    return tokens;
}

const TokenizerSpec &Tokenizer::spec() const { return parts_->spec; }

} // namespace clip_export
