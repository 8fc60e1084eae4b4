// JSON objects read key by key, with the errors of Python's spec.from_dict.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "json.hpp"
#include "sentences.hpp"

namespace clip_export {

std::string repr(const Json &value); // as Python's repr

// An object of which every key is known; a key with `?` before it may be absent. Throws SpecError.
class Fields {
  public:
    Fields(const Json &data, std::string where, std::initializer_list<const char *> keys);

    bool has(const char *key) const { return data_.contains(key); }
    bool is_null(const char *key) const { return !has(key) || data_[key].is_null(); }
    const Json &at(const char *key) const { return data_[key]; }
    std::string where(const char *key) const { return where_ + "." + key; }

    std::int64_t integer(const char *key) const;
    int small(const char *key) const; // within int
    double number(const char *key) const;
    bool flag(const char *key) const;
    std::string text(const char *key) const;
    std::vector<std::string> texts(const char *key) const;
    std::vector<std::int64_t> integers(const char *key) const;
    int choice(const char *key, std::initializer_list<const char *> choices) const; // the number of the one it is

  private:
    const Json &data_;
    std::string where_;
};

std::string text_of(const Json &value, const std::string &where);
std::int64_t integer_of(const Json &value, const std::string &where);
double number_of(const Json &value, const std::string &where);
const Json &object_of(const Json &value, const std::string &where);
const Json &list_of(const Json &value, const std::string &where);

} // namespace clip_export
