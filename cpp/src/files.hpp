// The files of a bundle, one by one: which there are, whether they are what the manifest says, reading and hashing.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include <clip_export/bundle.hpp>

namespace clip_export {

constexpr const char *rebuild_hint = "build the bundle again, or copy it again from where it came";

// Paths of everything below `directory` that is not a directory, sorted, with `/`; links are listed, never followed, and
// what begins with a dot is left out.
std::vector<std::string> listing(const std::filesystem::path &directory);

// Throw BundleIntegrityError.
void check_listing(const std::filesystem::path &directory, const Manifest &manifest);
void check_size(const std::filesystem::path &directory, const std::string &name, const FileEntry &entry);
void check_sha256(const std::filesystem::path &directory, const std::string &name, const FileEntry &entry);
// The bytes of a file; of more than `most` the first most + 1.
std::string read_file(const std::filesystem::path &path, const std::string &name, std::uint64_t most = UINT64_MAX);

} // namespace clip_export
