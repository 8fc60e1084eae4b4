#include "bpe.hpp"

#include <queue>

#include <clip_export/errors.hpp>

#include "unicode.hpp"

namespace clip_export {
namespace {

constexpr std::int32_t none = -1;
constexpr std::size_t short_word = 48; // symbols: below, looking at all pairs again is the quickest

std::uint64_t key(std::int32_t left, std::int32_t right) {
    return static_cast<std::uint64_t>(static_cast<std::uint32_t>(left)) << 32 | static_cast<std::uint32_t>(right);
}

// The printable stand-in of each byte: itself where it is printable in Latin-1, else the next from U+0100 on.
std::array<std::string, 256> byte_letters() {
    std::array<std::string, 256> letters;
    char32_t next = 0x100;
    for (int byte = 0; byte < 256; ++byte) {
        bool printable = (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
        unicode::append_utf8(printable ? static_cast<char32_t>(byte) : next++, letters[byte]);
    }
    return letters;
}

} // namespace

Bpe::Bpe(std::unordered_map<std::string, std::int32_t> vocabulary,
         const std::vector<std::pair<std::string, std::string>> &merges, const std::string &end_of_word,
         std::optional<std::int32_t> unknown) {
    auto id_of = [&](const std::string &symbol) {
        auto found = vocabulary.find(symbol);
        return found == vocabulary.end() ? none : found->second;
    };
    std::array<std::string, 256> letters = byte_letters();
    for (int byte = 0; byte < 256; ++byte) {
        inner_[byte] = id_of(letters[byte]);
        last_[byte] = id_of(letters[byte] + end_of_word);
        if (inner_[byte] == none) inner_[byte] = unknown.value_or(none);
        if (last_[byte] == none) last_[byte] = unknown.value_or(none);
    }
    merges_.reserve(merges.size());
    std::unordered_map<std::int32_t, bool> made;
    for (std::uint32_t rank = 0; rank < merges.size(); ++rank) {
        const auto &[left, right] = merges[rank];
        std::int32_t ids[3] = {id_of(left), id_of(right), id_of(left + right)};
        for (int which = 0; which < 3; ++which) {
            if (ids[which] == none) {
                const std::string &symbol = which == 0 ? left : which == 1 ? right : left + right;
                throw SpecError("the tokenizer JSON has a merge of '" + symbol + "', which its vocabulary lacks",
                                "build the bundle again");
            }
        }
        merges_[key(ids[0], ids[1])] = {rank, ids[2]};
        distinct_ = made.emplace(ids[2], true).second && distinct_;
    }
}

const Bpe::Merge *Bpe::find(std::int32_t left, std::int32_t right) const {
    auto found = merges_.find(key(left, right));
    return found == merges_.end() ? nullptr : &found->second;
}

void Bpe::encode(std::string_view bytes, std::vector<std::int32_t> &ids) const {
    std::vector<std::int32_t> symbols;
    symbols.reserve(bytes.size());
    for (std::size_t at = 0; at < bytes.size(); ++at) {
        auto byte = static_cast<unsigned char>(bytes[at]);
        std::int32_t id = at + 1 == bytes.size() ? last_[byte] : inner_[byte];
        if (id != none) symbols.push_back(id); // what has no id, and no unknown token stands for, is left out
    }
    if (symbols.size() <= short_word && distinct_) {
        merge_short(symbols);
    } else {
        merge_long(symbols);
    }
    ids.insert(ids.end(), symbols.begin(), symbols.end());
}

// Again and again the best pair, and of equal ones the first.
void Bpe::merge_short(std::vector<std::int32_t> &symbols) const {
    std::array<const Merge *, short_word> pairs{};
    for (std::size_t at = 0; at + 1 < symbols.size(); ++at) pairs[at] = find(symbols[at], symbols[at + 1]);
    while (symbols.size() > 1) {
        std::size_t count = symbols.size(), best = count;
        for (std::size_t at = 0; at + 1 < count; ++at) {
            if (pairs[at] && (best == count || pairs[at]->rank < pairs[best]->rank)) best = at;
        }
        if (best == count) return;
        symbols[best] = pairs[best]->id;
        symbols.erase(symbols.begin() + best + 1);
        for (std::size_t at = best + 1; at + 1 < symbols.size(); ++at) pairs[at] = pairs[at + 1];
        if (best > 0) pairs[best - 1] = find(symbols[best - 1], symbols[best]);
        if (best + 1 < symbols.size()) pairs[best] = find(symbols[best], symbols[best + 1]);
    }
}

// The same by a queue, in the time of n log n. An entry is out of date where its pair now makes another symbol: that is
// the library's own test, and tells two merges into one symbol not apart.
void Bpe::merge_long(std::vector<std::int32_t> &symbols) const {
    struct Entry {
        std::uint32_t rank;
        std::size_t at;
        std::int32_t id;
        bool operator<(const Entry &other) const {
            return rank != other.rank ? rank > other.rank : at > other.at;
        }
    };
    std::size_t count = symbols.size();
    std::vector<std::size_t> next(count), before(count);
    std::priority_queue<Entry> queue;
    auto offer = [&](std::size_t at) {
        if (next[at] >= count) return;
        if (const Merge *merge = find(symbols[at], symbols[next[at]])) queue.push({merge->rank, at, merge->id});
    };
    for (std::size_t at = 0; at < count; ++at) next[at] = at + 1, before[at] = at - 1;
    for (std::size_t at = 0; at < count; ++at) offer(at);
    while (!queue.empty()) {
        Entry entry = queue.top();
        queue.pop();
        std::size_t at = entry.at, right = next[at];
        if (symbols[at] == none || right >= count) continue;
        const Merge *merge = find(symbols[at], symbols[right]);
        if (!merge || merge->id != entry.id) continue;
        symbols[at] = merge->id;
        symbols[right] = none;
        next[at] = next[right];
        if (next[at] < count) before[next[at]] = at;
        if (before[at] < count) offer(before[at]);
        offer(at);
    }
    std::size_t kept = 0;
    for (std::int32_t symbol : symbols) {
        if (symbol != none) symbols[kept++] = symbol;
    }
    symbols.resize(kept);
}

} // namespace clip_export
