#include "tokenizer_json.hpp"

#include <unordered_map>
#include <utility>

#include <clip_export/errors.hpp>

#include "json.hpp"
#include "unicode.hpp"

namespace clip_export {
namespace {

constexpr const char *huggingface_words =
    R"(<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+)";

SpecError unreadable(const std::string &why) {
    return SpecError("the tokenizer JSON cannot be read: " + why, "build the bundle again, or upgrade clip_export");
}

const Json &member(const Json &object, const char *key) {
    auto found = object.find(key);
    if (found == object.end()) throw unreadable(std::string("it has no ") + key);
    return *found;
}

// That an optional setting is absent, null, false or empty: anything else is none of CLIP's.
void require_unset(const Json &object, const char *key) {
    auto found = object.find(key);
    if (found == object.end() || found->is_null() || *found == false || *found == "") return;
    throw unreadable(std::string("expected no ") + key + ", found " + found->dump().substr(0, 40));
}

// JSON has numbers of any size and with fractions: an id is none of those.
std::int32_t id_of(const Json &value) {
    bool fits = value.is_number_unsigned() && value.get<std::uint64_t>() <= INT32_MAX;
    if (!fits) throw unreadable("expected an id from 0 to 2147483647, found " + value.dump(-1, ' ', true).substr(0, 40));
    return value.get<std::int32_t>();
}

std::optional<std::int32_t> unknown_id(const Json &model, const std::unordered_map<std::string, std::int32_t> &vocabulary) {
    auto found = model.find("unk_token");
    if (found == model.end() || found->is_null()) return std::nullopt;
    auto id = vocabulary.find(found->get<std::string>());
    if (id == vocabulary.end()) throw unreadable("its unknown token is not in its vocabulary");
    return id->second;
}

std::vector<std::pair<std::string, std::string>> merges_of(const Json &model) {
    std::vector<std::pair<std::string, std::string>> merges;
    for (const Json &merge : member(model, "merges")) {
        if (merge.is_array() && merge.size() == 2) {
            merges.emplace_back(merge[0].get<std::string>(), merge[1].get<std::string>());
            continue;
        }
        const auto &text = merge.get_ref<const std::string &>();
        std::size_t space = text.find(' ');
        if (space == std::string::npos || text.find(' ', space + 1) != std::string::npos) throw unreadable("a merge is no pair");
        merges.emplace_back(text.substr(0, space), text.substr(space + 1));
    }
    return merges;
}

Bpe bpe_of(const Json &model) {
    if (member(model, "type") != "BPE") throw unreadable("expected a BPE model, found " + model["type"].dump());
    for (const char *key : {"dropout", "continuing_subword_prefix", "fuse_unk", "byte_fallback", "ignore_merges"}) {
        require_unset(model, key);
    }
    std::unordered_map<std::string, std::int32_t> vocabulary;
    const Json &symbols = member(model, "vocab");
    vocabulary.reserve(symbols.size());
    for (const auto &[symbol, id] : symbols.items()) vocabulary.emplace(symbol, id_of(id));
    std::optional<std::int32_t> unknown = unknown_id(model, vocabulary);
    const Json &suffix = member(model, "end_of_word_suffix");
    return Bpe(std::move(vocabulary), merges_of(model), suffix.is_null() ? "" : suffix.get<std::string>(), unknown);
}

// That the pieces before the model are those that Hugging Face's CLIPTokenizer has.
void require_clip_pipeline(const Json &tree) {
    static const Json normalizer = Json::parse(
        R"({"type": "Sequence", "normalizers": [{"type": "NFC"},
            {"type": "Replace", "pattern": {"Regex": "\\s+"}, "content": " "}, {"type": "Lowercase"}]})");
    if (nlohmann::json(member(tree, "normalizer")) != nlohmann::json(normalizer)) {
        throw unreadable("its normalization is not that of CLIPTokenizer, and only Python's tokenizer has others");
    }
    const Json &stages = member(member(tree, "pre_tokenizer"), "pretokenizers");
    bool split = stages.size() == 2 && stages[0].value("type", "") == "Split" &&
                 stages[0].value("behavior", "") == "Removed" && stages[0].value("invert", false) &&
                 member(stages[0], "pattern").value("Regex", "") == huggingface_words;
    bool bytes = split && stages[1].value("type", "") == "ByteLevel" && !stages[1].value("add_prefix_space", true) &&
                 stages[1].value("use_regex", true);
    if (!bytes) throw unreadable("its word pattern is not that of CLIPTokenizer, and only Python's tokenizer has others");
}

