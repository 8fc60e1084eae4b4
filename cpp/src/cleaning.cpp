#include "cleaning.hpp"

#include <algorithm>

#include "html.hpp"
#include "unicode.hpp"

namespace clip_export {
namespace {

constexpr std::size_t plain_length = 1000; // as in clip_export/text_cleaning.py

std::u32string_view stripped(std::u32string_view text) {
    while (!text.empty() && unicode::is_python_space(text.front())) text.remove_prefix(1);
    while (!text.empty() && unicode::is_python_space(text.back())) text.remove_suffix(1);
    return text;
}

// " ".join(text.split())
std::u32string with_single_spaces(std::u32string_view text) {
    std::u32string out;
    bool pending = false;
    for (char32_t code : text) {
        if (unicode::is_python_space(code)) {
            pending = !out.empty();
            continue;
        }
        if (pending) out += U' ';
        pending = false;
        out += code;
    }
    return out;
}

} // namespace

bool is_plain(std::string_view text) {
    return text.size() <= plain_length &&
           std::all_of(text.begin(), text.end(), [](char c) { return c >= ' ' && c <= '~' && c != '&' && c != '<'; });
}

std::u32string cleaned(std::u32string_view text, Dialect dialect, bool &mojibake) {
    std::u32string unbroken = html::unescape(html::unescape(ftfy::fix_text(text, mojibake)));
    std::u32string_view inner = stripped(unbroken);
    return unicode::python_lower(dialect == Dialect::open_clip ? with_single_spaces(inner) : std::u32string(inner));
}

} // namespace clip_export
