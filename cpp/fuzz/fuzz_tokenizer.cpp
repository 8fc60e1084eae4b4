// Texts of any bytes, in the dialects whose tokenizer.json lies in the folder CLIP_EXPORT_TOKENIZERS.
#include <cstdlib>
#include <fstream>
#include <iterator>

#include <clip_export/tokenizer.hpp>

using namespace clip_export;

static std::vector<Tokenizer> load() {
    const char *folder = std::getenv("CLIP_EXPORT_TOKENIZERS");
    if (!folder) std::abort();
    std::vector<Tokenizer> found;
    for (Dialect dialect : {Dialect::openai, Dialect::open_clip, Dialect::huggingface}) {
        std::ifstream file(std::string(folder) + "/" + name_of(dialect) + ".json");
        std::string json{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
        TokenizerSpec spec;
        spec.dialect = dialect;
        spec.truncate = true;
        TokenizerOptions options;
        options.mojibake = Mojibake::warn;
        options.warn = [](const std::string &) {};
        found.emplace_back(spec, json, options);
    }
    return found;
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t *data, std::size_t size) {
    static const std::vector<Tokenizer> tokenizers = load();
    std::string text(reinterpret_cast<const char *>(data), size);
    for (const Tokenizer &tokenizer : tokenizers) {
        try {
            Tokens tokens = tokenizer({text});
            if (tokens.input_ids.size() != 77 || tokens.input_ids[0] != 49406) std::abort();
        } catch (const Error &) { // no UTF-8, or a number of too many digits
        }
    }
    return 0;
}