std::vector<AddedToken> added_of(const Json &tree) {
    std::vector<AddedToken> added;
    for (const Json &token : member(tree, "added_tokens")) {
        for (const char *key : {"single_word", "lstrip", "rstrip"}) require_unset(token, key);
        bool normalized = token.value("normalized", true);
        std::u32string content = unicode::decode(member(token, "content").get<std::string>()).text;
        if (normalized) {
            content = unicode::library_nfc(content);
            std::u32string spaced; // white space is the one other thing that normalization changes
            for (char32_t c : content) {
                if (!unicode::is_library_space(c)) {
                    spaced += c;
                } else if (spaced.empty() || spaced.back() != U' ') {
                    spaced += U' ';
                }
            }
            content = unicode::library_lower(spaced);
        }
        if (!content.empty()) added.push_back({content, id_of(member(token, "id")), normalized});
    }
    std::stable_sort(added.begin(), added.end(),
                     [](const AddedToken &a, const AddedToken &b) { return a.content.size() > b.content.size(); });
    return added;
}

// The ids that the post-processor puts around a text that is empty.
std::vector<std::int32_t> frame_of(const Json &tree) {
    const Json &post = member(tree, "post_processor");
    if (post.is_null()) return {};
    std::string type = member(post, "type").get<std::string>();
    if (type == "RobertaProcessing" || type == "BertProcessing") {
        return {id_of(member(post, "cls").at(1)), id_of(member(post, "sep").at(1))};
    }
    if (type != "TemplateProcessing") throw unreadable("it has a post-processor " + type.substr(0, 40));
    std::vector<std::int32_t> ids;
    for (const Json &piece : member(post, "single")) {
        auto special = piece.find("SpecialToken");
        if (special == piece.end()) continue;
        const Json &token = member(post, "special_tokens").at(member(*special, "id").get<std::string>());
        for (const Json &id : member(token, "ids")) ids.push_back(id_of(id));
    }
    return ids;
}

bool all_in_angle_brackets(const Json &tree) {
    for (const Json &token : tree.value("added_tokens", Json::array())) {
        if (member(token, "content").get<std::string>().find('<') == std::string::npos) return false;
    }
    return true;
}

TokenizerFile read(const Json &tree, Dialect dialect) {
    TokenizerFile file{bpe_of(member(tree, "model")), {}, {}, {}, all_in_angle_brackets(tree)};
    if (dialect == Dialect::huggingface) {
        require_clip_pipeline(tree);
        file.added = added_of(tree);
        file.frame = frame_of(tree);
        return file;
    }
    if (!member(tree, "added_tokens").empty()) throw unreadable("expected no added tokens in this dialect");
    const Json &stages = member(member(tree, "pre_tokenizer"), "pretokenizers");
    const Json &pattern = member(member(stages.at(0), "pattern"), "Regex");
    file.classes = WordClasses::parse(pattern.get<std::string>(), dialect);
    return file;
}

} // namespace

TokenizerFile read_tokenizer_json(std::string_view json, Dialect dialect) {
    try {
        Json tree = parse_json(json, false);
        if (!tree.is_object()) throw unreadable("expected an object");
        return read(tree, dialect);
    } catch (const JsonError &error) {
        throw unreadable(error.what());
    } catch (const nlohmann::json::exception &) {
        throw unreadable("a value in it is of another type than in a tokenizer of CLIP, or missing");
    }
}

} // namespace clip_export
