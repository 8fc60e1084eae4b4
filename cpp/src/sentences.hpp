// What the sentences of errors are made of.
#pragma once

#include <string>
#include <vector>

namespace clip_export {

std::string repr(const std::string &text);         // as Python's repr
std::string printable(const std::string &message); // at most 400 characters, control characters written out
bool is_printable(const std::string &text);        // str.isprintable
std::string joined(const std::vector<std::string> &words, const std::string &between = ", ");
void require(bool condition, const std::string &message); // throws SpecError

} // namespace clip_export
