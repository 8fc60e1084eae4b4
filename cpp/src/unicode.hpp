// Code points: UTF-8, and what Python, ftfy and the tokenizers library make of each (tables/, written by
// tests/cpp_tables.py).
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace clip_export::unicode {

// The code points of UTF-8, or the offset of the first byte that is none: no surrogates, no overlong forms.
struct Decoded {
    std::u32string text;
    std::optional<std::size_t> invalid_at;
};
Decoded decode(std::string_view bytes);
void append_utf8(char32_t code, std::string &bytes);
std::string encode(std::u32string_view text);

bool is_ascii(std::u32string_view text);

// Of Python 3.11 (Unicode 14.0).
bool is_python_space(char32_t code);
bool is_python_digit(char32_t code);
bool is_python_printable(char32_t code);
std::u32string python_lower(std::u32string_view text); // str.lower, final sigma included
std::u32string python_nfc(std::u32string_view text);

// Of the tokenizers library, which has one Unicode for classes and lower case, and an older one for normalization.
bool is_library_letter(char32_t code);
bool is_library_number(char32_t code);
bool is_library_space(char32_t code);
std::u32string library_lower(std::u32string_view text);
std::u32string library_nfc(std::u32string_view text);

} // namespace clip_export::unicode
