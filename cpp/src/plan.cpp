#include <algorithm>
#include <regex>

#include "fields.hpp"
#include "plan_json.hpp"

namespace clip_export {
namespace {

// Far beyond any real plan, and small enough that arithmetic on a hostile one stays harmless: clip_export/plans.py.
constexpr std::size_t most_profiles = 64, most_axes = 8, longest_text = 128;
constexpr std::int64_t largest_axis = INT32_MAX;
constexpr double most_elements = 1099511627776.0, most_bytes = 281474976710656.0, most_seconds = 1e9;

struct Option {
    const char *name, *values; // a regular expression
};
constexpr Option known_options[] = {{"attention", "operator|primitive"},
                                    {"hardware_compatibility", "ampere_plus|same_compute_capability"},
                                    {"optimization_level", "[0-5]"},
                                    {"refit", "true"},
                                    {"strip_weights", "true"},
                                    {"tf32", "true"},
                                    {"version_compatible", "true"},
                                    {"workspace_mib", "[1-9][0-9]{0,8}"}};

bool matches(const std::string &text, const char *pattern) {
    return text.size() <= longest_text && std::regex_match(text, std::regex(pattern));
}

std::string listed(const Shape &shape) {
    std::vector<std::string> sizes;
    for (std::int64_t size : shape) sizes.push_back(std::to_string(size));
    return "[" + joined(sizes) + "]";
}

ShapeRange range(const Json &data, const std::string &where) {
    Fields fields(data, where, {"min", "opt", "max"});
    ShapeRange found{fields.integers("min"), fields.integers("opt"), fields.integers("max")};
    bool alike = found.min.size() == found.opt.size() && found.opt.size() == found.max.size();
    require(alike, "expected min, opt and max with as many axes each, found [" + std::to_string(found.min.size()) + ", " +
                       std::to_string(found.opt.size()) + ", " + std::to_string(found.max.size()) + "]");
    for (std::size_t axis = 0; axis < found.min.size(); ++axis) {
        bool rising = 0 < found.min[axis] && found.min[axis] <= found.opt[axis] && found.opt[axis] <= found.max[axis];
        require(rising, "expected positive sizes with min <= opt <= max on every axis, found " + listed(found.min) + ", " +
                            listed(found.opt) + ", " + listed(found.max));
    }
    return found;
}

void check_place(const Plan &plan, const std::string &inspector) {
    std::string tower = name_of(plan.tower);
    std::size_t slash = plan.file.rfind('/');
    std::string folder = slash == std::string::npos ? "" : plan.file.substr(0, slash);
    bool placed = folder.rfind("plans/", 0) == 0 && std::count(folder.begin(), folder.end(), '/') == 1 &&
                  plan.file.substr(slash + 1) == tower + ".plan";
    require(placed, repr(plan.file) + " is not the place of a plan: expected plans/FOLDER/" + tower + ".plan");
    bool beside = inspector.empty() || (inspector.rfind(folder + "/", 0) == 0 &&
                                        inspector.find('/', folder.size() + 1) == std::string::npos &&
                                        inspector.size() > 5 && inspector.substr(inspector.size() - 5) == ".json");
    require(beside, plan.file + ": expected the JSON of its inspector beside it, found " + repr(inspector));
}

void check_options(const Plan &plan) {
    std::vector<std::string> names;
    for (const Option &option : known_options) names.push_back(option.name);
    for (const auto &[name, value] : plan.options) {
        auto known = std::find(names.begin(), names.end(), name);
        require(known != names.end(), plan.file + ": unknown option " + name + " (known: " + joined(names) + ")");
        bool allowed = matches(value, known_options[known - names.begin()].values);
        require(allowed, plan.file + ": option " + name + " cannot be " + repr(value.substr(0, longest_text)));
    }
}

void check_profiles(const Plan &plan) {
    std::size_t count = plan.profiles.size();
    require(count >= 1 && count <= most_profiles,
            plan.file + ": expected 1 to " + std::to_string(most_profiles) + " profiles, found " + std::to_string(count));
    for (const Profile &profile : plan.profiles) {
        std::vector<std::string> names, first;
        for (const auto &entry : profile) names.push_back(repr(entry.first));
        for (const auto &entry : plan.profiles[0]) first.push_back(repr(entry.first));
        require(names == first && !names.empty(),
                plan.file + ": every profile needs the same inputs, found [" + joined(names) + "]");
        for (const auto &[name, shapes] : profile) {
            std::size_t axes = shapes.max.size();
            require(axes >= 1 && axes <= most_axes, plan.file + ": " + name + " has " + std::to_string(axes) + " axes");
            double elements = 1;
            bool small = true;
            for (std::int64_t size : shapes.max) {
                elements *= static_cast<double>(size);
                small = small && size <= largest_axis;
            }
            require(small && elements <= most_elements, plan.file + ": " + name + " cannot be as large as " + listed(shapes.max));
        }
    }
}

void check_findings(const Plan &plan, const Fields &fields) {
    double seconds = fields.number("seconds");
    require(0 <= seconds && seconds <= most_seconds,
            plan.file + ": building cannot take " + repr(fields.at("seconds")) + " seconds");
    auto memory = static_cast<double>(fields.integer("peak_memory_mib"));
    require(0 <= memory && memory * 1048576 <= most_bytes,
            plan.file + ": building cannot take " + repr(fields.at("peak_memory_mib")) + " MiB");
    if (!fields.is_null("attention")) fields.choice("attention", {"operator", "inspector"});
    for (const char *name : {"gpu", "driver", "cuda"}) {
        std::string text = fields.is_null(name) ? "" : fields.text(name);
        require(is_printable(text) && text.size() <= 4 * longest_text,
                plan.file + ": " + name + " must be short and printable");
    }
    if (fields.is_null("activation_bytes")) return;
    std::vector<std::int64_t> sizes = fields.integers("activation_bytes");
    std::string found = plan.file + ": expected activation_bytes for each of " + std::to_string(plan.profiles.size()) + " profiles";
    require(sizes.size() == plan.profiles.size(), found + ", found " + std::to_string(sizes.size()));
    for (std::int64_t size : sizes) {
        require(0 <= size && static_cast<double>(size) <= most_bytes, found + ", found " + listed(sizes));
    }
}

} // namespace

bool is_sha256(const std::string &text) {
    return text.size() == 64 && text.find_first_not_of("0123456789abcdef") == std::string::npos;
}

Plan plan_from_json(const Json &data, const std::string &where, std::string &inspector) {
    Fields fields(data, where,
                  {"file", "tower", "backend", "version", "compute_capability", "precision", "graph", "graph_sha256",
                   "profiles", "outputs", "options", "seconds", "peak_memory_mib", "?attention", "?gpu", "?driver", "?cuda",
                   "?activation_bytes", "?inspector"});
    Plan plan;
    plan.file = fields.text("file");
    plan.tower = Tower(fields.choice("tower", {"text", "image"}));
    fields.choice("backend", {"tensorrt", "tensorrt-rtx"});
    plan.backend = fields.text("backend");
    plan.version = fields.text("version");
    plan.compute_capability = fields.text("compute_capability");
    plan.precision = fields.text("precision");
    plan.graph = fields.text("graph");
    plan.graph_sha256 = fields.text("graph_sha256");
    for (const Json &item : list_of(fields.at("profiles"), fields.where("profiles"))) {
        std::string place = fields.where("profiles") + "[" + std::to_string(plan.profiles.size()) + "]";
        Profile profile;
        for (const auto &[name, shapes] : object_of(item, place).items()) profile[name] = range(shapes, place + "." + name);
        plan.profiles.push_back(std::move(profile));
    }
    plan.outputs = fields.texts("outputs");
    for (const auto &[name, value] : object_of(fields.at("options"), fields.where("options")).items()) {
        plan.options[name] = text_of(value, fields.where("options") + "." + name);
    }
    inspector = fields.is_null("inspector") ? "" : fields.text("inspector");
    check_place(plan, inspector);
    auto check = [&](const char *name, const std::string &value, bool allowed) {
        require(allowed, plan.file + ": " + repr(value.substr(0, longest_text)) + " is not a " + name);
    };
    check("version", plan.version, matches(plan.version, "[0-9][0-9A-Za-z.+_-]{0,63}"));
    check("compute_capability", plan.compute_capability, matches(plan.compute_capability, "sm_[1-9][0-9]{1,2}|portable"));
    check("graph_sha256", plan.graph_sha256, is_sha256(plan.graph_sha256));
    check_options(plan);
    check_profiles(plan);
    check_findings(plan, fields);
    return plan;
}

} // namespace clip_export
