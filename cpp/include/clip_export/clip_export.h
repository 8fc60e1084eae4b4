/* The C ABI, for Rust, Go, C# and whoever else: link libclip_export_c.
 *
 *     clip_export_message message;
 *     clip_export_clip *clip = NULL;
 *     if (clip_export_open("engines/demo", NULL, &clip, &message)) { puts(message.text); return 1; }
 *
 * A function returns 0, or a code (CLIP_EXPORT_ERROR_...) and the sentence in `message`, which may be NULL. Nothing is
 * kept between calls but what a handle holds; a handle may be shared by threads. Strings are UTF-8.
 */
#ifndef CLIP_EXPORT_H
#define CLIP_EXPORT_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define CLIP_EXPORT_API __declspec(dllexport)
#else
#define CLIP_EXPORT_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum {
    CLIP_EXPORT_OK = 0,
    CLIP_EXPORT_ERROR_UNKNOWN = 1, /* nothing that is thrown on purpose: no memory, or a bug */
    CLIP_EXPORT_ERROR_BUNDLE = 10,
    CLIP_EXPORT_ERROR_BUNDLE_NOT_FOUND = 11,
    CLIP_EXPORT_ERROR_BUNDLE_SCHEMA = 12,
    CLIP_EXPORT_ERROR_BUNDLE_INTEGRITY = 13,
    CLIP_EXPORT_ERROR_INPUT = 20,
    CLIP_EXPORT_ERROR_TEXT = 21,
    CLIP_EXPORT_ERROR_IMAGE = 22,
    CLIP_EXPORT_ERROR_BACKEND = 30,
    CLIP_EXPORT_ERROR_NO_PLAN = 31,
    CLIP_EXPORT_ERROR_DEVICE = 32,
    CLIP_EXPORT_ERROR_MISSING_DEPENDENCY = 40,
    CLIP_EXPORT_ERROR_SPEC = 50
};

typedef struct clip_export_message {
    char text[2048]; /* ends in 0; what is longer is cut */
} clip_export_message;

typedef struct clip_export_clip clip_export_clip;
typedef struct clip_export_tokenizer clip_export_tokenizer;
typedef struct clip_export_preprocessor clip_export_preprocessor;

/* NULL and 0 are the defaults; see Options in clip.hpp. */
typedef struct clip_export_options {
    const char *backend, *device, *precision;
    int32_t skip_file_check, threads, batch_size, warn_of_mojibake, no_cuda_graphs, max_contexts, allow_host_code;
    void (*warn)(const char *message, void *context); /* by default: a line on stderr */
    void *context;
} clip_export_options;

/* Levels [height, width, channels], 1, 3 or 4 channels; `stride` in bytes, 0 where rows touch. */
typedef struct clip_export_image {
    const uint8_t *data;
    int64_t width, height;
    int32_t channels;
    int64_t stride;
} clip_export_image;

/* The values stand for those of a manifest, in the order of spec.hpp: dialect openai 0, open_clip 1, huggingface 2. */
typedef struct clip_export_tokenizer_spec {
    int32_t dialect, context_length, start_id, end_id, pad_id, pooling, truncate;
} clip_export_tokenizer_spec;

typedef struct clip_export_preprocess_spec {
    int32_t dialect, resize_mode, resize_size, crop_size, interpolation, fill, transparency;
    int32_t pillow; /* its major version, 0: 13 */
} clip_export_preprocess_spec;

/* The backends that are compiled in, as "onnxruntime,openvino". */
CLIP_EXPORT_API const char *clip_export_backends(void);
CLIP_EXPORT_API const char *clip_export_version(void);

/* Open a bundle; a handle is closed once, and NULL may be closed. */
CLIP_EXPORT_API int clip_export_open(const char *path, const clip_export_options *options, clip_export_clip **clip,
                                     clip_export_message *message);
CLIP_EXPORT_API void clip_export_close(clip_export_clip *clip);

/* The length of an embedding, 0 for a tower that is not there. */
CLIP_EXPORT_API int32_t clip_export_text_dim(const clip_export_clip *clip);
CLIP_EXPORT_API int32_t clip_export_image_dim(const clip_export_clip *clip);
CLIP_EXPORT_API int32_t clip_export_context_length(const clip_export_clip *clip);
CLIP_EXPORT_API int32_t clip_export_crop_size(const clip_export_clip *clip);
/* What runs it, as in "openvino, cpu"; lives as long as the handle. */
CLIP_EXPORT_API const char *clip_export_engine(const clip_export_clip *clip);

/* `lengths` are in bytes; NULL where every text ends in 0. `truncate`: 1 cut, 0 refuse, -1 as the dialect does.
 * `embeddings` has room for n * dim floats. */
CLIP_EXPORT_API int clip_export_encode_text(const clip_export_clip *clip, const char *const *texts, const size_t *lengths,
                                            size_t n, int normalize, int truncate, float *embeddings,
                                            clip_export_message *message);
CLIP_EXPORT_API int clip_export_encode_images(const clip_export_clip *clip, const clip_export_image *images, size_t n,
                                              int normalize, float *embeddings, clip_export_message *message);
CLIP_EXPORT_API int clip_export_encode_pixels(const clip_export_clip *clip, const uint8_t *pixels, size_t n, int normalize,
                                              float *embeddings, clip_export_message *message);
/* Device pointers and a cudaStream_t: Clip::encode_image_device. */
CLIP_EXPORT_API int clip_export_encode_image_device(const clip_export_clip *clip, const void *device_pixels, size_t n,
                                                    void *stream, int normalize, void *device_embeddings,
                                                    clip_export_message *message);

/* The two parts before the towers, alone: no engine is needed. `input_ids` has room for n * context_length, `eot_index`
 * for n, `pixels` for n * 3 * crop_size * crop_size. */
CLIP_EXPORT_API int clip_export_tokenizer_open(const clip_export_tokenizer_spec *spec, const char *tokenizer_json,
                                               size_t length, int warn_of_mojibake, clip_export_tokenizer **tokenizer,
                                               clip_export_message *message);
CLIP_EXPORT_API void clip_export_tokenizer_close(clip_export_tokenizer *tokenizer);
CLIP_EXPORT_API int clip_export_tokenize(const clip_export_tokenizer *tokenizer, const char *const *texts,
                                         const size_t *lengths, size_t n, int truncate, int32_t *input_ids,
                                         int32_t *eot_index, clip_export_message *message);
CLIP_EXPORT_API int clip_export_preprocessor_open(const clip_export_preprocess_spec *spec,
                                                  clip_export_preprocessor **preprocessor, clip_export_message *message);
CLIP_EXPORT_API void clip_export_preprocessor_close(clip_export_preprocessor *preprocessor);
CLIP_EXPORT_API int clip_export_preprocess(const clip_export_preprocessor *preprocessor, const clip_export_image *images,
                                           size_t n, uint8_t *pixels, clip_export_message *message);

#ifdef __cplusplus
}
#endif

#endif
