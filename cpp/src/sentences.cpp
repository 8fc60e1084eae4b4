#include "sentences.hpp"

#include <algorithm>
#include <cstdio>

#include <clip_export/errors.hpp>

#include "unicode.hpp"

namespace clip_export {
namespace {

constexpr std::size_t longest_message = 400; // a hostile value must not fill the terminal

void append_escaped(char32_t code, std::string &out) {
    char text[16];
    const char *format = code < 0x100 ? "\\x%02x" : code < 0x10000 ? "\\u%04x" : "\\U%08x";
    std::snprintf(text, sizeof text, format, static_cast<unsigned>(code));
    out += code == U'\n' ? "\\n" : code == U'\r' ? "\\r" : code == U'\t' ? "\\t" : text;
}

} // namespace

std::string repr(const std::string &text) {
    bool double_quoted = text.find('\'') != std::string::npos && text.find('"') == std::string::npos;
    std::string out(1, double_quoted ? '"' : '\'');
    for (char32_t code : unicode::decode(text).text) {
        if (code == U'\\' || (code == U'\'' && !double_quoted)) out += '\\';
        if (unicode::is_python_printable(code)) {
            unicode::append_utf8(code, out);
        } else {
            append_escaped(code, out);
        }
    }
    return out + out[0];
}

std::string printable(const std::string &message) {
    std::u32string text = unicode::decode(message).text;
    bool cut = text.size() > longest_message;
    if (cut) text.resize(longest_message);
    std::string out;
    for (char32_t code : text) {
        if (unicode::is_python_printable(code)) {
            unicode::append_utf8(code, out);
        } else {
            append_escaped(code, out);
        }
    }
    return cut ? out + "\u2026" : out;
}

bool is_printable(const std::string &text) {
    std::u32string codes = unicode::decode(text).text;
    return std::all_of(codes.begin(), codes.end(), unicode::is_python_printable);
}

std::string joined(const std::vector<std::string> &words, const std::string &between) {
    std::string out;
    for (const std::string &word : words) out += (out.empty() ? "" : between) + word;
    return out;
}

void require(bool condition, const std::string &message) {
    if (!condition) throw SpecError(message);
}

} // namespace clip_export
