#include <clip_export/spec.hpp>

#include <algorithm>

#include "fields.hpp"
#include "spec_json.hpp"

namespace clip_export {
namespace {

std::string shown(double value) { return Json(value).dump(); }

TransformerSpec transformer(const Json &data, const std::string &where) {
    Fields fields(data, where, {"width", "layers", "heads", "mlp_width", "activation", "?layer_norm_eps"});
    TransformerSpec spec{fields.integer("width"), fields.integer("layers"), fields.integer("heads"),
                         fields.integer("mlp_width")};
    fields.choice("activation", {"quick_gelu", "gelu"});
    if (fields.has("layer_norm_eps")) fields.number("layer_norm_eps");
    require(std::min({spec.width, spec.layers, spec.heads, spec.mlp_width}) > 0, "transformer sizes must be positive");
    require(spec.width % spec.heads == 0, "width " + std::to_string(spec.width) + " is not a multiple of " +
                                              std::to_string(spec.heads) + " heads");
    return spec;
}

std::optional<int> embedding_dim(const Fields &fields) {
    if (fields.is_null("embedding_dim")) return std::nullopt;
    int dim = fields.small("embedding_dim");
    require(dim > 0 && dim < 1 << 24, fields.where("embedding_dim") + ": " + std::to_string(dim) + " is out of range");
    return dim;
}

TextSpec text(const Json &data, const std::string &where) {
    Fields fields(data, where, {"transformer", "vocab_size", "context_length", "embedding_dim", "?causal"});
    TextSpec spec;
    spec.transformer = transformer(fields.at("transformer"), fields.where("transformer"));
    spec.vocab_size = fields.integer("vocab_size");
    spec.context_length = fields.small("context_length");
    spec.embedding_dim = embedding_dim(fields);
    spec.causal = !fields.has("causal") || fields.flag("causal");
    require(spec.vocab_size > 0 && spec.context_length > 1, "vocab_size and context_length must be positive");
    return spec;
}

ImageSpec image(const Json &data, const std::string &where) {
    Fields fields(data, where, {"transformer", "image_size", "patch_size", "embedding_dim"});
    ImageSpec spec;
    spec.transformer = transformer(fields.at("transformer"), fields.where("transformer"));
    spec.image_size = fields.small("image_size");
    spec.patch_size = fields.small("patch_size");
    spec.embedding_dim = embedding_dim(fields);
    require(0 < spec.patch_size && spec.patch_size <= spec.image_size, "patch_size must be between 1 and image_size");
    return spec;
}

TokenizerSpec tokenizer(const Json &data, const std::string &where) {
    Fields fields(data, where, {"dialect", "context_length", "start_id", "end_id", "pad_id", "pooling", "truncate"});
    TokenizerSpec spec;
    spec.dialect = Dialect(fields.choice("dialect", {"openai", "open_clip", "huggingface"}));
    spec.context_length = fields.small("context_length");
    spec.start_id = fields.small("start_id");
    spec.end_id = fields.small("end_id");
    spec.pad_id = fields.small("pad_id");
    spec.pooling = Pooling(fields.choice("pooling", {"argmax", "first_end"}));
    spec.truncate = fields.flag("truncate");
    return spec;
}

std::array<double, 3> three(const Fields &fields, const char *key) {
    const Json &list = list_of(fields.at(key), fields.where(key));
    require(list.size() == 3, fields.where(key) + ": expected 3 values");
    return {number_of(list[0], fields.where(key) + "[0]"), number_of(list[1], fields.where(key) + "[1]"),
            number_of(list[2], fields.where(key) + "[2]")};
}

PreprocessSpec preprocess(const Json &data, const std::string &where) {
    Fields fields(data, where, {"dialect", "resize_mode", "resize_size", "crop_size", "interpolation", "mean", "std",
                                "?fill", "?transparency"});
    PreprocessSpec spec;
    spec.dialect = Dialect(fields.choice("dialect", {"openai", "open_clip", "huggingface"}));
    spec.resize_mode = ResizeMode(fields.choice("resize_mode", {"shortest", "longest", "squash"}));
    spec.resize_size = fields.small("resize_size");
    spec.crop_size = fields.small("crop_size");
    spec.interpolation =
        Interpolation(fields.choice("interpolation", {"nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"}));
    spec.mean = three(fields, "mean");
    spec.std = three(fields, "std");
    spec.fill = fields.has("fill") ? fields.small("fill") : 0;
    bool huggingface = spec.dialect == Dialect::huggingface;
    spec.transparency = huggingface ? Transparency::white : Transparency::drop;
    if (!fields.is_null("transparency")) {
        spec.transparency = Transparency(fields.choice("transparency", {"drop", "white"}));
    }
    require(huggingface || spec.transparency == Transparency::drop,
            std::string("the ") + name_of(spec.dialect) + " dialect drops transparency");
    require(spec.resize_mode != ResizeMode::longest || spec.dialect == Dialect::open_clip,
            "only open_clip resizes the long side");
    require(0 <= spec.fill && spec.fill <= 255, "fill must be between 0 and 255, found " + std::to_string(spec.fill));
    require(spec.resize_size > 0 && spec.crop_size > 0, "resize_size and crop_size must be positive");
    require(std::min({spec.std[0], spec.std[1], spec.std[2]}) > 0,
            "std must be positive, found (" + shown(spec.std[0]) + ", " + shown(spec.std[1]) + ", " + shown(spec.std[2]) + ")");
    return spec;
}

ContextSpec context(const Json &data, const std::string &where) {
    Fields fields(data, where, {"family", "?missing_blocks", "?second", "?zero_negative"});
    ContextSpec spec;
    const char *families[] = {"clip", "sd1", "sd2", "sdxl", "sdxl_refiner", "sd3"};
    spec.family = families[fields.choice("family", {"clip", "sd1", "sd2", "sdxl", "sdxl_refiner", "sd3"})];
    std::int64_t missing = fields.has("missing_blocks") ? fields.integer("missing_blocks") : 0;
    require(0 <= missing && missing < 8, "missing_blocks must be from 0 to 7, found " + std::to_string(missing));
    spec.second = fields.has("second") && fields.flag("second");
    if (fields.has("zero_negative")) fields.flag("zero_negative");
    return spec;
}

template <typename Read> auto unless_null(const Fields &fields, const char *key, Read read) {
    using Spec = decltype(read(fields.at(key), std::string()));
    return fields.is_null(key) ? std::optional<Spec>() : std::optional<Spec>(read(fields.at(key), fields.where(key)));
}

} // namespace

std::vector<Tower> ModelSpec::towers() const {
    std::vector<Tower> found;
    if (text) found.push_back(Tower::text);
    if (image) found.push_back(Tower::image);
    return found;
}

ModelSpec spec_from_json(const Json &data, const std::string &where) {
    Fields fields(data, where, {"text", "image", "tokenizer", "preprocess", "?logit_scale", "?logit_bias", "?context"});
    ModelSpec spec;
    spec.text = unless_null(fields, "text", text);
    spec.image = unless_null(fields, "image", image);
    spec.tokenizer = unless_null(fields, "tokenizer", tokenizer);
    spec.preprocess = unless_null(fields, "preprocess", preprocess);
    spec.logit_scale = unless_null(fields, "logit_scale", number_of);
    spec.logit_bias = unless_null(fields, "logit_bias", number_of);
    spec.context = unless_null(fields, "context", context);
    require(!spec.context || spec.text, "Context comes from a text tower, and there is none");
    require(!spec.context || spec.text->causal, "Context needs a causal tower");
    require(spec.text || spec.image, "a model needs a text or an image tower");
    require(!spec.logit_scale || (-50 < *spec.logit_scale && *spec.logit_scale < 50),
            "logit_scale is a logarithm, expected within 50, found " + shown(spec.logit_scale.value_or(0)));
    if (spec.text && spec.tokenizer) {
        require(spec.text->context_length == spec.tokenizer->context_length,
                "the text tower takes " + std::to_string(spec.text->context_length) + " tokens, the tokenizer gives " +
                    std::to_string(spec.tokenizer->context_length));
    }
    if (spec.image && spec.preprocess) {
        require(spec.image->image_size == spec.preprocess->crop_size,
                "the image tower takes " + std::to_string(spec.image->image_size) + " pixels a side, preprocessing gives " +
                    std::to_string(spec.preprocess->crop_size));
    }
    require(spec.text.has_value() == spec.tokenizer.has_value(), "a text tower and a tokenizer go together");
    require(spec.image.has_value() == spec.preprocess.has_value(), "an image tower and preprocessing go together");
    return spec;
}

} // namespace clip_export
