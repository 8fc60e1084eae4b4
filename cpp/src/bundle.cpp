#include <clip_export/bundle.hpp>

#include <algorithm>
#include <chrono>
#include <thread>

#include "sentences.hpp"
#include "files.hpp"
#include "plan_selection.hpp"
#include "unicode.hpp"

namespace clip_export {
namespace {

namespace fs = std::filesystem;

// A manifest is a few kilobytes; one of many megabytes is a mistake or an attack, and is not read into memory.
constexpr std::uint64_t most_manifest_bytes = 4 << 20;

// A bundle that is replaced while it is opened is opened again: the two renames take less than a millisecond.
constexpr int attempts = 5;
constexpr std::chrono::milliseconds pause{50};

std::string old_bundle(const fs::path &directory) { // .NAME.replaced-xxxxxxxx, "" where there is none
    std::error_code error;
    std::string prefix = "." + directory.filename().string() + ".replaced-";
    fs::directory_iterator entries(directory.parent_path(), error);
    if (error) return "";
    std::vector<std::string> found;
    for (const fs::directory_entry &entry : entries) {
        std::string name = entry.path().filename().string();
        bool digits = name.size() == prefix.size() + 8 && name.find_first_not_of("0123456789abcdef", prefix.size()) == std::string::npos;
        if (name.rfind(prefix, 0) == 0 && digits) found.push_back(entry.path().string());
    }
    std::sort(found.begin(), found.end());
    return found.empty() ? "" : found.front();
}

BundleNotFoundError not_found(const fs::path &directory) {
    std::string place = directory.string(), old = old_bundle(directory);
    if (!old.empty()) {
        return BundleNotFoundError(place + " was being replaced when the build was stopped; the bundle that was there is " + old,
                                   "build again, or move it back");
    }
    std::error_code ignored;
    std::string what = fs::is_directory(directory, ignored)      ? "is not a bundle: it has no manifest.json"
                       : fs::is_regular_file(directory, ignored) ? "is a file, not the directory of a bundle"
                                                                 : "does not exist";
    return BundleNotFoundError(place + " " + what, "make one with: clip-export build CHECKPOINT -o BUNDLE");
}

std::string read_manifest(const fs::path &directory) {
    std::error_code error;
    fs::file_status status = fs::symlink_status(directory / "manifest.json", error);
    if (status.type() == fs::file_type::not_found) throw not_found(directory);
    if (error) throw BundleError("cannot read " + directory.string() + ": " + error.message());
    if (!fs::is_regular_file(status)) {
        throw BundleIntegrityError("manifest.json in " + directory.string() + " is not a regular file", rebuild_hint);
    }
    std::string bytes = read_file(directory / "manifest.json", "manifest.json", most_manifest_bytes);
    if (bytes.size() > most_manifest_bytes) {
        throw BundleSchemaError("manifest.json has more than 4 MiB: that is no manifest", rebuild_hint);
    }
    return bytes;
}

// When the directory was made anew, as far as the file system tells: another one is there when a bundle was replaced.
fs::file_time_type changed(const fs::path &directory) {
    std::error_code ignored;
    fs::file_time_type time = fs::last_write_time(directory / "manifest.json", ignored);
    return ignored ? fs::file_time_type::min() : time;
}

} // namespace

Bundle Bundle::open(const fs::path &path, bool check_files) {
    if (path.string().find('\0') != std::string::npos) throw BundleNotFoundError(path.string() + " does not exist");
    std::error_code error;
    fs::path directory = fs::absolute(path.empty() ? fs::path(".") : path, error).lexically_normal(); // as Python's Path("")
    if (error) throw BundleError("cannot read " + path.string() + ": " + error.message());
    if (!directory.has_filename()) directory = directory.parent_path();
    for (int attempt = 0; attempt < attempts; ++attempt) {
        fs::file_time_type before = changed(directory);
        try {
            return open_once(directory, check_files);
        } catch (const BundleError &) {
            if (before == changed(directory)) throw;
        }
        std::this_thread::sleep_for(pause);
    }
    return open_once(directory, check_files);
}

Bundle Bundle::open_once(const fs::path &directory, bool check_files) {
    Manifest manifest = parse_manifest(read_manifest(directory));
    check_listing(directory, manifest);
    for (const auto &[name, entry] : manifest.files) check_size(directory, name, entry);
    if (check_files) {
        for (const auto &[name, entry] : manifest.files) check_sha256(directory, name, entry);
    }
    return Bundle(directory, std::move(manifest));
}

const Graph &Bundle::graph(Tower tower, const std::string &precision) const {
    const std::map<Tower, Graph> *graphs = manifest_.variant(precision);
    if (graphs && graphs->count(tower)) return graphs->at(tower);
    std::vector<std::string> held;
    for (const auto &[other, towers] : manifest_.variants) {
        for (const auto &entry : towers) held.push_back(other + " " + name_of(entry.first));
    }
    throw BundleError(path_.string() + " holds no " + precision + " " + name_of(tower) + " graph, only " + joined(held),
                      "choose one of these, or build the bundle again with what is missing");
}

fs::path Bundle::graph_path(Tower tower, const std::string &precision) const {
    return path_ / graph(tower, precision).file;
}

std::string Bundle::read(const std::string &file) const { return read_file(path_ / file, file); }

std::string Bundle::tokenizer_json() const {
    if (!spec().text) throw BundleError(path_.string() + " has no text tower, and so no tokenizer");
    std::string json = read("tokenizer.json");
    if (auto at = unicode::decode(json).invalid_at) {
        throw BundleIntegrityError("tokenizer.json is not UTF-8: byte " + std::to_string(*at) + " begins no character",
                                   rebuild_hint);
    }
    return json;
}

Selection Bundle::select_plans(const Machine &machine, const std::optional<std::string> &precision) const {
    return select(manifest_, machine, precision);
}

} // namespace clip_export
