// Looking up in tables that are sorted by code point.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>

namespace clip_export {

struct Range {
    std::uint32_t first, last;
};

// The entry whose first..last holds `code`, or null. Entries need `first` and `last`, sorted.
template <typename Iterator> auto find_range(Iterator begin, Iterator end, std::uint32_t code) -> decltype(&*begin) {
    auto after = std::upper_bound(begin, end, code, [](std::uint32_t c, const auto &entry) { return c < entry.first; });
    if (after == begin) return nullptr;
    --after;
    return code <= after->last ? &*after : nullptr;
}

template <typename Entry, std::size_t N> const Entry *find_range(const Entry (&table)[N], std::uint32_t code) {
    return find_range(table, table + N, code);
}

// The entry of exactly `code`, or null. Entries need `code`, sorted.
template <typename Entry, std::size_t N> const Entry *find_code(const Entry (&table)[N], std::uint32_t code) {
    auto found = std::lower_bound(table, table + N, code, [](const Entry &e, std::uint32_t c) { return e.code < c; });
    return found != table + N && found->code == code ? found : nullptr;
}

} // namespace clip_export
