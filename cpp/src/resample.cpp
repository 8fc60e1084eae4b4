#include "resample.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#define CLIP_EXPORT_AVX2 1
#include <immintrin.h>
#endif

namespace clip_export {
namespace {

constexpr int precision_bits = 32 - 8 - 2; // of the fixed-point weights: 8 bits are the level's, 2 for sum and sign
constexpr std::int32_t half = 1 << (precision_bits - 1);
constexpr double pi = 3.14159265358979323846;

// Pillow's filters, each over its support.
double box_filter(double x) { return x > -0.5 && x <= 0.5 ? 1.0 : 0.0; }

double bilinear_filter(double x) {
    x = std::fabs(x);
    return x < 1.0 ? 1.0 - x : 0.0;
}

double hamming_filter(double x) {
    x = std::fabs(x);
    if (x == 0.0) return 1.0;
    if (x >= 1.0) return 0.0;
    x *= pi;
    return std::sin(x) / x * (0.54f + 0.46f * std::cos(x)); // floats, as in Pillow
}

double bicubic_filter(double x) {
    constexpr double a = -0.5;
    x = std::fabs(x);
    if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
    if (x < 2.0) return (((x - 5) * x + 8) * x - 4) * a;
    return 0.0;
}

double sinc(double x) {
    if (x == 0.0) return 1.0;
    x *= pi;
    return std::sin(x) / x;
}

double lanczos_filter(double x) { return x >= -3.0 && x < 3.0 ? sinc(x) * sinc(x / 3) : 0.0; }

struct Filter {
    double (*weight)(double);
    double support;
};

Filter filter_of(Interpolation interpolation) {
    switch (interpolation) {
    case Interpolation::box: return {box_filter, 0.5};
    case Interpolation::bilinear: return {bilinear_filter, 1.0};
    case Interpolation::hamming: return {hamming_filter, 1.0};
    case Interpolation::lanczos: return {lanczos_filter, 3.0};
    default: return {bicubic_filter, 2.0};
    }
}

// The weights of `count` outputs from number `first` on, of a side of `in` that becomes one of `out`. Output i is the sum
// of `lengths[i]` inputs from `starts[i]` on, with the weights from i * most on.
struct Weights {
    int most = 0;
    std::vector<int> starts, lengths;
    std::vector<std::int32_t> values;

