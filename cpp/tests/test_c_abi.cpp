// The C ABI never throws, whatever it is given.
#include "checks.hpp"

#include <cstring>

#include <clip_export/clip_export.h>

TEST(c_abi, null_pointers) {
    clip_export_message message;
    clip_export_clip *clip = nullptr;
    CHECK(clip_export_open(nullptr, nullptr, &clip, &message) == CLIP_EXPORT_ERROR_INPUT);
    CHECK(std::strstr(message.text, "expected a path, found a null pointer") != nullptr);
    CHECK(clip_export_open("x", nullptr, nullptr, &message) == CLIP_EXPORT_ERROR_INPUT);
    CHECK(clip_export_open("/nothing/here", nullptr, &clip, nullptr) == CLIP_EXPORT_ERROR_BUNDLE_NOT_FOUND);
    CHECK(clip == nullptr);
    clip_export_close(nullptr);
    clip_export_tokenizer_close(nullptr);
    clip_export_preprocessor_close(nullptr);
    CHECK(clip_export_text_dim(nullptr) == 0 && clip_export_image_dim(nullptr) == 0);
    CHECK(clip_export_context_length(nullptr) == 0 && clip_export_crop_size(nullptr) == 0);
    CHECK(std::strcmp(clip_export_engine(nullptr), "") == 0);
    float embedding[4];
    CHECK(clip_export_encode_text(nullptr, nullptr, nullptr, 1, 1, -1, embedding, &message) == CLIP_EXPORT_ERROR_INPUT);
    CHECK(clip_export_encode_images(nullptr, nullptr, 1, 1, embedding, &message) == CLIP_EXPORT_ERROR_INPUT);
    CHECK(clip_export_encode_pixels(nullptr, nullptr, 1, 1, embedding, &message) == CLIP_EXPORT_ERROR_INPUT);
    CHECK(clip_export_encode_image_device(nullptr, nullptr, 1, nullptr, 1, nullptr, &message) == CLIP_EXPORT_ERROR_INPUT);
    CHECK(clip_export_tokenizer_open(nullptr, "{}", 2, 0, nullptr, &message) == CLIP_EXPORT_ERROR_INPUT);
    CHECK(clip_export_preprocessor_open(nullptr, nullptr, &message) == CLIP_EXPORT_ERROR_INPUT);
    CHECK(clip_export_tokenize(nullptr, nullptr, nullptr, 1, 0, nullptr, nullptr, &message) == CLIP_EXPORT_ERROR_INPUT);
    CHECK(clip_export_preprocess(nullptr, nullptr, 1, nullptr, &message) == CLIP_EXPORT_ERROR_INPUT);
}

TEST(c_abi, preprocessing) {
    clip_export_message message;
    clip_export_preprocessor *preprocessor = nullptr;
    clip_export_preprocess_spec spec{};
    spec.resize_size = spec.crop_size = 4;
    spec.interpolation = 4;
    CHECK(clip_export_preprocessor_open(&spec, &preprocessor, &message) == CLIP_EXPORT_OK);
    unsigned char grey[9] = {1, 2, 3, 4, 5, 6, 7, 8, 9}, pixels[48];
    clip_export_image image{grey, 3, 3, 1, 0};
    CHECK(clip_export_preprocess(preprocessor, &image, 1, pixels, &message) == CLIP_EXPORT_OK);
    CHECK(std::memcmp(pixels, pixels + 16, 16) == 0 && pixels[0] < pixels[15]);
    image.channels = 2;
    CHECK(clip_export_preprocess(preprocessor, &image, 1, pixels, &message) == CLIP_EXPORT_ERROR_IMAGE);
    CHECK(clip_export_preprocess(preprocessor, nullptr, 1, pixels, &message) == CLIP_EXPORT_ERROR_INPUT);
    CHECK(clip_export_preprocess(preprocessor, nullptr, 0, nullptr, &message) == CLIP_EXPORT_OK);
    clip_export_preprocessor_close(preprocessor);
    spec.interpolation = 9;
    CHECK(clip_export_preprocessor_open(&spec, &preprocessor, &message) == CLIP_EXPORT_ERROR_SPEC);
}
