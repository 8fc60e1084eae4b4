// Bundles from somebody whom nobody trusts.
#include "checks.hpp"

#include <cstdlib>
#include <filesystem>
#include <fstream>

#include <unistd.h>

#include <clip_export/bundle.hpp>

#include "json.hpp"
#include "sha256.hpp"

using namespace clip_export;
namespace fs = std::filesystem;

namespace {

// A folder that goes when the test does.
struct Folder {
    fs::path path;
    Folder() {
        std::string pattern = (fs::temp_directory_path() / "clip-export-XXXXXX").string();
        path = mkdtemp(pattern.data());
    }
    ~Folder() { fs::remove_all(path); }
    void write(const std::string &name, const std::string &bytes) const {
        fs::create_directories((path / name).parent_path());
        std::ofstream(path / name, std::ios::binary) << bytes;
    }
};

const std::map<std::string, std::string> contents = {
    {"golden.safetensors", "golden"}, {"image.onnx", "a graph"}, {"report.json", "{}"}};

Json manifest() {
    Json plain = Json::parse(R"({"schema_version": 4, "name": "tiny", "spec": {"text": null, "image": {"transformer":
        {"width": 4, "layers": 1, "heads": 1, "mlp_width": 4, "activation": "gelu"}, "image_size": 8, "patch_size": 4,
        "embedding_dim": 4}, "tokenizer": null, "preprocess": {"dialect": "openai", "resize_mode": "shortest",
        "resize_size": 8, "crop_size": 8, "interpolation": "bicubic", "mean": [0, 0, 0], "std": [1, 1, 1]}, "context": null},
        "provenance": {"format": "x", "name": "x", "files": {}, "versions": {"pillow": "12.3.0"}, "options": {}},
        "variants": {"fp32": {"image": {"file": "image.onnx", "opset": 23, "inputs": ["pixels"],
        "outputs": ["embedding"]}}}, "contracts": {}, "plans": [], "files": {}})");
    for (const auto &[name, bytes] : contents) plain["files"][name] = {{"sha256", sha256_hex(bytes)}, {"size", bytes.size()}};
    return plain;
}

std::string sealed(const Json &plain) {
    std::string text = plain.dump(2), head = text.substr(0, text.size() - 2);
    return head + ",\n  \"sha256\": \"" + sha256_hex(head) + "\"\n}\n";
}

void fill(const Folder &folder, const Json &plain) {
    for (const auto &[name, bytes] : contents) folder.write(name, bytes);
    folder.write("manifest.json", sealed(plain));
}

} // namespace

TEST(bundle, opens_and_reads) {
    Folder folder;
    fill(folder, manifest());
    Bundle bundle = Bundle::open(folder.path.string() + "/");
    CHECK(bundle.manifest().name == "tiny" && bundle.spec().towers() == std::vector<Tower>{Tower::image});
    CHECK(bundle.spec().preprocess->pillow == 12);
    CHECK(bundle.read(bundle.graph(Tower::image).file) == "a graph");
    CHECK_THROWS(BundleError, "holds no fp32 text graph, only fp32 image", bundle.graph(Tower::text));
    CHECK_THROWS(BundleError, "has no text tower", bundle.tokenizer_json());
}

TEST(bundle, what_is_not_there) {
    Folder folder;
    CHECK_THROWS(BundleNotFoundError, "does not exist", Bundle::open(folder.path / "nothing"));
    CHECK_THROWS(BundleNotFoundError, "it has no manifest.json", Bundle::open(folder.path));
    folder.write("file", "x");
    CHECK_THROWS(BundleNotFoundError, "is a file, not the directory", Bundle::open(folder.path / "file"));
}

TEST(bundle, files_that_are_not_as_listed) {
    Folder folder;
    fill(folder, manifest());
    folder.write("image.onnx", "a groph");
    CHECK_THROWS(BundleIntegrityError, "image.onnx in", Bundle::open(folder.path));
    CHECK(Bundle::open(folder.path, false).manifest().name == "tiny"); // hashes are what was asked to be left out
    folder.write("image.onnx", "a gra");
    CHECK_THROWS(BundleIntegrityError, "is truncated: expected 7 bytes, found 5", Bundle::open(folder.path, false));
    folder.write("image.onnx", "a graph");
    folder.write("stranger.txt", "x");
    CHECK_THROWS(BundleIntegrityError, "stranger.txt in", Bundle::open(folder.path));
    fs::remove(folder.path / "stranger.txt");
    folder.write(".hidden", "x");
    CHECK(Bundle::open(folder.path).manifest().name == "tiny");
    fs::remove(folder.path / "image.onnx");
    CHECK_THROWS(BundleIntegrityError, "image.onnx is missing", Bundle::open(folder.path));
    fs::create_symlink("/etc/hostname", folder.path / "image.onnx");
    CHECK_THROWS(BundleIntegrityError, "image.onnx in", Bundle::open(folder.path, false));
}