    const std::int32_t *of(int index) const { return values.data() + std::size_t(index) * most; }
};

Weights weights_of(int in, int out, const Filter &filter, int first, int count) {
    double scale = static_cast<double>(in) / out, filter_scale = std::max(scale, 1.0);
    double support = filter.support * filter_scale;
    Weights weights;
    weights.most = static_cast<int>(std::ceil(support)) * 2 + 1;
    weights.values.resize(std::size_t(count) * weights.most);
    std::vector<double> exact(weights.most);
    for (int index = 0; index < count; ++index) {
        double center = 0.0 + (first + index + 0.5) * scale, total = 0.0, inverse = 1.0 / filter_scale;
        int start = std::max(static_cast<int>(center - support + 0.5), 0);
        int length = std::min(static_cast<int>(center + support + 0.5), in) - start;
        for (int x = 0; x < length; ++x) total += exact[x] = filter.weight((x + start - center + 0.5) * inverse);
        std::int32_t *values = weights.values.data() + std::size_t(index) * weights.most;
        for (int x = 0; x < length; ++x) {
            double weight = (total != 0.0 ? exact[x] / total : exact[x]) * (1 << precision_bits);
            values[x] = static_cast<std::int32_t>(weight < 0 ? weight - 0.5 : weight + 0.5);
        }
        weights.starts.push_back(start);
        weights.lengths.push_back(length);
    }
    return weights;
}

std::uint8_t level(std::int32_t sum) { return static_cast<std::uint8_t>(std::clamp(sum >> precision_bits, 0, 255)); }

// One row: each output pixel is a sum of pixels of `in`.
void horizontal_plain(const std::uint8_t *in, const Weights &weights, int count, std::uint8_t *out) {
    for (int x = 0; x < count; ++x) {
        const std::int32_t *values = weights.of(x);
        const std::uint8_t *from = in + std::size_t{4} * weights.starts[x];
        std::int32_t sums[4] = {half, half, half, half};
        for (int k = 0; k < weights.lengths[x]; ++k) {
            for (int band = 0; band < 4; ++band) sums[band] += from[4 * k + band] * values[k];
        }
        for (int band = 0; band < 4; ++band) out[4 * x + band] = level(sums[band]);
    }
}

// One row: each output level is a sum of the levels below each other in `rows`.
void vertical_plain(const std::uint8_t *const *rows, const std::int32_t *values, int length, std::size_t from,
                    std::size_t count, std::uint8_t *out) {
    for (std::size_t at = from; at < count; ++at) {
        std::int32_t sum = half;
        for (int k = 0; k < length; ++k) sum += rows[k][at] * values[k];
        out[at] = level(sum);
    }
}

#ifdef CLIP_EXPORT_AVX2

// The sums of two pixels as four levels each, clipped.
__attribute__((target("avx2"))) inline __m128i levels_of(__m256i sums) {
    __m256i shifted = _mm256_srai_epi32(sums, precision_bits);
    __m256i words = _mm256_packs_epi32(shifted, shifted); // saturates far outside of what a level may be
    __m256i bytes = _mm256_packus_epi16(words, words);
    return _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
}

__attribute__((target("avx2"))) void horizontal_avx2(const std::uint8_t *in, const Weights &weights, int count,
                                                     std::uint8_t *out) {
    for (int x = 0; x < count; ++x) {
        const std::int32_t *values = weights.of(x);
        const std::uint8_t *from = in + std::size_t{4} * weights.starts[x];
        int length = weights.lengths[x], k = 0;
        __m256i two = _mm256_setzero_si256(); // the sums of even and of odd pixels
        for (; k + 2 <= length; k += 2) {
            __m256i pixels = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(from + 4 * k)));
            __m256i factors = _mm256_set_m128i(_mm_set1_epi32(values[k + 1]), _mm_set1_epi32(values[k]));
            two = _mm256_add_epi32(two, _mm256_mullo_epi32(pixels, factors));
        }
        __m128i sums = _mm_add_epi32(_mm256_castsi256_si128(two), _mm256_extracti128_si256(two, 1));
        if (k < length) {
            std::int32_t last;
            std::memcpy(&last, from + 4 * k, 4);
            __m128i pixel = _mm_cvtepu8_epi32(_mm_cvtsi32_si128(last));
            sums = _mm_add_epi32(sums, _mm_mullo_epi32(pixel, _mm_set1_epi32(values[k])));
        }
        sums = _mm_add_epi32(sums, _mm_set1_epi32(half));
        std::int32_t pixel = _mm_cvtsi128_si32(levels_of(_mm256_castsi128_si256(sums)));
        std::memcpy(out + 4 * x, &pixel, 4);
    }
}

__attribute__((target("avx2"))) void vertical_avx2(const std::uint8_t *const *rows, const std::int32_t *values,
                                                   int length, std::size_t count, std::uint8_t *out) {
    std::size_t at = 0;
    for (; at + 8 <= count; at += 8) {
        __m256i sums = _mm256_set1_epi32(half);
        for (int k = 0; k < length; ++k) {
            __m256i levels = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(rows[k] + at)));
            sums = _mm256_add_epi32(sums, _mm256_mullo_epi32(levels, _mm256_set1_epi32(values[k])));
        }
        _mm_storel_epi64(reinterpret_cast<__m128i *>(out + at), levels_of(sums));
    }
    vertical_plain(rows, values, length, at, count, out);
}

bool has_avx2() { return __builtin_cpu_supports("avx2"); }

#else
bool has_avx2() { return false; }
#endif

void horizontal(const std::uint8_t *in, const Weights &weights, int count, std::uint8_t *out) {
#ifdef CLIP_EXPORT_AVX2
    if (has_avx2()) return horizontal_avx2(in, weights, count, out);
#endif
    horizontal_plain(in, weights, count, out);
}

