// Image files -> levels, as Pillow decodes them: JPEG by libjpeg-turbo, PNG by libpng.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include <clip_export/preprocess.hpp>

struct Decoded {
    std::vector<std::uint8_t> levels;
    int width = 0, height = 0, channels = 0;

    clip_export::ImageView view() const { return {levels.data(), width, height, channels, 0}; }
};

// Throws clip_export::ImageError: for what cannot be read, and for what Pillow would not resize as plain levels (palettes,
// 16 bits), which is never passed off as something else.
Decoded decode(const std::string &path);
