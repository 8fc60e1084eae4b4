// What the original tokenizers do to a text before they split it into words, and which texts need none of it.
#pragma once

#include <string>
#include <string_view>

#include <clip_export/spec.hpp>

namespace clip_export {

// Whether cleaning can only lower the case of `text`, in every dialect: printable ASCII, no markup, not long.
bool is_plain(std::string_view text);

// ftfy, character references twice, white space, lower case: what openai and open_clip do. `mojibake` is set where ftfy
// might have repaired an encoding on the way, which is left out. Throws html::TooManyDigits.
std::u32string cleaned(std::u32string_view text, Dialect dialect, bool &mojibake);

namespace ftfy {
// ftfy.fix_text without its repair of encodings.
std::u32string fix_text(std::u32string_view text, bool &mojibake);
// ftfy.badness.is_bad: whether a text looks like mojibake. Only then does ftfy touch its encoding.
bool is_bad(std::u32string_view text);
} // namespace ftfy

} // namespace clip_export
