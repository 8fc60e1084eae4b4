// Byte-pair encoding: the bytes of one word -> ids, as the BPE model of the tokenizers library gives them.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace clip_export {

class Bpe {
  public:
    // `vocabulary` is symbol -> id, where a symbol spells each byte by its printable stand-in and may end in
    // `end_of_word`; `merges` are pairs of symbols, best first; `unknown` is the id for what has none, if any. Throws
    // SpecError for merges of symbols that the vocabulary does not have.
    Bpe(std::unordered_map<std::string, std::int32_t> vocabulary,
        const std::vector<std::pair<std::string, std::string>> &merges, const std::string &end_of_word,
        std::optional<std::int32_t> unknown);

    // Append the ids of the word that these bytes are.
    void encode(std::string_view bytes, std::vector<std::int32_t> &ids) const;

  private:
    struct Merge {
        std::uint32_t rank;
        std::int32_t id;
    };

    const Merge *find(std::int32_t left, std::int32_t right) const;
    void merge_short(std::vector<std::int32_t> &symbols) const;
    void merge_long(std::vector<std::int32_t> &symbols) const;

    std::array<std::int32_t, 256> inner_{}, last_{}; // the ids of a byte within a word and at its end; -1: none
    std::unordered_map<std::uint64_t, Merge> merges_;
    bool distinct_ = true; // no two merges make the same symbol
};

} // namespace clip_export
