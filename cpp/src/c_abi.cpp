#include <clip_export/clip_export.h>

#include <algorithm>
#include <cstring>
#include <exception>
#include <new>

#include <clip_export/clip.hpp>

#include "sentences.hpp"

using namespace clip_export;

struct clip_export_clip {
    Clip clip;
};
struct clip_export_tokenizer {
    Tokenizer tokenizer;
};
struct clip_export_preprocessor {
    Preprocessor preprocessor;
};

namespace {

int failed(int code, const char *words, clip_export_message *message) {
    if (message) {
        std::size_t length = std::min(std::strlen(words), sizeof message->text - 1);
        while (length > 0 && length < std::strlen(words) && (words[length] & 0xC0) == 0x80) --length; // no half character
        std::memcpy(message->text, words, length);
        message->text[length] = '\0';
    }
    return code;
}

// Runs `work`; what it throws becomes a code and a sentence, since nothing may be thrown through C.
template <typename Work> int guarded(clip_export_message *message, Work work) {
    if (message) message->text[0] = '\0';
    try {
        work();
        return CLIP_EXPORT_OK;
    } catch (const Error &error) {
        return failed(static_cast<int>(error.code()), error.what(), message);
    } catch (const std::bad_alloc &) {
        return failed(CLIP_EXPORT_ERROR_UNKNOWN, "there is not enough memory for that", message);
    } catch (const std::exception &error) {
        return failed(CLIP_EXPORT_ERROR_UNKNOWN, error.what(), message);
    } catch (...) {
        return failed(CLIP_EXPORT_ERROR_UNKNOWN, "an exception of an unknown type", message);
    }
}

void require_pointer(const void *pointer, const char *name) {
    if (!pointer) throw InputError(std::string("expected ") + name + ", found a null pointer");
}

std::vector<std::string> texts_of(const char *const *texts, const size_t *lengths, size_t n) {
    if (n) require_pointer(texts, "texts");
    std::vector<std::string> found(n);
    for (size_t i = 0; i < n; ++i) {
        if (!texts[i]) throw TextError("text " + std::to_string(i) + " is a null pointer");
        found[i] = lengths ? std::string(texts[i], lengths[i]) : std::string(texts[i]);
    }
    return found;
}

std::vector<ImageView> images_of(const clip_export_image *images, size_t n) {
    if (n) require_pointer(images, "images");
    std::vector<ImageView> found;
    for (size_t i = 0; i < n; ++i) {
        found.push_back({images[i].data, images[i].width, images[i].height, images[i].channels, images[i].stride});
    }
    return found;
}

std::optional<bool> truncation(int truncate) {
    return truncate < 0 ? std::nullopt : std::optional<bool>(truncate != 0);
}

Options options_of(const clip_export_options *given) {
    Options options;
    if (!given) return options;
    if (given->backend) options.backend = given->backend;
    if (given->device) options.device = given->device;
    if (given->precision) options.precision = given->precision;
    options.check_files = !given->skip_file_check;
    options.threads = given->threads;
    options.batch_size = given->batch_size;
    options.mojibake = given->warn_of_mojibake ? Mojibake::warn : Mojibake::refuse;
    options.cuda_graphs = !given->no_cuda_graphs;
    if (given->max_contexts) options.max_contexts = given->max_contexts;
    options.allow_host_code = given->allow_host_code != 0;
    if (given->warn) {
        options.warn = [warn = given->warn, context = given->context](const std::string &message) {
            warn(message.c_str(), context);
        };
    }
    return options;
}

int enumerator(int value, int count, const char *name) {
    if (value < 0 || value >= count) {
        throw SpecError(std::string(name) + " cannot be " + std::to_string(value));
    }
    return value;
}

void copy_tokens(const Tokens &tokens, int32_t *input_ids, int32_t *eot_index) {
    std::copy(tokens.input_ids.begin(), tokens.input_ids.end(), input_ids);
    std::copy(tokens.eot_index.begin(), tokens.eot_index.end(), eot_index);
}

int32_t dim(const clip_export_clip *clip, Tower tower) {
    try {
        return clip && clip->clip.has(tower) ? clip->clip.embedding_dim(tower) : 0;
    } catch (const std::exception &) { // a tower without embeddings
        return 0;
    }
}

} // namespace

