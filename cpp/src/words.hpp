// Cleaned or normalized text -> the words that are byte-pair encoded, in the order in which they stand.
#pragma once

#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include <clip_export/spec.hpp>

#include "ranges.hpp"

namespace clip_export {

using EachWord = std::function<void(std::u32string_view)>;

// The two words that openai and open_clip take for their start and end token where they stand apart.
const std::u32string *special_words(Dialect dialect);

// The classes of code points that a tokenizer.json of openai or open_clip has written out in its pattern.
struct WordClasses {
    std::vector<Range> letters, numbers, others; // `others` are neither these nor separators

    // Throws SpecError where `pattern` is not that of the dialect.
    static WordClasses parse(std::string_view pattern, Dialect dialect);
};

void split_openai(std::u32string_view text, const WordClasses &classes, Dialect dialect, const EachWord &each);
void split_huggingface(std::u32string_view normalized, const EachWord &each);

// The words of a plain text (cleaning.hpp) in lower case: the same in every dialect.
template <typename Each> void split_plain(std::string_view lower, Each each) {
    auto letter = [](char c) { return c >= 'a' && c <= 'z'; };
    auto number = [](char c) { return c >= '0' && c <= '9'; };
    for (std::size_t at = 0; at < lower.size();) {
        std::size_t end = at + 1;
        if (letter(lower[at])) {
            while (end < lower.size() && letter(lower[end])) ++end;
        } else if (lower[at] == ' ') {
            at = end;
            continue;
        } else if (lower[at] == '\'' && end < lower.size() && std::string_view("stmd").find(lower[end]) != std::string::npos) {
            ++end;
        } else if (std::string_view two = lower.substr(at, 3); two == "'re" || two == "'ve" || two == "'ll") {
            end = at + 3;
        } else if (!number(lower[at])) {
            while (end < lower.size() && lower[end] != ' ' && !letter(lower[end]) && !number(lower[end])) ++end;
        }
        each(lower.substr(at, end - at));
        at = end;
    }
}

} // namespace clip_export
