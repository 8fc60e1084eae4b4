#include "decode.hpp"

#include <cctype>
#include <csetjmp>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>

#ifdef CLIP_EMBED_JPEG
#include <jpeglib.h>
#endif
#ifdef CLIP_EMBED_PNG
#include <png.h>
#endif

using clip_export::ImageError;

namespace {

constexpr const char *damaged = "the file is damaged, cut short or not an image: fetch or export it again";

ImageError cannot_be_decoded(const std::string &name, const std::string &why) {
    return ImageError(name + " cannot be decoded: " + why, damaged);
}

void make_room(Decoded &image, const std::string &name, std::int64_t width, std::int64_t height, int channels) {
    clip_export::check_image_size(name, width, height);
    image.width = static_cast<int>(width);
    image.height = static_cast<int>(height);
    image.channels = channels;
    image.levels.resize(static_cast<std::size_t>(width) * height * channels);
}

#ifdef CLIP_EMBED_JPEG

struct JpegErrors {
    jpeg_error_mgr manager; // first: libjpeg hands out its address
    std::jmp_buf back;
    char words[JMSG_LENGTH_MAX];
};

void jpeg_failed(j_common_ptr jpeg) {
    auto *errors = reinterpret_cast<JpegErrors *>(jpeg->err);
    errors->manager.format_message(jpeg, errors->words);
    std::longjmp(errors->back, 1);
}

// A warning (a file that is cut short, for one) gives half-grey images elsewhere; here it is an error, as in Python.
void jpeg_warned(j_common_ptr jpeg, int level) {
    if (level < 0) jpeg_failed(jpeg);
}

// Nothing with a destructor may be made between setjmp and longjmp: this decodes into what it is given.
bool decode_jpeg_into(jpeg_decompress_struct &jpeg, JpegErrors &errors, const std::string &bytes, const std::string &name,
                      Decoded &image, std::string &refused) {
    if (setjmp(errors.back)) return false;
    jpeg_create_decompress(&jpeg);
    jpeg_mem_src(&jpeg, reinterpret_cast<const unsigned char *>(bytes.data()), bytes.size());
    jpeg_read_header(&jpeg, TRUE);
    if (jpeg.num_components != 1 && jpeg.num_components != 3) {
        refused = name + " has " + std::to_string(jpeg.num_components) + " colours, expected grey or RGB";
        return true;
    }
    jpeg.out_color_space = jpeg.num_components == 1 ? JCS_GRAYSCALE : JCS_RGB;
    jpeg_start_decompress(&jpeg);
    try {
        make_room(image, name, jpeg.output_width, jpeg.output_height, jpeg.output_components);
    } catch (const ImageError &error) {
        refused = error.message();
        return true;
    }
    while (jpeg.output_scanline < jpeg.output_height) {
        JSAMPROW row = image.levels.data() + static_cast<std::size_t>(jpeg.output_scanline) * image.width * image.channels;
        jpeg_read_scanlines(&jpeg, &row, 1);
    }
    jpeg_finish_decompress(&jpeg);
    return true;
}

Decoded decode_jpeg(const std::string &bytes, const std::string &name) {
    jpeg_decompress_struct jpeg{};
    JpegErrors errors{};
    Decoded image;
    std::string refused;
    jpeg.err = jpeg_std_error(&errors.manager);
    errors.manager.error_exit = jpeg_failed;
    errors.manager.emit_message = jpeg_warned;
    bool whole = decode_jpeg_into(jpeg, errors, bytes, name, image, refused);
    jpeg_destroy_decompress(&jpeg);
    if (!whole) throw cannot_be_decoded(name, errors.words);
    if (!refused.empty()) throw ImageError(refused, "convert it to RGB with the tool that wrote it");
    return image;
}

#endif

#ifdef CLIP_EMBED_PNG

Decoded decode_png(const std::string &bytes, const std::string &name) {
    png_image png{};
    png.version = PNG_IMAGE_VERSION;
    // The header says what is inside: bit depth and colour type are the bytes 24 and 25 of a PNG.
    int depth = bytes.size() > 25 ? bytes[24] : 0, colour = bytes.size() > 25 ? bytes[25] : 0;
    bool plain = depth == 8 && colour != PNG_COLOR_TYPE_PALETTE && bytes.find("tRNS") == std::string::npos;
    if (depth && !plain) {
        throw ImageError(name + " has a palette, a transparent colour, or other than 8 bits a level",
                         "convert it to RGB or RGBA of 8 bits with the tool that wrote it");
    }
    if (!png_image_begin_read_from_memory(&png, bytes.data(), bytes.size())) throw cannot_be_decoded(name, png.message);
    bool alpha = colour & PNG_COLOR_MASK_ALPHA, grey = !(colour & PNG_COLOR_MASK_COLOR) && !alpha;
    // libpng's simplified reading would correct gamma; with the format that the file has, and told that it is sRGB, it
    // takes the levels as they are.
    png.flags |= PNG_IMAGE_FLAG_16BIT_sRGB;
    png.format = alpha ? PNG_FORMAT_RGBA : grey ? PNG_FORMAT_GRAY : PNG_FORMAT_RGB;
    Decoded image;
    try {
        make_room(image, name, png.width, png.height, alpha ? 4 : grey ? 1 : 3);
    } catch (...) {
        png_image_free(&png);
        throw;
    }
    if (!png_image_finish_read(&png, nullptr, image.levels.data(), 0, nullptr)) throw cannot_be_decoded(name, png.message);
    return image;
}

#endif

// Binary PPM, which needs no library.
Decoded decode_ppm(const std::string &bytes, const std::string &name) {
    std::size_t at = 2;
    long numbers[3] = {};
    for (long &number : numbers) {
        while (at < bytes.size() && std::isspace(static_cast<unsigned char>(bytes[at]))) ++at;
        while (at < bytes.size() && std::isdigit(static_cast<unsigned char>(bytes[at])) && number < 100000000) {
            number = 10 * number + (bytes[at++] - '0');
        }
    }
    Decoded image;
    if (numbers[2] != 255) throw cannot_be_decoded(name, "expected a PPM of 255 levels");
    make_room(image, name, numbers[0], numbers[1], 3);
    if (bytes.size() < at + 1 + image.levels.size()) throw cannot_be_decoded(name, "it is cut short");
    std::memcpy(image.levels.data(), bytes.data() + at + 1, image.levels.size());
    return image;
}

} // namespace

Decoded decode(const std::string &path) {
    std::string name = "'" + path + "'";
    std::error_code ignored;
    if (std::filesystem::is_directory(path, ignored)) {
        throw ImageError(name + " is a directory, expected an image file", "pass the files in it");
    }
    std::ifstream file(path, std::ios::binary);
    if (!file) {
        throw ImageError(name + ": there is no such file", "check the path; it is relative to the current directory");
    }
    std::string bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
    if (bytes.empty()) throw ImageError(name + " is empty (0 bytes)", damaged);
#ifdef CLIP_EMBED_JPEG
    if (bytes.compare(0, 2, "\xFF\xD8") == 0) return decode_jpeg(bytes, name);
#endif
#ifdef CLIP_EMBED_PNG
    if (bytes.compare(0, 8, "\x89PNG\r\n\x1A\n") == 0) return decode_png(bytes, name);
#endif
    if (bytes.compare(0, 2, "P6") == 0) return decode_ppm(bytes, name);
    throw ImageError(name + " is not an image in a format that clip_embed reads", damaged);
}
