#include "json.hpp"

#include <cmath>
#include <cstdint>
#include <set>
#include <vector>

#include "sentences.hpp"
#include "unicode.hpp"

namespace clip_export {
namespace {

constexpr std::size_t deepest = 100;

// Builds the tree by hand, so that depth, duplicates and numbers are seen before anything is kept.
class Builder : public nlohmann::json_sax<Json> {
  public:
    Builder(std::string_view bytes, bool strict) : bytes_(bytes), strict_(strict) {}
    Json root;

    bool null() override { return put(nullptr); }
    bool boolean(bool value) override { return put(value); }
    bool number_integer(number_integer_t value) override { return put(value); }
    bool number_unsigned(number_unsigned_t value) override {
        if (strict_ && value > static_cast<std::uint64_t>(INT64_MAX)) throw JsonError(std::to_string(value) + " is out of range");
        return put(value);
    }
    bool number_float(number_float_t value, const string_t &text) override {
        bool whole = text.find_first_of(".eE") == std::string::npos; // an integer that 64 bits do not hold
        if (!std::isfinite(value) || (strict_ && whole)) throw JsonError(text.substr(0, 24) + " is out of range");
        return put(value);
    }
    bool string(string_t &value) override { return put(std::move(value)); }
    bool binary(binary_t &) override { return false; }
    bool start_object(std::size_t) override { return open(Json::object()); }
    bool start_array(std::size_t) override { return open(Json::array()); }
    bool end_object() override { return close(); }
    bool end_array() override { return close(); }
    bool key(string_t &name) override {
        if (!seen_.back().insert(name).second && strict_) throw JsonError("duplicate key " + repr(name));
        keys_.back() = std::move(name);
        return true;
    }
    // `after` bytes were read, the last of them `token`. In our words: the parser's own change from release to release.
    bool parse_error(std::size_t after, const std::string &token, const nlohmann::detail::exception &error) override {
        if (auto at = unicode::decode(bytes_).invalid_at) {
            throw JsonError("it is not UTF-8: byte " + std::to_string(*at) + " begins no character");
        }
        if (error.id == 406) throw JsonError(token.substr(0, 24) + " is out of range");
        if (after > bytes_.size()) throw JsonError("it ends too early");
        std::size_t last = after == 0 ? 0 : after - 1;
        for (std::string_view word : {"NaN", "-Infinity", "Infinity"}) {
            for (std::size_t back = 0; back < 2 && back <= last; ++back) { // `-I` is read before it is refused
                if (bytes_.substr(last - back, word.size()) == word) throw JsonError(std::string(word) + " is not a number");
            }
        }
        if (std::string_view(error.what()).find("surrogate") != std::string_view::npos) {
            throw JsonError("half of a surrogate pair, up to byte " + std::to_string(last));
        }
        throw JsonError("byte " + std::to_string(last) + " is not what may stand there");
    }

  private:
    Json *place(Json value) {
        if (open_.empty()) {
            root = std::move(value);
            return &root;
        }
        Json &parent = *open_.back();
        if (parent.is_array()) {
            parent.push_back(std::move(value));
            return &parent.back();
        }
        // Appending is cheap; looking for an earlier one of that name is not, and only needed where there is one.
        auto &entries = *parent.get_ptr<Json::object_t *>();
        if (seen_.back().size() > entries.size()) {
            entries.emplace_back(keys_.back(), std::move(value));
            return &entries.back().second;
        }
        return &(parent[keys_.back()] = std::move(value));
    }
    bool put(Json value) {
        place(std::move(value));
        return true;
    }
    bool open(Json value) {
        if (open_.size() >= deepest) throw JsonError("it is nested too deep");
        Json *placed = place(std::move(value));
        open_.push_back(placed); // stays where it is: its parent gets no other value before it is closed
        seen_.emplace_back();
        keys_.emplace_back();
        return true;
    }
    bool close() {
        open_.pop_back();
        seen_.pop_back();
        keys_.pop_back();
        return true;
    }

    std::string_view bytes_;
    bool strict_;
    std::vector<Json *> open_;
    std::vector<std::set<std::string>> seen_; // the keys so far of each object that is open
    std::vector<std::string> keys_;
};

} // namespace

Json parse_json(std::string_view bytes, bool strict) {
    Builder builder(bytes, strict);
    Json::sax_parse(bytes.begin(), bytes.end(), &builder);
    return std::move(builder.root);
}

} // namespace clip_export
