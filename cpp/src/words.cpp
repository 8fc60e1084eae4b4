#include "words.hpp"

#include <cstdlib>
#include <initializer_list>

#include <clip_export/errors.hpp>

#include "unicode.hpp"

namespace clip_export {
namespace {

constexpr char32_t long_s = 0x17F; // the one other character that IGNORECASE takes for a letter in these words

bool begins(std::u32string_view text, std::size_t at, std::u32string_view word) {
    return text.compare(at, word.size(), word) == 0;
}

// The same, where a long s stands for an s.
bool begins_ignoring_case(std::u32string_view text, std::size_t at, std::u32string_view word) {
    if (text.size() - at < word.size()) return false;
    for (std::size_t i = 0; i < word.size(); ++i) {
        if (text[at + i] != word[i] && !(word[i] == U's' && text[at + i] == long_s)) return false;
    }
    return true;
}

// The length of the contraction at `at`, 0 where there is none.
std::size_t contraction(std::u32string_view text, std::size_t at, bool with_long_s) {
    if (text[at] != U'\'' || at + 1 == text.size()) return 0;
    char32_t next = text[at + 1];
    if (next == U's' || next == U't' || next == U'm' || next == U'd' || (with_long_s && next == long_s)) return 2;
    for (std::u32string_view word : {U"'re", U"'ve", U"'ll"}) {
        if (begins(text, at, word)) return 3;
    }
    return 0;
}

template <typename Is> std::size_t run_end(std::u32string_view text, std::size_t at, Is is) {
    while (at < text.size() && is(text[at])) ++at;
    return at;
}

bool in(const std::vector<Range> &ranges, char32_t code) {
    return find_range(ranges.begin(), ranges.end(), code) != nullptr;
}

SpecError other_pattern() {
    return SpecError("the tokenizer JSON splits texts in a way that this version does not know",
                     "build the bundle again, or upgrade clip_export");
}

// Spans as in \x{41}-\x{5a}\x{aa}.
std::vector<Range> parse_ranges(std::string_view text) {
    std::vector<Range> ranges;
    auto code_at = [&](std::size_t &at) {
        std::size_t close = text.find('}', at);
        if (text.compare(at, 3, "\\x{") != 0 || close == std::string_view::npos || close - at > 9) throw other_pattern();
        std::string digits(text.substr(at + 3, close - at - 3));
        char *end = nullptr;
        unsigned long code = std::strtoul(digits.c_str(), &end, 16);
        if (digits.empty() || *end != '\0' || code > 0x10FFFF) throw other_pattern();
        at = close + 1;
        return static_cast<std::uint32_t>(code);
    };
    for (std::size_t at = 0; at < text.size();) {
        std::uint32_t first = code_at(at), last = first;
        if (at < text.size() && text[at] == '-') last = code_at(++at);
        if (last < first || (!ranges.empty() && first <= ranges.back().last)) throw other_pattern();
        ranges.push_back({first, last});
    }
    if (ranges.empty()) throw other_pattern();
    return ranges;
}

// What none of `ranges` has, nor those of `more`.
std::vector<Range> complement(std::vector<Range> ranges, std::initializer_list<const std::vector<Range> *> more) {
    for (const std::vector<Range> *others : more) ranges.insert(ranges.end(), others->begin(), others->end());
    std::sort(ranges.begin(), ranges.end(), [](const Range &a, const Range &b) { return a.first < b.first; });
    std::vector<Range> rest;
    std::uint32_t from = 0;
    for (const Range &range : ranges) {
        if (range.first > from) rest.push_back({from, range.first - 1});
        from = std::max(from, range.last + 1);
    }
    if (from <= 0x10FFFF) rest.push_back({from, 0x10FFFF});
    return rest;
}

// What stands in a dialect's pattern before the letters: special words and contractions.
std::string pattern_head(Dialect dialect) {
    std::string head;
    for (int which = 0; which < 2; ++which) {
        for (char32_t code : special_words(dialect)[which]) {
            head += code == U's' ? "[s\u017f]" : code == U'|' ? "\\|" : std::string(1, static_cast<char>(code));
        }
        head += '|';
    }
    return head + "'[s\u017f]|'t|'re|'ve|'m|'ll|'d|[";
}

} // namespace

const std::u32string *special_words(Dialect dialect) {
    static const std::u32string openai[2] = {U"<|startoftext|>", U"<|endoftext|>"};
    static const std::u32string open_clip[2] = {U"<start_of_text>", U"<end_of_text>"};
    return dialect == Dialect::openai ? openai : dialect == Dialect::open_clip ? open_clip : nullptr;
}

WordClasses WordClasses::parse(std::string_view pattern, Dialect dialect) {
    std::string head = pattern_head(dialect);
    if (pattern.substr(0, head.size()) != head) throw other_pattern();
    pattern.remove_prefix(head.size());
    std::size_t letters_end = pattern.find("]+|[");
    if (letters_end == std::string_view::npos) throw other_pattern();
    std::string_view letters = pattern.substr(0, letters_end);
    pattern.remove_prefix(letters_end + 4);
    std::size_t numbers_end = pattern.find("]|[^");
    if (numbers_end == std::string_view::npos) throw other_pattern();
    std::string_view numbers = pattern.substr(0, numbers_end);
    pattern.remove_prefix(numbers_end + 4);
    std::string both = std::string(letters) + std::string(numbers);
    if (pattern.substr(0, both.size()) != both || pattern.size() < both.size() + 2) throw other_pattern();
    pattern.remove_prefix(both.size());
    if (pattern.substr(pattern.size() - 2) != "]+") throw other_pattern();
    WordClasses classes{parse_ranges(letters), parse_ranges(numbers), {}};
    std::vector<Range> separators = parse_ranges(pattern.substr(0, pattern.size() - 2));
    classes.others = complement(separators, {&classes.letters, &classes.numbers});
    return classes;
}

void split_openai(std::u32string_view text, const WordClasses &classes, Dialect dialect, const EachWord &each) {
    const std::u32string *specials = special_words(dialect);
    auto word_end = [&](std::size_t at) {
        for (int which = 0; which < 2; ++which) {
            if (begins_ignoring_case(text, at, specials[which])) return at + specials[which].size();
        }
        if (std::size_t length = contraction(text, at, true)) return at + length;
        if (in(classes.letters, text[at])) return run_end(text, at, [&](char32_t c) { return in(classes.letters, c); });
        if (in(classes.numbers, text[at])) return at + 1;
        return run_end(text, at, [&](char32_t c) { return in(classes.others, c); });
    };
    for (std::size_t at = 0; at < text.size();) {
        std::size_t end = word_end(at);
        if (end > at) each(text.substr(at, end - at));
        at = std::max(end, at + 1);
    }
}

void split_huggingface(std::u32string_view text, const EachWord &each) {
    auto other = [](char32_t c) {
        return !unicode::is_library_space(c) && !unicode::is_library_letter(c) && !unicode::is_library_number(c);
    };
    for (std::size_t at = 0; at < text.size();) {
        std::size_t special = 0;
        for (std::u32string_view word : {U"<|startoftext|>", U"<|endoftext|>"}) {
            if (begins(text, at, word)) special = word.size();
        }
        if (special) { // one word to CLIP's pattern, three to that of its byte level
            each(text.substr(at, 2));
            each(text.substr(at + 2, special - 4));
            each(text.substr(at + special - 2, 2));
            at += special;
            continue;
        }
        std::size_t end = at + contraction(text, at, false);
        if (end == at && unicode::is_library_letter(text[at])) end = run_end(text, at, unicode::is_library_letter);
        if (end == at && unicode::is_library_number(text[at])) end = at + 1;
        if (end == at) end = run_end(text, at, other);
        if (end > at) each(text.substr(at, end - at));
        at = std::max(end, at + 1);
    }
}

} // namespace clip_export
