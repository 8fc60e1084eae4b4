// A bundle on disk: a directory with a manifest.json that vouches for every other file in it (docs/bundle-format.md).
//
//     clip_export::Bundle bundle = clip_export::Bundle::open("engines/demo");
//     bundle.graph_path(clip_export::Tower::text);
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <clip_export/errors.hpp>
#include <clip_export/spec.hpp>

namespace clip_export {

struct FileEntry {
    std::string sha256;
    std::int64_t size = 0; // bytes
};

// One ONNX file. `sequence_dynamic`: the sequence axis may be trimmed to the longest text of a batch.
struct Graph {
    std::string file;
    std::int64_t opset = 0;
    std::vector<std::string> inputs, outputs;
    bool sequence_dynamic = false;
};

using Shape = std::vector<std::int64_t>;

// The shapes that one input may have, from `min` to `max` on every axis; kernels are chosen for `opt`.
struct ShapeRange {
    Shape min, opt, max;
};
using Profile = std::map<std::string, ShapeRange>;

// One compiled engine of one tower.
struct Plan {
    std::string file;
    Tower tower = Tower::text;
    std::string backend, version, compute_capability, precision, graph, graph_sha256;
    std::vector<Profile> profiles;
    std::vector<std::string> outputs;
    std::map<std::string, std::string> options;
};

// What a quantized precision was held to, and in words what of that it missed.
struct Contract {
    double min_cosine = 0;
    std::optional<double> max_recall_drop;
    std::vector<std::string> missed;
};

struct Manifest {
    std::int64_t schema_version = 0;
    std::string name;
    ModelSpec spec;
    std::map<std::string, std::string> versions; // of the libraries that numbers depend on, when it was built
    std::vector<std::pair<std::string, std::map<Tower, Graph>>> variants; // precision -> tower -> graph
    std::map<std::string, Contract> contracts;
    std::vector<Plan> plans;
    std::map<std::string, FileEntry> files;

    const std::map<Tower, Graph> *variant(const std::string &precision) const; // null where there is none
    // What stands for `graph` and its external data together: what `sha256sum GRAPH GRAPH.* | sha256sum` prints.
    std::string graph_sha256(const std::string &graph) const;
};

// Throws BundleSchemaError for what is no manifest, BundleIntegrityError for one that was changed since.
Manifest parse_manifest(const std::string &bytes);

// What a plan has to fit: the backend and the version of its library here, this GPU, its free bytes if they are known.
// `host_code`: plans may be taken which carry code for this machine.
struct Machine {
    std::string backend, version, compute_capability;
    std::optional<std::int64_t> free_bytes;
    bool host_code = false;
};

// One plan a tower, all of one precision, or none at all; and of each other plan, why it was passed over.
struct Selection {
    Machine machine;
    std::vector<Tower> towers;
    std::optional<std::string> precision; // as it was asked for
    std::map<Tower, Plan> chosen;
    std::vector<std::pair<Plan, std::string>> passed_over;
};

// The error for a selection that chose nothing: each plan and why not, and the command that builds one.
NoPlanError explain(const Selection &selection, const std::string &bundle);

class Bundle {
  public:
    // Checks everything; `check_files = false` leaves out the hashing, the only slow part. Throws BundleNotFoundError,
    // BundleSchemaError or BundleIntegrityError, naming the file.
    static Bundle open(const std::filesystem::path &path, bool check_files = true);

    const std::filesystem::path &path() const { return path_; }
    const Manifest &manifest() const { return manifest_; }
    const ModelSpec &spec() const { return manifest_.spec; }

    // Throw BundleError, listing what there is.
    const Graph &graph(Tower tower, const std::string &precision = "fp32") const;
    std::filesystem::path graph_path(Tower tower, const std::string &precision = "fp32") const;

    std::string tokenizer_json() const; // throws BundleError for a bundle without a text tower
    std::string read(const std::string &file) const;
    Selection select_plans(const Machine &machine, const std::optional<std::string> &precision = std::nullopt) const;

  private:
    Bundle(std::filesystem::path path, Manifest manifest) : path_(std::move(path)), manifest_(std::move(manifest)) {}
    static Bundle open_once(const std::filesystem::path &directory, bool check_files);

    std::filesystem::path path_;
    Manifest manifest_;
};

} // namespace clip_export