extern "C" {

const char *clip_export_backends(void) {
    static const std::string names = joined(backends(), ",");
    return names.c_str();
}

const char *clip_export_version(void) { return CLIP_EXPORT_VERSION; }

int clip_export_open(const char *path, const clip_export_options *options, clip_export_clip **clip, clip_export_message *message) {
    return guarded(message, [&] {
        require_pointer(path, "a path");
        require_pointer(clip, "room for a handle");
        *clip = nullptr;
        *clip = new clip_export_clip{Clip::open(path, options_of(options))};
    });
}

void clip_export_close(clip_export_clip *clip) { delete clip; }

int32_t clip_export_text_dim(const clip_export_clip *clip) { return dim(clip, Tower::text); }
int32_t clip_export_image_dim(const clip_export_clip *clip) { return dim(clip, Tower::image); }

int32_t clip_export_context_length(const clip_export_clip *clip) {
    return clip && clip->clip.spec().text ? clip->clip.spec().text->context_length : 0;
}

int32_t clip_export_crop_size(const clip_export_clip *clip) {
    return clip && clip->clip.spec().image ? clip->clip.spec().image->image_size : 0;
}

const char *clip_export_engine(const clip_export_clip *clip) { return clip ? clip->clip.engine().c_str() : ""; }

int clip_export_encode_text(const clip_export_clip *clip, const char *const *texts, const size_t *lengths, size_t n,
                            int normalize, int truncate, float *embeddings, clip_export_message *message) {
    return guarded(message, [&] {
        require_pointer(clip, "a clip");
        if (n) require_pointer(embeddings, "room for embeddings");
        std::vector<float> found = clip->clip.encode_text(texts_of(texts, lengths, n), normalize != 0, truncation(truncate));
        std::copy(found.begin(), found.end(), embeddings);
    });
}

int clip_export_encode_images(const clip_export_clip *clip, const clip_export_image *images, size_t n, int normalize,
                              float *embeddings, clip_export_message *message) {
    return guarded(message, [&] {
        require_pointer(clip, "a clip");
        if (n) require_pointer(embeddings, "room for embeddings");
        std::vector<float> found = clip->clip.encode_images(images_of(images, n), normalize != 0);
        std::copy(found.begin(), found.end(), embeddings);
    });
}

int clip_export_encode_pixels(const clip_export_clip *clip, const uint8_t *pixels, size_t n, int normalize, float *embeddings,
                              clip_export_message *message) {
    return guarded(message, [&] {
        require_pointer(clip, "a clip");
        if (n) require_pointer(embeddings, "room for embeddings");
        std::vector<float> found = clip->clip.encode_pixels(pixels, n, normalize != 0);
        std::copy(found.begin(), found.end(), embeddings);
    });
}

int clip_export_encode_image_device(const clip_export_clip *clip, const void *device_pixels, size_t n, void *stream,
                                    int normalize, void *device_embeddings, clip_export_message *message) {
    return guarded(message, [&] {
        require_pointer(clip, "a clip");
        clip->clip.encode_image_device(device_pixels, n, stream, device_embeddings, normalize != 0);
    });
}

int clip_export_tokenizer_open(const clip_export_tokenizer_spec *spec, const char *tokenizer_json, size_t length,
                               int warn_of_mojibake, clip_export_tokenizer **tokenizer, clip_export_message *message) {
    return guarded(message, [&] {
        require_pointer(spec, "a spec");
        require_pointer(tokenizer_json, "a tokenizer JSON");
        require_pointer(tokenizer, "room for a handle");
        *tokenizer = nullptr;
        TokenizerSpec its_spec{Dialect(enumerator(spec->dialect, 3, "dialect")),
                               spec->context_length,
                               spec->start_id,
                               spec->end_id,
                               spec->pad_id,
                               Pooling(enumerator(spec->pooling, 2, "pooling")),
                               spec->truncate != 0};
        TokenizerOptions options;
        options.mojibake = warn_of_mojibake ? Mojibake::warn : Mojibake::refuse;
        *tokenizer = new clip_export_tokenizer{Tokenizer(its_spec, {tokenizer_json, length}, options)};
    });
}

void clip_export_tokenizer_close(clip_export_tokenizer *tokenizer) { delete tokenizer; }

int clip_export_tokenize(const clip_export_tokenizer *tokenizer, const char *const *texts, const size_t *lengths, size_t n,
                         int truncate, int32_t *input_ids, int32_t *eot_index, clip_export_message *message) {
    return guarded(message, [&] {
        require_pointer(tokenizer, "a tokenizer");
        if (n) require_pointer(input_ids, "room for ids");
        if (n) require_pointer(eot_index, "room for positions");
        copy_tokens(tokenizer->tokenizer(texts_of(texts, lengths, n), truncation(truncate)), input_ids, eot_index);
    });
}

int clip_export_preprocessor_open(const clip_export_preprocess_spec *spec, clip_export_preprocessor **preprocessor,
                                  clip_export_message *message) {
    return guarded(message, [&] {
        require_pointer(spec, "a spec");
        require_pointer(preprocessor, "room for a handle");
        *preprocessor = nullptr;
        PreprocessSpec its_spec;
        its_spec.dialect = Dialect(enumerator(spec->dialect, 3, "dialect"));
        its_spec.resize_mode = ResizeMode(enumerator(spec->resize_mode, 3, "resize_mode"));
        its_spec.resize_size = spec->resize_size;
        its_spec.crop_size = spec->crop_size;
        its_spec.interpolation = Interpolation(enumerator(spec->interpolation, 6, "interpolation"));
        its_spec.fill = enumerator(spec->fill, 256, "fill");
        its_spec.transparency = Transparency(enumerator(spec->transparency, 2, "transparency"));
        if (spec->pillow) its_spec.pillow = spec->pillow;
        if (spec->resize_size < 1 || spec->crop_size < 1) throw SpecError("resize_size and crop_size must be positive");
        *preprocessor = new clip_export_preprocessor{Preprocessor(its_spec)};
    });
}

void clip_export_preprocessor_close(clip_export_preprocessor *preprocessor) { delete preprocessor; }

int clip_export_preprocess(const clip_export_preprocessor *preprocessor, const clip_export_image *images, size_t n,
                           uint8_t *pixels, clip_export_message *message) {
    return guarded(message, [&] {
        require_pointer(preprocessor, "a preprocessor");
        if (n) require_pointer(pixels, "room for pixels");
        std::vector<ImageView> views = images_of(images, n);
        for (size_t i = 0; i < n; ++i) preprocessor->preprocessor(views[i], pixels + i * preprocessor->preprocessor.size());
    });
}

} // extern "C"
