#include <clip_export/preprocess.hpp>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "resample.hpp"

namespace clip_export {
namespace {

constexpr const char *bomb_hint = "scale it down first";

std::string sides(std::int64_t width, std::int64_t height) {
    return std::to_string(width) + " x " + std::to_string(height);
}

// What an error calls an image: as Python calls the array that it is.
std::string describe(const ImageView &image) {
    std::string shape = std::to_string(image.height) + ", " + std::to_string(image.width);
    return "a uint8 array [" + shape + (image.channels == 1 ? "]" : ", " + std::to_string(image.channels) + "]");
}

void check(const ImageView &image) {
    if (image.channels != 1 && image.channels != 3 && image.channels != 4) {
        throw ImageError("expected [height, width], [height, width, 3] or [height, width, 4], found " + describe(image),
                         "pass one array for each image");
    }
    if (image.width < 1 || image.height < 1) throw ImageError(describe(image) + " has 0 pixels");
    if (image.width > INT32_MAX / 4 || image.height > INT32_MAX / 4 || image.width * image.height > INT64_MAX / 16) {
        throw ImageError(describe(image) + " has more pixels than any image", bomb_hint);
    }
    if (!image.data) throw ImageError("expected pixels, found a null pointer");
    if (image.stride != 0 && image.stride < image.width * image.channels) {
        throw ImageError("expected a stride of at least " + std::to_string(image.width * image.channels) +
                         " bytes, found " + std::to_string(image.stride));
    }
}

std::uint8_t times(int a, int b) { // a * b / 255, rounded as Pillow's MULDIV255
    int product = a * b + 128;
    return static_cast<std::uint8_t>((product / 256 + product) / 256);
}

void premultiply(std::uint8_t *pixel) {
    for (int band = 0; band < 3; ++band) pixel[band] = times(pixel[band], pixel[3]);
}

void unpremultiply(std::uint8_t *pixel) {
    int alpha = pixel[3];
    if (alpha == 0 || alpha == 255) return;
    for (int band = 0; band < 3; ++band) pixel[band] = static_cast<std::uint8_t>(std::min(255 * pixel[band] / alpha, 255));
}

// Blend onto white, in the fixed point of Pillow's alpha_composite.
void blend_onto_white(std::uint8_t *pixel) {
    constexpr std::uint32_t bits = 7, white = 255;
    std::uint32_t alpha = pixel[3];
    if (alpha == 0) {
        pixel[0] = pixel[1] = pixel[2] = white;
        return;
    }
    std::uint32_t out_alpha = alpha * 255 + white * (255 - alpha);
    std::uint32_t source = alpha * 255 * 255 * (1u << bits) / out_alpha, below = 255 * (1u << bits) - source;
    for (int band = 0; band < 3; ++band) {
        std::uint32_t sum = pixel[band] * source + white * below + (0x80u << bits);
        pixel[band] = static_cast<std::uint8_t>(((sum >> 8) + sum) >> 8 >> bits);
    }
}

// The image with four levels a pixel, its alpha as the spec wants it: blended onto white, or kept for the resize.
Picture read(const ImageView &image, bool onto_white) {
    Picture picture(static_cast<int>(image.width), static_cast<int>(image.height));
    std::int64_t stride = image.stride ? image.stride : image.width * image.channels;
    for (int y = 0; y < picture.height; ++y) {
        const std::uint8_t *from = image.data + stride * y;
        std::uint8_t *to = picture.row(y);
        for (int x = 0; x < picture.width; ++x, from += image.channels, to += 4) {
            to[0] = from[0];
            to[1] = image.channels == 1 ? from[0] : from[1];
            to[2] = image.channels == 1 ? from[0] : from[2];
            to[3] = image.channels == 4 ? from[3] : 255;
            if (onto_white && image.channels == 4) blend_onto_white(to);
        }
    }
    return picture;
}

struct Size {
    std::int64_t width, height;
};

// After resizing: torchvision's rule for `shortest`, open_clip's for `longest`, both in doubles. nearbyint rounds halves
// to even, as Python's round.
Size resized_size(std::int64_t width, std::int64_t height, const PreprocessSpec &spec) {
    std::int64_t target = spec.resize_size;
    if (spec.resize_mode == ResizeMode::squash) return {target, target};
    if (spec.resize_mode == ResizeMode::longest) {
        double ratio = std::max(static_cast<double>(height) / target, static_cast<double>(width) / target);
        return {std::llrint(std::nearbyint(width / ratio)), std::llrint(std::nearbyint(height / ratio))};
    }
    std::int64_t longer = std::max(width, height), shorter = std::min(width, height);
    auto side = static_cast<std::int64_t>(static_cast<double>(target * longer) / static_cast<double>(shorter));
    return width <= height ? Size{target, side} : Size{side, target};
}

void check_resized(const ImageView &image, const Size &size, const PreprocessSpec &spec) {
    std::string shape = describe(image) + ": " + sides(image.width, image.height) + " pixels become " +
                        sides(size.width, size.height);
    std::string by = " when resized to " + std::to_string(spec.resize_size);
    if (std::min(size.width, size.height) < 1) throw ImageError(shape + by, "crop it to a shape that is less extreme");
    bool larger = size.width > INT32_MAX / 4 || size.height > INT32_MAX / 4 ||
                  size.width * size.height > std::max(max_image_pixels, image.width * image.height);
    if (larger) {
        throw ImageError(shape + by + ", over Pillow's limit of " + std::to_string(max_image_pixels), bomb_hint);
    }
}

std::int64_t floor_half(std::int64_t number) { return number >= 0 ? number / 2 : -((1 - number) / 2); }

// Where the crop begins, negative where it begins with padding.
std::int64_t crop_start(std::int64_t side, std::int64_t crop, Dialect dialect) {
    if (dialect == Dialect::huggingface) return floor_half(side - crop);
    if (side < crop) return -((crop - side) / 2);
    return std::llrint(std::nearbyint((side - crop) / 2.0));
}

} // namespace

void check_image_size(const std::string &name, std::int64_t width, std::int64_t height) {
    if (width < 1 || height < 1) throw ImageError(name + " has 0 pixels (" + sides(width, height) + ")");
    if (width > max_image_pixels / height) {
        std::string product = width > INT64_MAX / height ? "too many" : std::to_string(width * height);
        throw ImageError(name + ": " + sides(width, height) + " = " + product + " pixels, over Pillow's limit of " +
                             std::to_string(max_image_pixels),
                         bomb_hint);
    }
}

std::vector<std::uint8_t> Preprocessor::operator()(const ImageView &image) const {
    std::vector<std::uint8_t> pixels(size());
    (*this)(image, pixels.data());
    return pixels;
}

void Preprocessor::operator()(const ImageView &image, std::uint8_t *pixels) const {
    check(image);
    check_image_size("the crop of " + std::to_string(spec_.crop_size), spec_.crop_size, spec_.crop_size);
    bool onto_white = spec_.transparency == Transparency::white;
    Size size = resized_size(image.width, image.height, spec_);
    bool resizes = size.width != image.width || size.height != image.height;
    if (resizes) check_resized(image, size, spec_);
    Picture picture = read(image, onto_white);

    int crop = spec_.crop_size;
    auto left = static_cast<int>(crop_start(size.width, crop, spec_.dialect));
    auto top = static_cast<int>(crop_start(size.height, crop, spec_.dialect));
    Box kept{std::max(left, 0), std::max(top, 0), 0, 0};
    kept.width = static_cast<int>(std::min<std::int64_t>(size.width - kept.left, crop - std::max(-left, 0)));
    kept.height = static_cast<int>(std::min<std::int64_t>(size.height - kept.top, crop - std::max(-top, 0)));

    // Colours that nobody sees must not bleed into their neighbours: Pillow resizes them multiplied by their alpha. The
    // nearest pixel is no mixture, so it is taken as it is; and huggingface has no alpha left by then.
    bool by_alpha = resizes && image.channels == 4 && spec_.dialect != Dialect::huggingface &&
                    spec_.interpolation != Interpolation::nearest;
    if (by_alpha) {
        for (std::size_t at = 0; at < picture.levels.size(); at += 4) premultiply(picture.levels.data() + at);
    }
    picture = resized(picture, static_cast<int>(size.width), static_cast<int>(size.height), spec_.interpolation, kept,
                      spec_.pillow);
    if (by_alpha) {
        for (std::size_t at = 0; at < picture.levels.size(); at += 4) unpremultiply(picture.levels.data() + at);
    }

    std::size_t plane = std::size_t(crop) * crop;
    std::memset(pixels, spec_.resize_mode == ResizeMode::longest ? spec_.fill : 0, 3 * plane);
    int before_x = std::max(-left, 0), before_y = std::max(-top, 0);
    for (int y = 0; y < kept.height; ++y) {
        const std::uint8_t *from = picture.row(y);
        std::uint8_t *to = pixels + std::size_t(y + before_y) * crop + before_x;
        for (int x = 0; x < kept.width; ++x, ++to) {
            for (int band = 0; band < 3; ++band) to[band * plane] = from[4 * x + band];
        }
    }
}

} // namespace clip_export
