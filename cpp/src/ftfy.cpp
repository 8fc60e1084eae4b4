#include <cstdint>

#include "cleaning.hpp"
#include "html.hpp"
#include "ranges.hpp"
#include "unicode.hpp"

namespace clip_export::ftfy {
namespace {

struct Replacement {
    std::uint32_t code;
    char32_t parts[4]; // as many as are not 0
};
struct Kind { // of the code points from `first` to that of the next entry
    std::uint32_t first;
    std::uint8_t kind;
};

#include "tables/ftfy.inc"

constexpr std::uint8_t matched = 255;
constexpr std::size_t longest_segment = 1000000; // ftfy's max_decode_length

template <std::size_t N> std::u32string replaced(const Replacement (&table)[N], std::u32string_view text) {
    std::u32string out;
    out.reserve(text.size());
    for (char32_t code : text) {
        const Replacement *found = code < table[0].code ? nullptr : find_code(table, code);
        if (!found) {
            out += code;
            continue;
        }
        for (char32_t part : found->parts) {
            if (part) out += part;
        }
    }
    return out;
}

std::u32string with_straight_quotes(std::u32string text) {
    for (char32_t &code : text) {
        if (code >= 0x201C && code <= 0x201F) code = U'"';
        if (code == 0x2BC || (code >= 0x2018 && code <= 0x201B)) code = U'\'';
    }
    return text;
}

std::u32string with_line_feeds(std::u32string_view text) {
    std::u32string out;
    out.reserve(text.size());
    for (std::size_t at = 0; at < text.size(); ++at) {
        char32_t code = text[at];
        if (code == U'\r' && at + 1 < text.size() && text[at + 1] == U'\n') continue;
        bool breaks = code == U'\r' || code == 0x2028 || code == 0x2029 || code == 0x85;
        out += breaks ? U'\n' : code;
    }
    return out;
}

// Without escape sequences of terminals: ESC [ digits and semicolons, then one letter.
std::u32string without_escapes(std::u32string_view text) {
    std::u32string out;
    out.reserve(text.size());
    for (std::size_t at = 0; at < text.size();) {
        if (text[at] == 0x1B && at + 1 < text.size() && text[at + 1] == U'[') {
            std::size_t end = at + 2;
            while (end < text.size() && (text[end] == U';' || unicode::is_python_digit(text[end]))) ++end;
            char32_t letter = end < text.size() ? text[end] | 0x20 : 0;
            if (letter >= U'a' && letter <= U'z' && text[end] < 0x80) {
                at = end + 1;
                continue;
            }
        }
        out += text[at++];
    }
    return out;
}

std::u32string without_controls(std::u32string_view text) {
    std::u32string out;
    out.reserve(text.size());
    for (char32_t code : text) {
        if (!find_range(ftfy_controls, code)) out += code;
    }
    return out;
}

// One segment: all steps, again and again until none changes anything.
std::u32string fixed(std::u32string text, bool unescape, bool &mojibake) {
    while (true) {
        std::u32string before = text;
        if (unescape) text = html::ftfy_unescape(text);
        mojibake = mojibake || (!unicode::is_ascii(text) && is_bad(text));
        text = replaced(ftfy_widths, replaced(ftfy_ligatures, text));
        text = without_controls(without_escapes(with_line_feeds(with_straight_quotes(std::move(text)))));
        text = unicode::python_nfc(text);
        if (text == before) return text;
    }
}

} // namespace

std::u32string fix_text(std::u32string_view text, bool &mojibake) {
    std::u32string out;
    bool unescape = true; // until the first angle bracket: from there on it is taken for HTML
    for (std::size_t at = 0; at < text.size();) {
        std::size_t feed = text.find(U'\n', at);
        std::size_t end = std::min(feed == std::u32string_view::npos ? text.size() : feed + 1, at + longest_segment);
        std::u32string segment(text.substr(at, end - at));
        unescape = unescape && segment.find(U'<') == std::u32string::npos;
        out += fixed(std::move(segment), unescape, mojibake);
        at = end;
    }
    return out;
}

bool is_bad(std::u32string_view text) {
    std::uint8_t state = 0;
    for (char32_t code : text) {
        auto after = std::upper_bound(std::begin(bad_kinds), std::end(bad_kinds), code,
                                      [](char32_t c, const Kind &kind) { return c < kind.first; });
        state = bad_states[state][(after - 1)->kind];
        if (state == matched) return true;
    }
    return false;
}

} // namespace clip_export::ftfy