TEST(bundle, manifests_that_are_cut_or_changed) {
    std::string whole = sealed(manifest());
    CHECK(parse_manifest(whole).files.size() == 3);
    for (std::size_t length = 0; length < whole.size(); length += 7) {
        CHECK_THROWS(BundleError, "", parse_manifest(whole.substr(0, length)));
    }
    std::string changed = whole;
    changed[changed.find("tiny")] = 'T';
    CHECK_THROWS(BundleIntegrityError, "was changed after it was written", parse_manifest(changed));
    CHECK_THROWS(BundleSchemaError, "expected an object, found list", parse_manifest("[]"));
}

TEST(bundle, older_schemas_are_read) {
    Json plain = manifest();
    plain["spec"].erase("context");
    plain["schema_version"] = 3;
    CHECK(parse_manifest(sealed(plain)).schema_version == 3);
    plain.erase("contracts");
    plain["schema_version"] = 2;
    CHECK(parse_manifest(sealed(plain)).schema_version == 2);
    plain.erase("plans");
    plain["schema_version"] = 1;
    CHECK(parse_manifest(sealed(plain)).schema_version == 1);
}

TEST(bundle, manifests_that_lie) {
    auto refused = [](const char *words, auto change) {
        Json plain = manifest();
        change(plain);
        CHECK_THROWS(BundleSchemaError, words, parse_manifest(sealed(plain)));
    };
    refused("written by a newer clip-export", [](Json &m) { m["schema_version"] = 5; });
    refused("missing key spec.context", [](Json &m) { m["spec"].erase("context"); });
    refused("unknown key spec.context, which schema 3 has not", [](Json &m) { m["schema_version"] = 3; });
    refused("Context comes from a text tower", [](Json &m) { m["spec"]["context"] = {{"family", "sd1"}}; });
    refused("'sd9' is not one of clip, sd1", [](Json &m) { m["spec"]["context"] = {{"family", "sd9"}}; });
    refused("missing_blocks must be from 0 to 7", [](Json &m) { m["spec"]["context"] = {{"family", "sd1"}, {"missing_blocks", 8}}; });
    refused("expected a schema_version of 1 or more, found 'x'", [](Json &m) { m["schema_version"] = "x"; });
    refused("unknown key more", [](Json &m) { m["more"] = 1; });
    refused("missing key provenance", [](Json &m) { m.erase("provenance"); });
    refused("is not a path that a bundle may hold", [](Json &m) { m["files"]["../x"] = m["files"]["image.onnx"]; });
    refused("is not a path that a bundle may hold", [](Json &m) { m["files"]["/etc/passwd"] = m["files"]["image.onnx"]; });
    refused("is not a path that a bundle may hold", [](Json &m) { m["files"]["a//b"] = m["files"]["image.onnx"]; });
    refused("should be listed and is not", [](Json &m) { m["variants"]["fp32"]["image"]["file"] = "../image.onnx"; });
    refused("a file cannot have -1 bytes", [](Json &m) { m["files"]["image.onnx"]["size"] = -1; });
    refused("is not a sha256", [](Json &m) { m["files"]["image.onnx"]["sha256"] = "AB"; });
    refused("variants hold no tower, the spec has image", [](Json &m) { m["variants"].clear(); });
    refused("only a causal text tower", [](Json &m) { m["variants"]["fp32"]["image"]["sequence_dynamic"] = true; });
    refused("is out of range", [](Json &m) { m["spec"]["image"]["image_size"] = 1LL << 40; });
    refused("the image tower takes 9 pixels a side", [](Json &m) { m["spec"]["image"]["image_size"] = 9; });
    refused("expected int, found True", [](Json &m) { m["spec"]["image"]["patch_size"] = true; });
    refused("plans: at most 256, found 300", [](Json &m) { m["plans"] = Json(300, Json::object()); });
    refused("is none of the variants", [](Json &m) { m["contracts"]["int8"] = {{"min_cosine", 1}, {"missed", Json::array()}}; });
    refused("must be printable", [](Json &m) { m["name"] = "a\x1b[31m"; });
    refused("provenance must not name a place", [](Json &m) { m["provenance"]["name"] = "/home/x"; });
}

TEST(bundle, a_manifest_of_megabytes_is_not_read) {
    Folder folder;
    fill(folder, manifest());
    folder.write("manifest.json", std::string(5 << 20, ' '));
    CHECK_THROWS(BundleSchemaError, "more than 4 MiB", Bundle::open(folder.path));
}
