// Images -> uint8 pixels, equal to the last bit to Python's clip_export.preprocess, that is to Pillow.
//
//     clip_export::Preprocessor preprocess(spec);
//     std::vector<std::uint8_t> pixels = preprocess({rgb, width, height, 3});   // [3 * crop_size * crop_size]
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include <clip_export/errors.hpp>
#include <clip_export/spec.hpp>

namespace clip_export {

// Decoded levels, row by row: [height, width, channels], 1 channel for greyscale, 3 for RGB, 4 for RGBA. `stride` is the
// distance of two rows in bytes, 0 where they touch. Not owned.
struct ImageView {
    const std::uint8_t *data = nullptr;
    std::int64_t width = 0, height = 0;
    int channels = 3;
    std::int64_t stride = 0;
};

// More pixels than this are no picture but an attack, or a mistake: Pillow's Image.MAX_IMAGE_PIXELS.
constexpr std::int64_t max_image_pixels = 89478485;

// For decoders, before they allocate. Throws ImageError, naming `name`, for an image of no pixels or of too many.
void check_image_size(const std::string &name, std::int64_t width, std::int64_t height);

// What the original does to an image between opening and normalizing it. May be shared by threads.
class Preprocessor {
  public:
    explicit Preprocessor(const PreprocessSpec &spec) : spec_(spec) {}

    // Pixels before normalization, [3, crop_size, crop_size], RGB. Throws ImageError.
    std::vector<std::uint8_t> operator()(const ImageView &image) const;
    // The same into memory of `size()` bytes.
    void operator()(const ImageView &image, std::uint8_t *pixels) const;

    std::size_t size() const { return std::size_t{3} * spec_.crop_size * spec_.crop_size; }
    const PreprocessSpec &spec() const { return spec_; }

  private:
    PreprocessSpec spec_;
};

} // namespace clip_export
