#include "files.hpp"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>

#include "sentences.hpp"
#include "sha256.hpp"

namespace clip_export {
namespace {

namespace fs = std::filesystem;

BundleIntegrityError cannot_be_read(const std::string &name, const std::string &why) {
    return BundleIntegrityError(name + " cannot be read: " + why, rebuild_hint);
}

struct Close {
    void operator()(std::FILE *file) const { std::fclose(file); }
};
using File = std::unique_ptr<std::FILE, Close>;

File open(const fs::path &path, const std::string &name) {
    File file(std::fopen(path.string().c_str(), "rb"));
    if (!file) throw cannot_be_read(name, std::strerror(errno));
    return file;
}

void walk(const fs::path &directory, const std::string &prefix, std::vector<std::string> &found) {
    for (const fs::directory_entry &entry : fs::directory_iterator(directory)) {
        std::string name = entry.path().filename().string();
        if (name.empty() || name[0] == '.') continue;
        fs::file_status status = entry.symlink_status();
        if (fs::is_directory(status)) {
            walk(entry.path(), prefix + name + "/", found);
        } else {
            found.push_back(prefix + name);
        }
    }
}

// The first of many names, printable whatever bytes the disk holds.
std::string few(const std::vector<std::string> &names) {
    std::vector<std::string> shown;
    for (std::size_t i = 0; i < names.size() && i < 3; ++i) {
        std::string escaped;
        for (unsigned char c : names[i]) {
            char text[8];
            std::snprintf(text, sizeof text, c >= ' ' && c < 0x7F ? "%c" : "\\x%02x", c);
            escaped += text;
        }
        shown.push_back(escaped);
    }
    std::string more = names.size() > 3 ? " and " + std::to_string(names.size() - 3) + " more" : "";
    return joined(shown) + more;
}

} // namespace

std::vector<std::string> listing(const fs::path &directory) {
    std::vector<std::string> found;
    try {
        walk(directory, "", found);
    } catch (const fs::filesystem_error &error) {
        throw cannot_be_read(directory.filename().string(), error.code().message());
    }
    std::sort(found.begin(), found.end());
    return found;
}

void check_listing(const fs::path &directory, const Manifest &manifest) {
    std::vector<std::string> found, links, missing, strangers;
    for (const std::string &name : listing(directory)) {
        if (name == "manifest.json") continue;
        found.push_back(name);
        std::error_code ignored;
        if (fs::is_symlink(fs::symlink_status(directory / name, ignored))) links.push_back(name);
        if (!manifest.files.count(name)) strangers.push_back(name);
    }
    for (const auto &[name, entry] : manifest.files) {
        if (!std::binary_search(found.begin(), found.end(), name)) missing.push_back(name);
    }
    std::string place = directory.string();
    if (!links.empty()) {
        throw BundleIntegrityError(few(links) + " in " + place + " is a symbolic link; a bundle holds its files itself",
                                   "copy the bundle with its links followed: cp -rL");
    }
    if (!missing.empty()) throw BundleIntegrityError(few(missing) + " is missing from " + place, rebuild_hint);
    if (!strangers.empty()) {
        throw BundleIntegrityError(few(strangers) + " in " + place + " is not listed in its manifest.json",
                                   "move it out of the bundle");
    }
}

void check_size(const fs::path &directory, const std::string &name, const FileEntry &entry) {
    std::error_code error;
    fs::file_status status = fs::symlink_status(directory / name, error);
    if (!fs::exists(status)) throw cannot_be_read(name, error ? error.message() : "No such file or directory");
    if (!fs::is_regular_file(status)) {
        throw BundleIntegrityError(name + " in " + directory.string() + " is not a regular file", rebuild_hint);
    }
    auto size = static_cast<std::int64_t>(fs::file_size(directory / name, error));
    if (error) throw cannot_be_read(name, error.message());
    if (size != entry.size) {
        std::string what = size < entry.size ? "truncated" : "changed";
        throw BundleIntegrityError(name + " in " + directory.string() + " is " + what + ": expected " +
                                       std::to_string(entry.size) + " bytes, found " + std::to_string(size),
                                   rebuild_hint);
    }
}

void check_sha256(const fs::path &directory, const std::string &name, const FileEntry &entry) {
    File file = open(directory / name, name);
    Sha256 sha;
    std::vector<char> block(1 << 20);
    while (std::size_t count = std::fread(block.data(), 1, block.size(), file.get())) sha.update(block.data(), count);
    if (std::ferror(file.get())) throw cannot_be_read(name, std::strerror(errno));
    std::string found = sha.hex();
    if (found != entry.sha256) {
        throw BundleIntegrityError(name + " in " + directory.string() + " is changed: expected sha256 " + entry.sha256 +
                                       ", found " + found,
                                   rebuild_hint);
    }
}

std::string read_file(const fs::path &path, const std::string &name, std::uint64_t most) {
    File file = open(path, name);
    std::string bytes;
    std::vector<char> block(1 << 16);
    while (bytes.size() <= most) {
        std::size_t count = std::fread(block.data(), 1, block.size(), file.get());
        if (count == 0) break;
        bytes.append(block.data(), count);
    }
    if (std::ferror(file.get())) throw cannot_be_read(name, std::strerror(errno));
    return bytes;
}

} // namespace clip_export
