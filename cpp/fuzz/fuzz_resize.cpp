// Images of any size and kind, resized and cropped in any way.
#include <cstring>

#include <clip_export/preprocess.hpp>

using namespace clip_export;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t *data, std::size_t size) {
    std::uint8_t head[12] = {};
    if (size < sizeof head) return 0;
    std::memcpy(head, data, sizeof head);
    PreprocessSpec spec;
    spec.dialect = Dialect(head[0] % 3);
    spec.resize_mode = ResizeMode(head[1] % 3);
    spec.interpolation = Interpolation(head[2] % 6);
    spec.transparency = Transparency(head[3] % 2);
    spec.pillow = 12 + head[4] % 2;
    spec.resize_size = head[5] + 1;
    spec.crop_size = head[6] + 1;
    ImageView image{data + sizeof head, head[7] | (head[8] & 7) << 8, 1, head[9] % 5, head[10] % 3 ? 0 : head[11]};
    std::int64_t row = image.stride ? image.stride : image.width * std::max(image.channels, 1);
    image.height = row ? static_cast<std::int64_t>(size - sizeof head) / row : 0; // as many rows as there are bytes for
    if (image.stride && image.stride < image.width * image.channels) image.height = std::min<std::int64_t>(image.height, 1);
    try {
        Preprocessor{spec}(image);
    } catch (const Error &) { // what they are for
    }
    return 0;
}
