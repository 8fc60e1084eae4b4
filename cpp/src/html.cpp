#include "html.hpp"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <optional>

#include "unicode.hpp"

namespace clip_export::html {
namespace {

struct Entity {
    const char *name; // without the ampersand
    const char *text; // UTF-8
};

#include "tables/entities.inc"

constexpr std::size_t python_digits_limit = 4300;

template <std::size_t N> const char *find(const Entity (&table)[N], const std::string &name) {
    auto less = [](const Entity &entity, const std::string &wanted) { return std::strcmp(entity.name, wanted.c_str()) < 0; };
    auto found = std::lower_bound(std::begin(table), std::end(table), name, less);
    return found != std::end(table) && name == found->name ? found->text : nullptr;
}

bool is_digit(char32_t c) { return c >= U'0' && c <= U'9'; }
bool is_hex(char32_t c) { return is_digit(c) || (c >= U'a' && c <= U'f') || (c >= U'A' && c <= U'F'); }
bool is_alphanumeric(char32_t c) { return is_digit(c) || (c >= U'a' && c <= U'z') || (c >= U'A' && c <= U'Z'); }

// What a numeric reference stands for; `number` is at most 0x110000. HTML reads 0x80..0x9F as windows-1252.
std::u32string character(std::uint32_t number) {
    static constexpr char32_t windows_1252[32] = {
        0x20AC, 0x81,   0x201A, 0x192,  0x201E, 0x2026, 0x2020, 0x2021, 0x2C6, 0x2030, 0x160, 0x2039, 0x152, 0x8D,
        0x17D,  0x8F,   0x90,   0x2018, 0x2019, 0x201C, 0x201D, 0x2022, 0x2013, 0x2014, 0x2DC, 0x2122, 0x161, 0x203A,
        0x153,  0x9D,   0x17E,  0x178};
    if (number == 0) return U"\uFFFD";
    if (number == 0x0D) return U"\r";
    if (number >= 0x80 && number <= 0x9F) return {windows_1252[number - 0x80]};
    if ((number >= 0xD800 && number <= 0xDFFF) || number > 0x10FFFF) return U"\uFFFD";
    bool control = (number >= 1 && number <= 8) || number == 0x0B || (number >= 0x0E && number <= 0x1F) || number == 0x7F;
    bool none = (number >= 0xFDD0 && number <= 0xFDEF) || (number & 0xFFFE) == 0xFFFE;
    if (control || none) return U"";
    return {static_cast<char32_t>(number)};
}

std::uint32_t value_of(std::u32string_view digits, std::uint32_t base) {
    std::uint32_t number = 0;
    for (char32_t c : digits) {
        std::uint32_t digit = is_digit(c) ? c - U'0' : (c | 0x20) - U'a' + 10;
        number = std::min<std::uint32_t>(number * base + digit, 0x110000);
    }
    return number;
}

// The end of a run of characters from `at` on.
template <typename Is> std::size_t run_end(std::u32string_view text, std::size_t at, Is is) {
    while (at < text.size() && is(text[at])) ++at;
    return at;
}

// A numeric reference whose `#` is at `at`: what it stands for and where it ends; nothing where it is none.
struct Reference {
    std::u32string text;
    std::size_t end;
};
std::optional<Reference> numeric(std::u32string_view text, std::size_t at) {
    std::size_t start = at + 1;
    bool hex = start < text.size() && (text[start] == U'x' || text[start] == U'X');
    std::size_t from = hex ? start + 1 : start;
    std::size_t end = hex ? run_end(text, from, is_hex) : run_end(text, from, is_digit);
    if (end == from) return std::nullopt;
    if (!hex && end - from > python_digits_limit) throw TooManyDigits(end - from);
    std::u32string what = character(value_of(text.substr(from, end - from), hex ? 16 : 10));
    if (end < text.size() && text[end] == U';') ++end;
    return Reference{what, end};
}

std::u32string from_utf8(const char *bytes) { return unicode::decode(bytes).text; }

// A named reference, whose name begins at `at`: the whole of it, or else the longest beginning that is one.
Reference named(std::u32string_view text, std::size_t at) {
    auto in_name = [](char32_t c) {
        return c != U'\t' && c != U'\n' && c != U'\f' && c != U' ' && c != U'<' && c != U'&' && c != U'#' && c != U';';
    };
    std::size_t end = std::min(run_end(text, at, in_name), at + 32);
    if (end > at && end < text.size() && text[end] == U';') ++end;
    for (std::size_t length = end - at; length > 1; --length) {
        std::u32string_view name = text.substr(at, length);
        if (!unicode::is_ascii(name)) continue;
        if (const char *found = find(html5_entities, unicode::encode(name))) {
            return {from_utf8(found) + std::u32string(text.substr(at + length, end - at - length)), end};
        }
    }
    return {U"&" + std::u32string(text.substr(at, end - at)), end};
}

// One reference of ftfy's, `&name;` whole: what it becomes.
std::u32string ftfy_reference(std::u32string_view whole) {
    std::string name = unicode::encode(whole.substr(1));
    if (const char *found = find(html5_entities, name)) return from_utf8(found);
    if (const char *found = find(ftfy_upper_entities, name)) return from_utf8(found);
    if (whole[1] != U'#') return std::u32string(whole);
    std::u32string unescaped = unescape(whole);
    return unescaped.find(U';') == std::u32string::npos ? unescaped : std::u32string(whole);
}

} // namespace

TooManyDigits::TooManyDigits(std::size_t digits)
    : std::runtime_error("Exceeds the limit (" + std::to_string(python_digits_limit) +
                         " digits) for integer string conversion: value has " + std::to_string(digits) + " digits") {}

std::u32string unescape(std::u32string_view text) {
    if (text.find(U'&') == std::u32string_view::npos) return std::u32string(text);
    std::u32string out;
    out.reserve(text.size());
    for (std::size_t at = 0; at < text.size();) {
        if (text[at] != U'&') {
            out += text[at++];
            continue;
        }
        std::optional<Reference> found;
        if (at + 1 < text.size()) found = text[at + 1] == U'#' ? numeric(text, at + 1) : named(text, at + 1);
        out += found ? found->text : U"&";
        at = found ? found->end : at + 1;
    }
    return out;
}

std::u32string ftfy_unescape(std::u32string_view text) {
    std::u32string out;
    out.reserve(text.size());
    for (std::size_t at = 0; at < text.size();) {
        if (text[at] == U'&') {
            std::size_t from = at + 1 + (at + 1 < text.size() && text[at + 1] == U'#');
            std::size_t end = run_end(text, from, is_alphanumeric);
            if (end > from && end - from <= 24 && end < text.size() && text[end] == U';') {
                out += ftfy_reference(text.substr(at, end + 1 - at));
                at = end + 1;
                continue;
            }
        }
        out += text[at++];
    }
    return out;
}

} // namespace clip_export::html
