#include "profiles.hpp"

#include <algorithm>
#include <cmath>

#include "engine.hpp"
#include "sentences.hpp"

namespace clip_export {
namespace {

constexpr const char *hint = "build the plan again with a profile that holds it";

struct Range { // of batches that a profile runs
    std::int64_t least, most;
};
using Sizes = std::vector<std::int64_t>;
using Rest = std::map<std::string, Shape>;

bool holds_row(const ShapeRange &span, const Shape &shape) {
    if (shape.size() + 1 != span.min.size()) return false;
    for (std::size_t axis = 0; axis < shape.size(); ++axis) {
        if (shape[axis] < span.min[axis + 1] || shape[axis] > span.max[axis + 1]) return false;
    }
    return true;
}

bool holds(const Profile &profile, const Rest &rest) {
    if (profile.size() != rest.size()) return false;
    return std::all_of(rest.begin(), rest.end(), [&](const auto &entry) {
        auto found = profile.find(entry.first);
        return found != profile.end() && holds_row(found->second, entry.second);
    });
}

Range batches(const Profile &profile) {
    Range range{1, INT64_MAX};
    for (const auto &[name, span] : profile) {
        range.least = std::max(range.least, span.min[0]);
        range.most = std::min(range.most, span.max[0]);
    }
    return range;
}

// The smallest batch of at least `rows` that is run; 0 where there is none.
std::int64_t padded(std::int64_t rows, const std::vector<Range> &ranges) {
    std::int64_t best = 0;
    for (const Range &range : ranges) {
        std::int64_t size = std::max(rows, range.least);
        if (rows <= range.most && (best == 0 || size < best)) best = size;
    }
    return best;
}

std::int64_t work(const Sizes &sizes, const std::vector<Range> &ranges) {
    std::int64_t total = 0;
    for (std::int64_t size : sizes) total += padded(size, ranges);
    return total;
}

Sizes sizes_of(std::int64_t rows, const std::vector<Range> &ranges) {
    std::int64_t most = 0;
    for (const Range &range : ranges) most = std::max(most, range.most);
    if (rows > most) {
        std::int64_t runs = (rows + most - 1) / most, last = rows - (runs - 1) * most;
        Sizes full(runs - 1, most), even, tail = sizes_of(last, ranges);
        full.insert(full.end(), tail.begin(), tail.end());
        for (std::int64_t run = 0; run < runs; ++run) even.push_back(rows / runs + (run < rows % runs));
        bool own = last == most || std::any_of(ranges.begin(), ranges.end(), [&](const Range &range) {
                       return range.least <= last && last <= range.most && range.most < most;
                   });
        return own || work(full, ranges) < work(even, ranges) ? full : even;
    }
    std::vector<Range> smaller;
    for (const Range &range : ranges) {
        if (range.most < rows) smaller.push_back(range);
    }
    return padded(rows, ranges) > 2 * rows && !smaller.empty() ? sizes_of(rows, smaller) : Sizes{rows};
}

// The tightest profile that holds a batch: the smallest largest volume, then the nearest `opt`.
int choose(const std::vector<Profile> &profiles, std::int64_t rows, const Rest &rest) {
    int best = -1;
    std::pair<double, double> tightest;
    for (std::size_t number = 0; number < profiles.size(); ++number) {
        const Profile &profile = profiles[number];
        Range range = batches(profile);
        if (!holds(profile, rest) || rows < range.least || rows > range.most) continue;
        double volume = 0, distance = 0;
        for (const auto &[name, span] : profile) {
            double product = 1;
            for (std::int64_t size : span.max) product *= static_cast<double>(size);
            volume += product;
            distance += std::fabs(std::log(static_cast<double>(rows) / span.opt[0]));
            const Shape &shape = rest.at(name);
            for (std::size_t axis = 0; axis < shape.size(); ++axis) {
                distance += std::fabs(std::log(static_cast<double>(shape[axis]) / span.opt[axis + 1]));
            }
        }
        if (best < 0 || std::pair{volume, distance} < tightest) {
            best = static_cast<int>(number);
            tightest = {volume, distance};
        }
    }
    return best;
}

InputError outside(const std::vector<Profile> &profiles, const Rest &rest) {
    std::vector<std::string> found;
    for (const auto &[name, shape] : rest) {
        for (std::size_t axis = 0; axis < shape.size(); ++axis) {
            std::int64_t low = INT64_MAX, high = 0;
            for (const Profile &profile : profiles) {
                auto span = profile.find(name);
                if (span == profile.end() || span->second.min.size() <= axis + 1) continue;
                low = std::min(low, span->second.min[axis + 1]);
                high = std::max(high, span->second.max[axis + 1]);
            }
            std::string size = std::to_string(shape[axis]), on = std::to_string(axis + 1);
            if (low == high && shape[axis] != low) {
                return InputError(name + ": expected " + std::to_string(low) + " on axis " + on + ", found " + size, hint);
            }
            if (shape[axis] < low || shape[axis] > high) {
                return InputError(name + ": " + size + " on axis " + on + " is outside the profiles " + std::to_string(low) +
                                      ".." + std::to_string(high),
                                  hint);
            }
        }
        found.push_back(name + " " + text_of(shape));
    }
    return InputError("no single profile holds rows of " + joined(found), hint);
}

} // namespace

std::vector<Part> split(std::int64_t rows, const std::vector<Profile> &profiles, const Rest &rest) {
    std::vector<Range> ranges;
    for (const Profile &profile : profiles) {
        Range range = batches(profile);
        if (holds(profile, rest) && range.least <= range.most) ranges.push_back(range);
    }
    if (ranges.empty()) throw outside(profiles, rest);
    std::vector<Part> parts;
    for (std::int64_t size : sizes_of(rows, ranges)) {
        std::int64_t whole = padded(size, ranges);
        parts.push_back({size, whole, choose(profiles, whole, rest)});
    }
    return parts;
}

} // namespace clip_export
