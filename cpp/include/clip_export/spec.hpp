// What a CLIP model means, apart from its weights: the part of clip_export/spec.py that a runtime needs.
#pragma once

#include <array>
#include <optional>
#include <string>
#include <vector>

namespace clip_export {

enum class Tower { text, image };
enum class Dialect { openai, open_clip, huggingface };
enum class Pooling { argmax, first_end };
enum class ResizeMode { shortest, longest, squash };
enum class Interpolation { nearest, box, bilinear, hamming, bicubic, lanczos };
enum class Transparency { drop, white };

// The name as it stands in a manifest.
const char *name_of(Tower tower);
const char *name_of(Dialect dialect);

struct TransformerSpec {
    long long width = 0, layers = 0, heads = 0, mlp_width = 0;
};

struct TextSpec {
    TransformerSpec transformer;
    long long vocab_size = 0;
    int context_length = 0;
    std::optional<int> embedding_dim;
    bool causal = true;
};

struct ImageSpec {
    TransformerSpec transformer;
    int image_size = 0, patch_size = 0;
    std::optional<int> embedding_dim;
};

// Whose tokenizer is matched. `pooling`: the end of text is the first highest id, or the first `end_id`.
// `truncate`: what the dialect does by default to a text that does not fit: cut it, or refuse it.
struct TokenizerSpec {
    Dialect dialect = Dialect::openai;
    int context_length = 77;
    int start_id = 49406, end_id = 49407, pad_id = 0;
    Pooling pooling = Pooling::argmax;
    bool truncate = false;
};

// Whose preprocessing is matched. `resize_size` is the short side, the long side or both, as `resize_mode` says;
// `crop_size` both sides of what the image tower takes, in pixels; `fill` the level that `longest` pads with.
struct PreprocessSpec {
    Dialect dialect = Dialect::openai;
    ResizeMode resize_mode = ResizeMode::shortest;
    int resize_size = 224, crop_size = 224;
    Interpolation interpolation = Interpolation::bicubic;
    std::array<double, 3> mean{}, std{};
    int fill = 0;
    Transparency transparency = Transparency::drop;
    int pillow = 13; // the major version of Pillow that is matched: 13 resizes tall images in another order than before
};

// Of which diffusion model the text tower is, in a bundle whose text graph gives Context: only Python runs those.
struct ContextSpec {
    std::string family; // clip, sd1, sd2, sdxl, sdxl_refiner, sd3
    bool second = false; // whether text_2/ holds another encoder
};

// A tower that the checkpoint does not have is absent, and what serves it is absent with it.
struct ModelSpec {
    std::optional<TextSpec> text;
    std::optional<ImageSpec> image;
    std::optional<TokenizerSpec> tokenizer;
    std::optional<PreprocessSpec> preprocess;
    std::optional<double> logit_scale, logit_bias;
    std::optional<ContextSpec> context;

    std::vector<Tower> towers() const; // text first
};

} // namespace clip_export
