#include "unicode.hpp"

#include <utility>

#include "ranges.hpp"

namespace clip_export::unicode {
namespace {

struct Shift { // code points from first to last, every `step`, move by `shift`
    std::uint32_t first, last, step;
    std::int32_t shift;
};
struct Decomposition {
    std::uint32_t code;
    char32_t parts[4]; // as many as are not 0
};
struct Composition {
    std::uint32_t first, second, code;
};
struct CombiningRange {
    std::uint32_t first, last, value;
};

#include "tables/unicode.inc"

constexpr char32_t dotted_capital_i = 0x130, dot_above = 0x307, capital_sigma = 0x3A3, small_sigma = 0x3C3,
                   final_sigma = 0x3C2;

// Hangul syllables are composed by arithmetic.
constexpr char32_t hangul_base = 0xAC00, l_base = 0x1100, v_base = 0x1161, t_base = 0x11A7;
constexpr char32_t l_count = 19, v_count = 21, t_count = 28, syllables = l_count * v_count * t_count;

template <std::size_t N> char32_t shifted(const Shift (&table)[N], char32_t code) {
    const Shift *run = find_range(table, code);
    return run && (code - run->first) % run->step == 0 ? code + run->shift : code;
}

template <std::size_t N> void append_lower(const Shift (&table)[N], char32_t code, std::u32string &lower) {
    if (code == dotted_capital_i) {
        lower += {U'i', dot_above};
    } else {
        lower += shifted(table, code);
    }
}

// Whether a capital sigma at `at` ends a word, as CPython's handle_capital_sigma decides.
bool is_final(std::u32string_view text, std::size_t at) {
    auto ignorable = [](char32_t code) { return find_range(python_case_ignorable, code) != nullptr; };
    auto cased = [](char32_t code) { return find_range(python_cased, code) != nullptr; };
    std::size_t before = at;
    while (before > 0 && ignorable(text[before - 1])) --before;
    if (before == 0 || !cased(text[before - 1])) return false;
    std::size_t after = at + 1;
    while (after < text.size() && ignorable(text[after])) ++after;
    return after == text.size() || !cased(text[after]);
}

// The two Unicodes of normalization: Python's, and what of it the tokenizers library knows.
struct Data {
    bool library;

    bool knows(char32_t code) const { return !library || !find_range(unknown_to_library, code); }

    std::uint32_t combining_class(char32_t code) const {
        const CombiningRange *found = code < 0x300 ? nullptr : find_range(combining_ranges, code);
        return found && knows(code) ? found->value : 0;
    }

    const Decomposition *decomposition(char32_t code) const {
        const Decomposition *found = code < 0xC0 ? nullptr : find_code(decompositions, code);
        return found && knows(code) ? found : nullptr;
    }

