// HTML's character references, as Python's html.unescape and as ftfy read them.
#pragma once

#include <stdexcept>
#include <string>
#include <string_view>

namespace clip_export::html {

// A number of more decimal digits than Python's int takes from a text (sys.get_int_max_str_digits).
struct TooManyDigits : std::runtime_error {
    explicit TooManyDigits(std::size_t digits);
};

std::u32string unescape(std::u32string_view text);      // html.unescape. Throws TooManyDigits.
std::u32string ftfy_unescape(std::u32string_view text); // ftfy.fixes.unescape_html

} // namespace clip_export::html
