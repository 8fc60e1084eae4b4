#include <algorithm>
#include <set>

#include <clip_export/bundle.hpp>

#include "fields.hpp"
#include "plan_json.hpp"
#include "sha256.hpp"
#include "spec_json.hpp"

namespace clip_export {
namespace {

constexpr const char *rebuild = "build the bundle again, or copy it again from where it came";
constexpr const char *where_all = "manifest.json";
constexpr std::int64_t newest_schema = 4, context_since = 4;
constexpr std::size_t most_plans = 256, most_missed = 16, longest_words = 400;
const std::string tail_head = ",\n  \"sha256\": \"", tail_end = "\"\n}\n";

// Lower case, no `..`, no hidden file, nothing that means different things on different systems.
bool is_path(const std::string &path) {
    std::size_t parts = 1, length = 0;
    for (char c : path) {
        bool plain = (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9');
        if (c == '/') {
            if (length == 0 || ++parts > 8) return false;
            length = 0;
        } else if ((!plain && (length == 0 || std::string("._+-").find(c) == std::string::npos)) || ++length > 128) {
            return false;
        }
    }
    return length > 0;
}

bool is_absolute(const std::string &path) {
    bool drive = path.size() > 2 && path[1] == ':' && (path[2] == '/' || path[2] == '\\');
    return path.rfind("/", 0) == 0 || path.rfind("\\\\", 0) == 0 || drive;
}

bool is_graph_file(const std::string &name, const std::string &graph) {
    return name == graph || name.rfind(graph + ".", 0) == 0;
}

std::string names(const std::set<Tower> &towers) { // sorted by name: image, text
    std::vector<std::string> found;
    if (towers.count(Tower::image)) found.push_back("image");
    if (towers.count(Tower::text)) found.push_back("text");
    return found.empty() ? "no tower" : joined(found, " and ");
}

std::string listed(const std::vector<std::string> &words) {
    std::vector<std::string> quoted;
    for (const std::string &word : words) quoted.push_back(repr(word));
    return "[" + joined(quoted) + "]";
}

Graph graph(const Json &data, const std::string &where) {
    Fields fields(data, where, {"file", "opset", "inputs", "outputs", "?sequence_dynamic"});
    Graph graph{fields.text("file"), fields.integer("opset"), fields.texts("inputs"), fields.texts("outputs"),
                fields.has("sequence_dynamic") && fields.flag("sequence_dynamic")};
    require(graph.opset > 0, graph.file + ": opset must be positive, found " + std::to_string(graph.opset));
    auto check = [&](const char *kind, const std::vector<std::string> &found) {
        std::set<std::string> distinct(found.begin(), found.end());
        require(!found.empty() && distinct.size() == found.size() && !distinct.count(""),
                graph.file + ": " + kind + " must be distinct names, found " + listed(found));
    };
    check("inputs", graph.inputs);
    check("outputs", graph.outputs);
    return graph;
}

std::map<std::string, std::string> string_map(const Fields &fields, const char *key) {
    std::map<std::string, std::string> found;
    for (const auto &[name, value] : object_of(fields.at(key), fields.where(key)).items()) {
        found[name] = text_of(value, fields.where(key) + "." + name);
    }
    return found;
}

std::map<std::string, std::string> provenance_versions(const Json &data, const std::string &where) {
    Fields fields(data, where, {"format", "name", "files", "versions", "options"});
    std::string name = fields.text("name");
    fields.text("format");
    require(is_printable(name), "provenance.name must be printable, found " + repr(name));
    std::map<std::string, std::string> files = string_map(fields, "files");
    std::string absolute = "provenance must not name a place on one machine, found ";
    require(!is_absolute(name), absolute + repr(name));
    for (const auto &[path, digest] : files) {
        require(!is_absolute(path), absolute + repr(path));
        require(is_sha256(digest), "provenance.files." + path + ": " + repr(digest) + " is not a sha256");
    }
    string_map(fields, "options");
    return string_map(fields, "versions");
}

Contract contract(const Json &data, const std::string &where) {
    Fields fields(data, where, {"min_cosine", "?max_recall_drop", "missed"});
    Contract contract;
    contract.min_cosine = fields.number("min_cosine");
    contract.missed = fields.texts("missed");
    if (!fields.is_null("max_recall_drop")) contract.max_recall_drop = fields.number("max_recall_drop");
    require(-1 <= contract.min_cosine && contract.min_cosine <= 1,
            "a contract cannot ask for a cosine of " + repr(fields.at("min_cosine")));
    double drop = contract.max_recall_drop.value_or(0);
    require(0 <= drop && drop <= 100, "a contract cannot allow R@1 to drop by " + Json(drop).dump() + " points");
    require(contract.missed.size() <= most_missed, "missed: at most " + std::to_string(most_missed) + ", found " +
                                                       std::to_string(contract.missed.size()));
    for (const std::string &words : contract.missed) {
        bool blank = words.find_first_not_of(' ') == std::string::npos;
        require(is_printable(words) && !blank && words.size() <= 4 * longest_words,
                "missed: expected 1 to " + std::to_string(longest_words) + " printable characters, found " + repr(words));
    }
    return contract;
}

FileEntry file_entry(const Json &data, const std::string &where) {
    Fields fields(data, where, {"sha256", "size"});
    FileEntry entry{fields.text("sha256"), fields.integer("size")};
    require(is_sha256(entry.sha256), repr(entry.sha256) + " is not a sha256 in lower-case hex");
    require(entry.size >= 0, "a file cannot have " + std::to_string(entry.size) + " bytes");
    return entry;
}

void check_files(const Manifest &manifest) {
    for (const auto &[path, entry] : manifest.files) {
        require(is_path(path) && path != where_all, "files: " + repr(path) + " is not a path that a bundle may hold");
    }
    std::set<std::string> needed = {"golden.safetensors", "report.json"};
    if (manifest.spec.text) needed.insert("tokenizer.json");
    if (manifest.spec.context && manifest.spec.context->second) needed.insert("text_2/manifest.json");
    for (const auto &[precision, graphs] : manifest.variants) {
        for (const auto &[tower, its_graph] : graphs) needed.insert(its_graph.file);
    }
    std::vector<std::string> missing;
    for (const std::string &name : needed) {
        if (!manifest.files.count(name)) missing.push_back(repr(name));
    }
    require(missing.empty(), "files: " + joined(missing) + " should be listed and is not");
}

void check_variants(const Manifest &manifest) {
    std::set<Tower> covered, wanted;
    for (const auto &[precision, graphs] : manifest.variants) {
        for (const auto &[tower, its_graph] : graphs) covered.insert(tower);
    }
    for (Tower tower : manifest.spec.towers()) wanted.insert(tower);
    require(covered == wanted, "variants hold " + names(covered) + ", the spec has " + names(wanted));
    std::vector<std::string> unknown;
    for (const auto &[precision, its_contract] : manifest.contracts) {
        if (!manifest.variant(precision)) unknown.push_back(repr(precision));
    }
    require(unknown.empty(), "contracts: " + joined(unknown) + " is none of the variants");
    bool causal = manifest.spec.text && manifest.spec.text->causal;
    for (const auto &[precision, graphs] : manifest.variants) {
        bool named = !precision.empty() && std::all_of(precision.begin(), precision.end(), [](char c) {
            return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9');
        });
        require(named, "variants: " + repr(precision) + " is not a precision");
        require(!graphs.empty(), "variants." + precision + ": holds no graph");
        for (const auto &[tower, its_graph] : graphs) {
            require((tower == Tower::text && causal) || !its_graph.sequence_dynamic,
                    its_graph.file + ": only a causal text tower may have a dynamic sequence");
        }
    }
}

void check_names(const Plan &plan, const Graph &its_graph) {
    std::vector<std::string> found, inputs = its_graph.inputs, normalized = its_graph.outputs;
    for (const auto &entry : plan.profiles[0]) found.push_back(entry.first);
    std::sort(inputs.begin(), inputs.end());
    require(found == inputs,
            plan.file + ": profiles name " + listed(found) + ", the graph takes " + listed(its_graph.inputs));
    normalized.push_back("normalized");
    require(plan.outputs == its_graph.outputs || plan.outputs == normalized,
            plan.file + ": outputs are " + listed(plan.outputs) + ", those of the graph are " + listed(its_graph.outputs));
}

void check_plan(const Manifest &manifest, const Plan &plan, const std::string &inspector) {
    for (const std::string &path : {plan.file, inspector}) {
        bool listed_there = path.empty() || manifest.files.count(path);
        require(listed_there, "files: " + repr(path) + " should be listed and is not");
    }
    const std::map<Tower, Graph> *variant = manifest.variant(plan.precision);
    std::string tower = name_of(plan.tower);
    require(variant && variant->count(plan.tower),
            plan.file + ": variants hold no " + plan.precision + " " + tower + " graph");
    const Graph *its_graph = nullptr;
    for (const auto &[precision, graphs] : manifest.variants) {
        auto found = graphs.find(plan.tower);
        if (found != graphs.end() && found->second.file == plan.graph) its_graph = &found->second;
    }
    require(its_graph, plan.file + ": " + repr(plan.graph) + " is no " + tower + " graph of the variants");
    check_names(plan, *its_graph);
}

void read_plans(const Json &list, const std::string &where, Manifest &manifest) {
    require(list.size() <= most_plans,
            "plans: at most " + std::to_string(most_plans) + ", found " + std::to_string(list.size()));
    std::set<std::string> seen;
    for (const Json &item : list) {
        std::string inspector, place = where + "[" + std::to_string(manifest.plans.size()) + "]";
        Plan plan = plan_from_json(item, place, inspector);
        require(seen.insert(plan.file).second, "plans: " + repr(plan.file) + " is listed twice");
        check_plan(manifest, plan, inspector);
        manifest.plans.push_back(std::move(plan));
    }
}

// A schema has all of its keys and none of a later one: a manifest that mixes them was written by nobody.
void check_keys(const Json &plain, std::int64_t version) {
    const std::pair<const char *, std::int64_t> since[] = {{"plans", 2}, {"contracts", 3}};
    for (const auto &[key, brought_by] : since) {
        std::string name = key;
        require(plain.contains(name) || version < brought_by, std::string(where_all) + ": missing key " + name);
        require(!plain.contains(name) || version >= brought_by,
                std::string(where_all) + ": unknown key " + name + ", which schema " + std::to_string(version) + " has not");
    }
    auto spec = plain.find("spec");
    if (spec == plain.end() || !spec->is_object()) return; // said later, by who reads it
    bool held = spec->contains("context");
    require(held || version < context_since, std::string(where_all) + ": missing key spec.context");
    require(!held || version >= context_since,
            std::string(where_all) + ": unknown key spec.context, which schema " + std::to_string(version) + " has not");
}

// The Pillow that the build had is the one whose pixels the golden samples hold.
void set_pillow(Manifest &manifest) {
    auto version = manifest.versions.find("pillow");
    if (!manifest.spec.preprocess || version == manifest.versions.end()) return;
    int major = 0;
    for (char c : version->second.substr(0, 4)) {
        if (c < '0' || c > '9') break;
        major = 10 * major + (c - '0');
    }
    if (major > 0) manifest.spec.preprocess->pillow = major;
}

Manifest manifest_from(const Json &plain, std::int64_t version) {
    check_keys(plain, version);
    Fields fields(plain, where_all,
                  {"schema_version", "name", "spec", "provenance", "variants", "?contracts", "?plans", "files"});
    Manifest manifest;
    manifest.schema_version = version;
    manifest.name = fields.text("name");
    manifest.spec = spec_from_json(fields.at("spec"), fields.where("spec"));
    manifest.versions = provenance_versions(fields.at("provenance"), fields.where("provenance"));
    set_pillow(manifest);
    for (const auto &[precision, towers] : object_of(fields.at("variants"), fields.where("variants")).items()) {
        std::map<Tower, Graph> graphs;
        std::string place = fields.where("variants") + "." + precision;
        for (const auto &[tower, data] : object_of(towers, place).items()) {
            require(tower == "text" || tower == "image", place + ": " + repr(tower) + " is not one of text, image");
            graphs[tower == "text" ? Tower::text : Tower::image] = graph(data, place + "." + tower);
        }
        manifest.variants.emplace_back(precision, std::move(graphs));
    }
    if (fields.has("contracts")) {
        for (const auto &[precision, data] : object_of(fields.at("contracts"), fields.where("contracts")).items()) {
            manifest.contracts[precision] = contract(data, fields.where("contracts") + "." + precision);
        }
    }
    for (const auto &[path, data] : object_of(fields.at("files"), fields.where("files")).items()) {
        manifest.files[path] = file_entry(data, fields.where("files") + "." + path);
    }
    require(is_printable(manifest.name) && !manifest.name.empty(), "name must be printable, found " + repr(manifest.name));
    check_files(manifest);
    check_variants(manifest);
    if (fields.has("plans")) read_plans(list_of(fields.at("plans"), fields.where("plans")), fields.where("plans"), manifest);
    return manifest;
}

std::int64_t checked_version(const Json &plain) {
    auto found = plain.find("schema_version");
    bool whole = found != plain.end() && found->is_number_integer();
    if (!whole || found->get<std::int64_t>() < 1) {
        std::string shown = found == plain.end() ? "None" : repr(*found);
        throw BundleSchemaError(printable(std::string(where_all) + ": expected a schema_version of 1 or more, found " + shown),
                                "this is not the manifest of a bundle");
    }
    auto version = found->get<std::int64_t>();
    if (version > newest_schema) {
        throw BundleSchemaError("schema " + std::to_string(version) + " was written by a newer clip-export; this one reads up to " +
                                    std::to_string(newest_schema),
                                "update clip-export: pull its repository, and install from it again");
    }
    return version;
}

void check_digest(const std::string &bytes) {
    std::size_t length = tail_head.size() + 64 + tail_end.size();
    bool whole = bytes.size() >= length && bytes.compare(bytes.size() - length, tail_head.size(), tail_head) == 0 &&
                 bytes.compare(bytes.size() - tail_end.size(), tail_end.size(), tail_end) == 0;
    std::string expected = whole ? bytes.substr(bytes.size() - tail_end.size() - 64, 64) : "";
    if (!is_sha256(expected)) {
        throw BundleSchemaError(std::string(where_all) + ": expected it to end with its own \"sha256\"", rebuild);
    }
    std::string found = sha256_hex(std::string_view(bytes).substr(0, bytes.size() - length));
    if (found != expected) {
        throw BundleIntegrityError(std::string(where_all) + " was changed after it was written: expected sha256 " + expected +
                                       ", found " + found,
                                   rebuild);
    }
}

} // namespace

const std::map<Tower, Graph> *Manifest::variant(const std::string &precision) const {
    for (const auto &entry : variants) {
        if (entry.first == precision) return &entry.second;
    }
    return nullptr;
}

std::string Manifest::graph_sha256(const std::string &graph) const {
    std::string lines;
    for (const auto &[file, entry] : files) {
        if (is_graph_file(file, graph)) lines += entry.sha256 + "  " + file + "\n";
    }
    return sha256_hex(lines);
}

Manifest parse_manifest(const std::string &bytes) {
    Json plain;
    try {
        plain = parse_json(bytes, true);
    } catch (const JsonError &error) {
        throw BundleSchemaError(printable(std::string(where_all) + " is not valid JSON: " + error.what()), rebuild);
    }
    try {
        object_of(plain, where_all);
        std::int64_t version = checked_version(plain);
        check_digest(bytes);
        plain.erase("sha256");
        return manifest_from(plain, version);
    } catch (const SpecError &error) {
        throw BundleSchemaError(printable(error.message()), rebuild);
    }
}

} // namespace clip_export
