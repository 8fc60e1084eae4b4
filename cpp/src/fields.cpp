#include "fields.hpp"

#include <algorithm>
#include <limits>

namespace clip_export {
namespace {

std::string type_name(const Json &value) {
    if (value.is_object()) return "dict";
    if (value.is_array()) return "list";
    if (value.is_string()) return "str";
    if (value.is_boolean()) return "bool";
    if (value.is_null()) return "NoneType";
    return value.is_number_float() ? "float" : "int";
}

} // namespace

std::string repr(const Json &value) {
    if (value.is_string()) return repr(value.get_ref<const std::string &>());
    if (value.is_boolean()) return value.get<bool>() ? "True" : "False";
    if (value.is_null()) return "None";
    if (!value.is_structured()) return value.dump();
    std::string out;
    for (const auto &[key, item] : value.items()) {
        out += (out.empty() ? "" : ", ") + (value.is_object() ? repr(key) + ": " : "") + repr(item);
    }
    return value.is_object() ? "{" + out + "}" : "[" + out + "]";
}

Fields::Fields(const Json &data, std::string where, std::initializer_list<const char *> keys)
    : data_(object_of(data, where)), where_(std::move(where)) {
    std::vector<std::string> known, missing, unknown;
    for (std::string key : keys) {
        bool optional = key[0] == '?';
        known.push_back(optional ? key.substr(1) : key);
        if (!optional && !data.contains(key)) missing.push_back(key);
    }
    for (const auto &[key, value] : data.items()) {
        if (std::find(known.begin(), known.end(), key) == known.end()) unknown.push_back(key);
    }
    std::sort(unknown.begin(), unknown.end());
    std::sort(missing.begin(), missing.end());
    require(unknown.empty(), where_ + ": unknown key " + joined(unknown) + " (known: " + joined(known) + ")");
    require(missing.empty(), where_ + ": missing key " + joined(missing));
}

std::int64_t Fields::integer(const char *key) const { return integer_of(at(key), where(key)); }

int Fields::small(const char *key) const {
    std::int64_t value = integer(key);
    bool fits = value >= std::numeric_limits<int>::min() && value <= std::numeric_limits<int>::max();
    require(fits, where(key) + ": " + std::to_string(value) + " is out of range");
    return static_cast<int>(value);
}

double Fields::number(const char *key) const { return number_of(at(key), where(key)); }

bool Fields::flag(const char *key) const {
    require(at(key).is_boolean(), where(key) + ": expected bool, found " + repr(at(key)));
    return at(key).get<bool>();
}

std::string Fields::text(const char *key) const { return text_of(at(key), where(key)); }

std::vector<std::string> Fields::texts(const char *key) const {
    std::vector<std::string> items;
    for (const Json &item : list_of(at(key), where(key))) {
        items.push_back(text_of(item, where(key) + "[" + std::to_string(items.size()) + "]"));
    }
    return items;
}

std::vector<std::int64_t> Fields::integers(const char *key) const {
    std::vector<std::int64_t> items;
    for (const Json &item : list_of(at(key), where(key))) {
        items.push_back(integer_of(item, where(key) + "[" + std::to_string(items.size()) + "]"));
    }
    return items;
}

int Fields::choice(const char *key, std::initializer_list<const char *> choices) const {
    std::vector<std::string> names(choices.begin(), choices.end());
    auto found = at(key).is_string() ? std::find(names.begin(), names.end(), at(key).get<std::string>()) : names.end();
    require(found != names.end(), where(key) + ": " + repr(at(key)) + " is not one of " + joined(names));
    return static_cast<int>(found - names.begin());
}

std::string text_of(const Json &value, const std::string &where) {
    require(value.is_string(), where + ": expected str, found " + repr(value));
    return value.get<std::string>();
}

std::int64_t integer_of(const Json &value, const std::string &where) {
    require(value.is_number_integer(), where + ": expected int, found " + repr(value));
    return value.get<std::int64_t>();
}

double number_of(const Json &value, const std::string &where) {
    require(value.is_number(), where + ": expected float, found " + repr(value));
    return value.get<double>();
}

const Json &object_of(const Json &value, const std::string &where) {
    require(value.is_object(), where + ": expected an object, found " + type_name(value));
    return value;
}

const Json &list_of(const Json &value, const std::string &where) {
    require(value.is_array(), where + ": expected a list, found " + type_name(value));
    return value;
}

} // namespace clip_export