void vertical(const std::uint8_t *const *rows, const std::int32_t *values, int length, std::size_t count,
              std::uint8_t *out) {
#ifdef CLIP_EXPORT_AVX2
    if (has_avx2()) return vertical_avx2(rows, values, length, count, out);
#endif
    vertical_plain(rows, values, length, 0, count, out);
}

// Pillow steps through the input by adding, which differs from multiplying in the last bits.
std::vector<int> nearest_sources(int in, int out, int first, int count) {
    double scale = static_cast<double>(in) / out, at = 0.0 + scale * 0.5;
    std::vector<int> sources;
    for (int index = 0; index < first + count; ++index, at += scale) {
        if (index >= first) sources.push_back(std::min(static_cast<int>(at), in - 1));
    }
    return sources;
}

Picture nearest(const Picture &picture, int width, int height, const Box &kept) {
    std::vector<int> columns = nearest_sources(picture.width, width, kept.left, kept.width);
    std::vector<int> rows = nearest_sources(picture.height, height, kept.top, kept.height);
    Picture out(kept.width, kept.height);
    for (int y = 0; y < kept.height; ++y) {
        const std::uint8_t *from = picture.row(rows[y]);
        for (int x = 0; x < kept.width; ++x) std::memcpy(out.row(y) + 4 * x, from + std::size_t{4} * columns[x], 4);
    }
    return out;
}

// The columns `kept_width` from `left` on of a picture that becomes `width` wide, of its rows from `first` on.
Picture horizontally(const Picture &picture, int width, const Filter &filter, int left, int kept_width, int first, int rows) {
    Picture out(kept_width, rows);
    if (width == picture.width) {
        for (int y = 0; y < rows; ++y) {
            std::memcpy(out.row(y), picture.row(first + y) + std::size_t{4} * left, std::size_t{4} * kept_width);
        }
        return out;
    }
    Weights weights = weights_of(picture.width, width, filter, left, kept_width);
    for (int y = 0; y < rows; ++y) horizontal(picture.row(first + y), weights, kept_width, out.row(y));
    return out;
}

// What `weights` makes of the rows of a picture whose first row is number `first`.
Picture vertically(const Picture &picture, const Weights &weights, int first) {
    auto count = static_cast<int>(weights.starts.size());
    Picture out(picture.width, count);
    std::vector<const std::uint8_t *> rows(weights.most);
    for (int y = 0; y < count; ++y) {
        for (int k = 0; k < weights.lengths[y]; ++k) rows[k] = picture.row(weights.starts[y] + k - first);
        vertical(rows.data(), weights.of(y), weights.lengths[y], std::size_t{4} * picture.width, out.row(y));
    }
    return out;
}

// Since version 13 Pillow squeezes a tall picture before it narrows it; the levels in between are rounded, so that the
// order shows in the last bits. The rule was found by trying.
bool vertical_first(const Picture &picture, int width, int height) {
    std::int64_t lower = std::int64_t{picture.height} - height, narrower = std::int64_t{picture.width} - width;
    return lower > 2 * std::max<std::int64_t>(narrower, 0);
}

} // namespace

Picture resized(const Picture &picture, int width, int height, Interpolation interpolation, const Box &kept, int pillow) {
    if (interpolation == Interpolation::nearest) return nearest(picture, width, height, kept);
    Filter filter = filter_of(interpolation);
    if (height == picture.height) {
        return horizontally(picture, width, filter, kept.left, kept.width, kept.top, kept.height);
    }
    Weights weights = weights_of(picture.height, height, filter, kept.top, kept.height);
    if (width != picture.width && pillow >= 13 && vertical_first(picture, width, height)) {
        Picture between = vertically(picture, weights, 0);
        return horizontally(between, width, filter, kept.left, kept.width, 0, kept.height);
    }
    int first = weights.starts.front(), rows = weights.starts.back() + weights.lengths.back() - first; // that are needed
    return vertically(horizontally(picture, width, filter, kept.left, kept.width, first, rows), weights, first);
}

} // namespace clip_export
