#include "golden.hpp"

#include <cstring>

#include <clip_export/errors.hpp>

#include "json.hpp"

namespace clip_export {
namespace {

void require_whole(bool condition, const std::string &message) {
    if (!condition) throw BundleIntegrityError("golden.safetensors: " + message, "build the bundle again");
}

// The tensors of a safetensors file, each found by its name in a JSON head whose length comes first.
class Tensors {
  public:
    explicit Tensors(std::string_view bytes) {
        std::uint64_t length = 0;
        require_whole(bytes.size() >= 8, "not a safetensors file: it has no head");
        std::memcpy(&length, bytes.data(), 8); // little endian, as this machine is taken to be
        require_whole(length <= bytes.size() - 8, "not a safetensors file: its head is cut short");
        try {
            head_ = parse_json(bytes.substr(8, length), false);
        } catch (const JsonError &error) {
            require_whole(false, std::string("not a safetensors file: ") + error.what());
        }
        require_whole(head_.is_object(), "not a safetensors file: its head is no object");
        data_ = bytes.substr(8 + length);
    }

    bool has(const std::string &name) const { return head_.contains(name); }

    // The values of a tensor of `dtype`, whose bytes lie wherever they do.
    template <typename T> std::vector<T> take(const std::string &name, const char *dtype) const {
        require_whole(has(name), name + " is missing");
        std::uint64_t from = 0, to = 0;
        bool fits = false;
        try {
            const Json &entry = head_.at(name);
            from = entry.at("data_offsets").at(0).get<std::uint64_t>();
            to = entry.at("data_offsets").at(1).get<std::uint64_t>();
            fits = entry.at("dtype") == dtype;
        } catch (const nlohmann::json::exception &) {
            fits = false;
        }
        require_whole(fits && from <= to && to <= data_.size() && (to - from) % sizeof(T) == 0, name + ": expected " + dtype);
        std::vector<T> values((to - from) / sizeof(T));
        if (!values.empty()) std::memcpy(values.data(), data_.data() + from, to - from);
        return values;
    }

  private:
    Json head_;
    std::string_view data_;
};

} // namespace

GoldenTexts read_golden_texts(std::string_view bytes, int context_length) {
    Tensors tensors(bytes);
    if (!tensors.has("text.texts.bytes")) return {};
    auto packed = tensors.take<char>("text.texts.bytes", "U8");
    auto offsets = tensors.take<std::int64_t>("text.texts.offsets", "I64");
    GoldenTexts golden;
    golden.input_ids = tensors.take<std::int32_t>("text.input_ids", "I32");
    golden.eot_index = tensors.take<std::int32_t>("text.eot_index", "I32");
    bool whole = offsets.size() > 1 && offsets.front() == 0 && offsets.back() == static_cast<std::int64_t>(packed.size());
    for (std::size_t i = 1; i < offsets.size(); ++i) whole = whole && offsets[i - 1] <= offsets[i];
    require_whole(whole, "text.texts.offsets: expected 0 up to " + std::to_string(packed.size()) + ", never falling");
    for (std::size_t i = 1; i < offsets.size(); ++i) {
        golden.texts.emplace_back(packed.data() + offsets[i - 1], packed.data() + offsets[i]);
    }
    bool same = golden.eot_index.size() == golden.texts.size() &&
                golden.input_ids.size() == golden.texts.size() * static_cast<std::size_t>(context_length);
    require_whole(same, "text.input_ids: expected one row of " + std::to_string(context_length) + " for each text");
    return golden;
}

} // namespace clip_export