    char32_t composition(char32_t first, char32_t second) const { // 0 where there is none
        if (first - l_base < l_count && second - v_base < v_count) {
            return hangul_base + ((first - l_base) * v_count + (second - v_base)) * t_count;
        }
        if (first - hangul_base < syllables && (first - hangul_base) % t_count == 0 && second - t_base - 1 < t_count - 1) {
            return first + (second - t_base);
        }
        std::pair<std::uint32_t, std::uint32_t> wanted{first, second};
        auto less = [](const Composition &c, const auto &pair) { return std::pair{c.first, c.second} < pair; };
        auto found = std::lower_bound(std::begin(compositions), std::end(compositions), wanted, less);
        bool there = found != std::end(compositions) && std::pair{found->first, found->second} == wanted;
        return there && knows(found->code) ? found->code : 0;
    }
};

void append_decomposed(const Data &data, char32_t code, std::u32string &out) {
    if (code - hangul_base < syllables) {
        char32_t index = code - hangul_base, tail = index % t_count;
        out += l_base + index / (v_count * t_count);
        out += v_base + index % (v_count * t_count) / t_count;
        if (tail) out += t_base + tail;
    } else if (const Decomposition *found = data.decomposition(code)) {
        for (char32_t part : found->parts) {
            if (part) out += part;
        }
    } else {
        out += code;
    }
}

// Marks of each run in the order of their classes; equal ones stay as they are.
void put_in_order(const Data &data, std::u32string &text) {
    auto class_of = [&](char32_t code) { return data.combining_class(code); };
    for (std::size_t start = 0; start < text.size();) {
        if (class_of(text[start]) == 0) {
            ++start;
            continue;
        }
        std::size_t end = start;
        while (end < text.size() && class_of(text[end]) != 0) ++end;
        std::stable_sort(text.begin() + start, text.begin() + end,
                         [&](char32_t a, char32_t b) { return class_of(a) < class_of(b); });
        start = end;
    }
}

std::u32string composed(const Data &data, const std::u32string &text) {
    std::u32string out;
    std::size_t starter = std::u32string::npos; // where in `out` the last one is
    std::uint32_t last_class = 0;               // of what was put after it, 0 right after it
    for (char32_t code : text) {
        std::uint32_t its_class = data.combining_class(code);
        bool adjacent = starter != std::u32string::npos && starter + 1 == out.size();
        bool reachable = starter != std::u32string::npos && (adjacent || (last_class != 0 && last_class < its_class));
        char32_t together = reachable ? data.composition(out[starter], code) : 0;
        if (together) {
            out[starter] = together;
            continue;
        }
        if (its_class == 0) starter = out.size();
        last_class = its_class;
        out += code;
    }
    return out;
}

std::u32string nfc(const Data &data, std::u32string_view text) {
    if (std::all_of(text.begin(), text.end(), [](char32_t code) { return code < 0x300; })) return std::u32string(text);
    std::u32string decomposed;
    decomposed.reserve(text.size());
    for (char32_t code : text) append_decomposed(data, code, decomposed);
    put_in_order(data, decomposed);
    return composed(data, decomposed);
}

// How many bytes follow a first byte, and the least code point of that length; -1 for what begins nothing.
int following(unsigned char byte) {
    if (byte >= 0xC2 && byte <= 0xDF) return 1;
    if (byte >= 0xE0 && byte <= 0xEF) return 2;
    if (byte >= 0xF0 && byte <= 0xF4) return 3;
    return -1;
}

} // namespace

Decoded decode(std::string_view bytes) {
    Decoded result;
    result.text.reserve(bytes.size());
    for (std::size_t at = 0; at < bytes.size();) {
        auto first = static_cast<unsigned char>(bytes[at]);
        if (first < 0x80) {
            result.text += first;
            ++at;
            continue;
        }
        int more = following(first);
        char32_t code = more < 0 ? 0 : first & (0x3F >> more);
        bool whole = more > 0 && at + more < bytes.size();
        for (int next = 1; whole && next <= more; ++next) {
            auto byte = static_cast<unsigned char>(bytes[at + next]);
            whole = (byte & 0xC0) == 0x80;
            code = code << 6 | (byte & 0x3F);
        }
        bool allowed = whole && !(more == 2 && code < 0x800) && !(more == 3 && (code < 0x10000 || code > 0x10FFFF)) &&
                       !(code >= 0xD800 && code <= 0xDFFF);
        if (!allowed) {
            result.invalid_at = at;
            return result;
        }
        result.text += code;
        at += more + 1;
    }
    return result;
}

void append_utf8(char32_t code, std::string &bytes) {
    if (code < 0x80) {
        bytes += static_cast<char>(code);
    } else if (code < 0x800) {
        bytes += {static_cast<char>(0xC0 | code >> 6), static_cast<char>(0x80 | (code & 0x3F))};
    } else if (code < 0x10000) {
        bytes += {static_cast<char>(0xE0 | code >> 12), static_cast<char>(0x80 | (code >> 6 & 0x3F)),
                  static_cast<char>(0x80 | (code & 0x3F))};
    } else {
        bytes += {static_cast<char>(0xF0 | code >> 18), static_cast<char>(0x80 | (code >> 12 & 0x3F)),
                  static_cast<char>(0x80 | (code >> 6 & 0x3F)), static_cast<char>(0x80 | (code & 0x3F))};
    }
}

std::string encode(std::u32string_view text) {
    std::string bytes;
    bytes.reserve(text.size());
    for (char32_t code : text) append_utf8(code, bytes);
    return bytes;
}

bool is_ascii(std::u32string_view text) {
    return std::all_of(text.begin(), text.end(), [](char32_t code) { return code < 0x80; });
}

bool is_python_space(char32_t code) { return find_range(python_spaces, code) != nullptr; }
bool is_python_digit(char32_t code) { return find_range(python_digits, code) != nullptr; }
bool is_python_printable(char32_t code) { return find_range(python_printable, code) != nullptr; }

std::u32string python_lower(std::u32string_view text) {
    std::u32string lower;
    lower.reserve(text.size());
    for (std::size_t at = 0; at < text.size(); ++at) {
        if (text[at] == capital_sigma) {
            lower += is_final(text, at) ? final_sigma : small_sigma;
        } else {
            append_lower(python_lower_shifts, text[at], lower);
        }
    }
    return lower;
}

std::u32string python_nfc(std::u32string_view text) { return nfc({false}, text); }

bool is_library_letter(char32_t code) { return find_range(library_letters, code) != nullptr; }
bool is_library_number(char32_t code) { return find_range(library_numbers, code) != nullptr; }
bool is_library_space(char32_t code) { return find_range(library_spaces, code) != nullptr; }

std::u32string library_lower(std::u32string_view text) {
    std::u32string lower;
    lower.reserve(text.size());
    for (char32_t code : text) append_lower(library_lower_shifts, code, lower);
    return lower;
}

std::u32string library_nfc(std::u32string_view text) { return nfc({true}, text); }

} // namespace clip_export::unicode
