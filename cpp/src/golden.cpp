#include "golden.hpp"

#include <algorithm>
#include <cstring>
#include <optional>
#include <set>

#include <clip_export/errors.hpp>

#include "files.hpp"
#include "json.hpp"
#include "sentences.hpp"

namespace clip_export {
namespace {

void require_whole(bool condition, const std::string &message, const char *hint = "build the bundle again") {
    if (!condition) throw BundleIntegrityError("golden.safetensors: " + message, hint);
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
            const Json &first = entry.at("data_offsets").at(0), &last = entry.at("data_offsets").at(1);
            fits = first.is_number_unsigned() && last.is_number_unsigned() && entry.at("dtype") == dtype;
            if (fits) from = first.get<std::uint64_t>(), to = last.get<std::uint64_t>();
        } catch (const nlohmann::json::exception &) {
            fits = false;
        }
        require_whole(fits && from <= to && to <= data_.size() && (to - from) % sizeof(T) == 0, name + ": expected " + dtype);
        std::vector<T> values((to - from) / sizeof(T));
        if (!values.empty()) std::memcpy(values.data(), data_.data() + from, to - from);
        return values;
    }

    // The size of one axis of a tensor that has `axes` of them and as many bytes as they say; none where it is not there.
    std::optional<std::uint64_t> axis(const std::string &name, const char *dtype, std::size_t axes, std::size_t which) const {
        if (!has(name)) return std::nullopt;
        std::uint64_t item = std::string_view(dtype) == "U8" ? 1 : 4, most = data_.size() / item, count = 1, found = 0;
        bool fits = false;
        try {
            const Json &entry = head_.at(name), &shape = entry.at("shape");
            const Json &first = entry.at("data_offsets").at(0), &last = entry.at("data_offsets").at(1);
            fits = shape.is_array() && shape.size() == axes && first.is_number_unsigned() && last.is_number_unsigned() &&
                   entry.at("dtype") == dtype;
            for (std::size_t i = 0; fits && i < axes; ++i) {
                fits = shape[i].is_number_unsigned() && shape[i] != 0 && shape[i].get<std::uint64_t>() <= most / count;
                if (fits) count *= shape[i].get<std::uint64_t>();
            }
            if (fits) found = shape[which].get<std::uint64_t>();
            fits = fits && last.get<std::uint64_t>() - first.get<std::uint64_t>() == count * item;
        } catch (const nlohmann::json::exception &) {
            fits = false;
        }
        require_whole(fits, name + ": expected " + dtype + " of " + std::to_string(axes) + " axes, and bytes for all of it");
        return found;
    }

    // What follows `prefix` in the names that begin with it.
    std::set<std::string> names(const std::string &prefix) const {
        std::set<std::string> found;
        for (const auto &[name, entry] : head_.items()) {
            if (name.rfind(prefix, 0) == 0) found.insert(name.substr(prefix.size()));
        }
        return found;
    }

  private:
    Json head_;
    std::string_view data_;
};

std::string shown(std::optional<std::uint64_t> size) { return size ? std::to_string(*size) : "None"; }

} // namespace

void check_golden_shapes(std::string_view bytes, const Manifest &manifest) {
    Tensors tensors(bytes);
    const ModelSpec &spec = manifest.spec;
    std::optional<std::uint64_t> length, crop;
    if (spec.tokenizer) length = spec.tokenizer->context_length;
    if (spec.preprocess) crop = spec.preprocess->crop_size;
    auto found_length = tensors.axis("text.input_ids", "I32", 2, 1), found_crop = tensors.axis("image.pixels", "U8", 4, 2);
    require_whole(length == found_length && crop == found_crop,
                  "expected context length and crop size (" + shown(length) + ", " + shown(crop) + "), found (" +
                      shown(found_length) + ", " + shown(found_crop) + ")",
                  rebuild_hint);
    for (const auto &[precision, graphs] : manifest.variants) {
        for (const auto &[tower, graph] : graphs) {
            std::set<std::string> held = tensors.names(std::string(name_of(tower)) + ".outputs.");
            require_whole(held == std::set<std::string>(graph.outputs.begin(), graph.outputs.end()),
                          std::string(name_of(tower)) + " outputs are " + joined({held.begin(), held.end()}) +
                              ", not those of the graph",
                          rebuild_hint);
        }
    }
}

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
