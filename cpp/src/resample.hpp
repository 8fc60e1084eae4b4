// Pillow's Image.resize, to the last bit, for what the crop keeps.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include <clip_export/spec.hpp>

namespace clip_export {

// Four levels a pixel: RGB and alpha, or RGB and nothing.
struct Picture {
    int width = 0, height = 0;
    std::vector<std::uint8_t> levels; // [height, width, 4]

    Picture() = default;
    Picture(int its_width, int its_height)
        : width(its_width), height(its_height), levels(std::size_t{4} * its_width * its_height) {}
    std::uint8_t *row(int y) { return levels.data() + std::size_t{4} * width * y; }
    const std::uint8_t *row(int y) const { return levels.data() + std::size_t{4} * width * y; }
};

struct Box {
    int left, top, width, height;
};

// The part `kept` of `picture` as it is when it is resized to `width` x `height`; all of `kept` is inside. Where a side
// keeps its size, nothing is computed along it, as in Pillow. `pillow` is its major version.
Picture resized(const Picture &picture, int width, int height, Interpolation interpolation, const Box &kept, int pillow);

} // namespace clip_export
