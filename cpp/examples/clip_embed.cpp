// Embeddings of texts and image files, one JSON object a line:
//
//     clip_embed BUNDLE [--backend NAME] [--device NAME] [--text TEXT]... [--image FILE]...
#include <cstdio>
#include <cstring>
#include <exception>

#include <clip_export/clip.hpp>

#include "decode.hpp"

namespace {

constexpr const char *usage = "usage: clip_embed BUNDLE [--backend NAME] [--device NAME] [--text TEXT]... [--image FILE]...\n";

std::string quoted(const std::string &text) {
    std::string out = "\"";
    for (unsigned char c : text) {
        char escaped[8];
        std::snprintf(escaped, sizeof escaped, c < ' ' || c == '"' || c == '\\' ? "\\u%04x" : "%c", c);
        out += escaped;
    }
    return out + "\"";
}

void print(const char *kind, const std::vector<std::string> &names, const std::vector<float> &embeddings) {
    std::size_t dim = names.empty() ? 0 : embeddings.size() / names.size();
    for (std::size_t i = 0; i < names.size(); ++i) {
        std::printf("{\"%s\": %s, \"embedding\": [", kind, quoted(names[i]).c_str());
        for (std::size_t d = 0; d < dim; ++d) std::printf("%s%.9g", d ? ", " : "", embeddings[i * dim + d]);
        std::printf("]}\n");
    }
}

} // namespace

int main(int count, char **arguments) {
    clip_export::Options options;
    std::vector<std::string> texts, files;
    if (count == 2 && (!std::strcmp(arguments[1], "--help") || !std::strcmp(arguments[1], "-h"))) {
        return std::fputs(usage, stdout), 0;
    }
    if (count < 2 || count % 2 != 0 || arguments[1][0] == '-') return std::fputs(usage, stderr), 2;
    for (int i = 2; i < count; i += 2) {
        std::string name = arguments[i], value = arguments[i + 1];
        if (name == "--text") {
            texts.push_back(value);
        } else if (name == "--image") {
            files.push_back(value);
        } else if (name == "--backend") {
            options.backend = value;
        } else if (name == "--device") {
            options.device = value;
        } else {
            return std::fputs(usage, stderr), 2;
        }
    }
    try {
        auto clip = clip_export::Clip::open(arguments[1], options);
        std::fprintf(stderr, "%s\n", clip.engine().c_str());
        if (!texts.empty()) print("text", texts, clip.encode_text(texts));
        std::vector<Decoded> images;
        std::vector<clip_export::ImageView> views;
        for (const std::string &file : files) images.push_back(decode(file));
        for (const Decoded &image : images) views.push_back(image.view());
        if (!files.empty()) print("image", files, clip.encode_images(views));
    } catch (const clip_export::Error &error) {
        std::fprintf(stderr, "error: %s\n", error.message().c_str());
        if (!error.hint().empty()) std::fprintf(stderr, "\nhint: %s\n", error.hint().c_str());
        return 1;
    } catch (const std::exception &error) { // memory, or a file system that fails
        std::fprintf(stderr, "error: %s\n", error.what());
        return 1;
    }
    return 0;
}
