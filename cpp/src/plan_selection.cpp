#include "plan_selection.hpp"

#include <algorithm>
#include <tuple>

#include "sentences.hpp"

namespace clip_export {
namespace {

using Words = std::vector<std::string>;

const Words preference = {"fp16", "fp16all", "bf16", "fp32"};
const Words rtx_targets = {"sm_75", "sm_80", "sm_86", "sm_89", "sm_120", "sm_121"};
constexpr int ampere = 80; // portable plans of TensorRT-RTX and the level ampere_plus both begin there
constexpr std::size_t shown = 20;

bool has(const Words &words, const std::string &word) { return std::find(words.begin(), words.end(), word) != words.end(); }

// `10.13.3.9+cu12` as 10, 13, 3, 9.
std::vector<int> numbers(const std::string &version) {
    std::vector<int> found;
    for (std::size_t at = 0; at < version.size();) {
        std::size_t end = at;
        while (end < version.size() && end - at < 9 && version[end] >= '0' && version[end] <= '9') ++end;
        if (end == at) break;
        found.push_back(std::stoi(version.substr(at, end - at)));
        if (end == version.size() || version[end] != '.') break;
        at = end + 1;
    }
    return found.empty() ? std::vector<int>{0} : found;
}

int sm(const std::string &compute_capability) {
    std::size_t end = compute_capability.find_first_not_of("0123456789", 3);
    bool named = compute_capability.rfind("sm_", 0) == 0 && compute_capability.size() > 4;
    return named ? std::stoi(compute_capability.substr(3, std::min<std::size_t>(end == std::string::npos ? 3 : end - 3, 3))) : 0;
}

std::int64_t mib(std::int64_t bytes) { return (bytes + (1 << 20) - 1) >> 20; }

// TensorRT reads plans of its own version; version compatible ones of the major version before its own too.
void version_misfit(const Plan &plan, const Machine &machine, Words &reasons) {
    std::vector<int> built = numbers(plan.version), here = numbers(machine.version);
    if (built == here) return;
    std::string compiled = "compiled by " + plan.backend + " " + plan.version;
    if (!plan.options.count("version_compatible") || plan.backend == "tensorrt-rtx") {
        reasons.push_back(compiled + ", the version here is " + machine.version);
    } else if (built > here) {
        reasons.push_back(compiled + ", newer than " + machine.version + " here");
    } else if (here[0] > built[0] + 1) {
        reasons.push_back(compiled + ", which is too old even for a version compatible plan: the version here is " +
                          machine.version);
    }
}

void gpu_misfit(const Plan &plan, const Machine &machine, Words &reasons) {
    if (plan.compute_capability == machine.compute_capability) return;
    std::string here = "this GPU is " + machine.compute_capability;
    auto level = plan.options.find("hardware_compatibility");
    bool later_too = level != plan.options.end() && level->second == "ampere_plus";
    if (plan.compute_capability != "portable" && !later_too) {
        reasons.push_back("built for " + plan.compute_capability + ", " + here);
    } else if (sm(machine.compute_capability) < ampere) {
        reasons.push_back("built for sm_" + std::to_string(ampere) + " and later, " + here);
    }
}

// Every reason why `plan` cannot be taken, none where it fits.
Words misfits(const Plan &plan, const Manifest &manifest, const Machine &machine, const std::optional<std::string> &precision) {
    if (plan.backend != machine.backend) return {"compiled by " + plan.backend + ", not by " + machine.backend};
    Words reasons;
    if (precision && plan.precision != *precision && plan.precision != *precision + "all") {
        reasons.push_back("its precision is " + plan.precision + ", asked for is " + *precision);
    }
    if (!precision && !has(preference, plan.precision)) {
        reasons.push_back("its precision " + plan.precision + " is taken only where it is asked for");
    }
    version_misfit(plan, machine, reasons);
    gpu_misfit(plan, machine, reasons);
    if (plan.options.count("version_compatible") && !machine.host_code) {
        reasons.push_back("version compatible, so it carries code, and EngineOptions(allow_host_code=True) was not given");
    }
    if (manifest.graph_sha256(plan.graph) != plan.graph_sha256) {
        reasons.push_back("compiled from an earlier " + plan.graph + ", which has changed since");
    }
    std::int64_t size = manifest.files.at(plan.file).size;
    if (machine.free_bytes && size > *machine.free_bytes) {
        reasons.push_back("its weights take " + std::to_string(mib(size)) + " MiB of GPU memory, " +
                          std::to_string(*machine.free_bytes >> 20) + " MiB are free");
    }
    return reasons;
}

// What makes one of two fitting plans the better one, most important first: higher is better.
using Merits = std::tuple<int, std::vector<int>, std::size_t, std::string>;

Merits merits(const Plan &plan, const Machine &machine) {
    bool exact = plan.compute_capability == machine.compute_capability;
    int tuned = exact + (exact && !plan.options.count("hardware_compatibility")); // compatible kernels are slower
    return {tuned, numbers(plan.version), plan.profiles.size(), plan.file};
}

Words preferred(const std::vector<const Plan *> &plans) {
    Words found;
    for (const Plan *plan : plans) {
        if (!has(found, plan->precision)) found.push_back(plan->precision);
    }
    auto rank = [](const std::string &precision) {
        return std::pair{std::find(preference.begin(), preference.end(), precision) - preference.begin(), precision};
    };
    std::sort(found.begin(), found.end(), [&](const auto &a, const auto &b) { return rank(a) < rank(b); });
    return found;
}

// The best plan of each tower, in the first precision that all towers have: half of a pair has no meaning.
std::map<Tower, Plan> best(const std::vector<const Plan *> &fitting, const Machine &machine, const std::vector<Tower> &towers) {
    for (const std::string &precision : preferred(fitting)) {
        std::map<Tower, Plan> chosen;
        for (const Plan *plan : fitting) {
            if (plan->precision != precision) continue;
            auto [place, is_new] = chosen.emplace(plan->tower, *plan);
            if (!is_new && merits(place->second, machine) < merits(*plan, machine)) place->second = *plan;
        }
        if (chosen.size() == towers.size()) return chosen;
    }
    return {};
}

// Why a plan that fits was not chosen.
std::string outdone(const Plan &plan, const std::vector<const Plan *> &fitting, const Selection &selection) {
    Words alone;
    for (Tower tower : selection.towers) {
        bool there = std::any_of(fitting.begin(), fitting.end(), [&](const Plan *other) {
            return other->tower == tower && other->precision == plan.precision;
        });
        if (!there) alone.push_back(name_of(tower));
    }
    if (!alone.empty()) return "fits, but no " + plan.precision + " plan of the " + joined(alone, " and ") + " tower does";
    const Plan &better = selection.chosen.at(plan.tower);
    if (better.precision != plan.precision) return "fits, but " + better.precision + " is preferred to " + plan.precision;
    Merits its = merits(better, selection.machine), mine = merits(plan, selection.machine);
    const char *why = std::get<0>(its) != std::get<0>(mine)   ? "is built for this GPU alone"
                      : std::get<1>(its) != std::get<1>(mine) ? "is of a newer version"
                      : std::get<2>(its) != std::get<2>(mine) ? "has more profiles"
                                                              : "comes later by name";
    return "fits, but " + better.file + " " + why;
}

} // namespace

Selection select(const Manifest &manifest, const Machine &machine, const std::optional<std::string> &precision) {
    Selection selection{machine, manifest.spec.towers(), precision, {}, {}};
    std::map<std::string, Words> reasons;
    std::vector<const Plan *> fitting;
    for (const Plan &plan : manifest.plans) {
        reasons[plan.file] = misfits(plan, manifest, machine, precision);
        if (reasons[plan.file].empty()) fitting.push_back(&plan);
    }
    selection.chosen = best(fitting, machine, selection.towers);
    for (const Plan &plan : manifest.plans) {
        auto chosen = selection.chosen.find(plan.tower);
        if (chosen != selection.chosen.end() && chosen->second.file == plan.file) continue;
        std::string why = joined(reasons[plan.file], "; ");
        selection.passed_over.emplace_back(plan, why.empty() ? outdone(plan, fitting, selection) : why);
    }
    return selection;
}

NoPlanError explain(const Selection &selection, const std::string &bundle) {
    const Machine &machine = selection.machine;
    std::string place = machine.backend + " " + machine.version + " on " + machine.compute_capability;
    Words towers;
    for (Tower tower : selection.towers) towers.push_back(name_of(tower));
    std::string named = joined(towers, " and "), message = "the bundle holds no plan for " + named + "; " + place + " needs one";
    if (!selection.passed_over.empty()) {
        message = "no plan of the bundle fits " + place + ", for " + named + ":";
        std::size_t count = selection.passed_over.size();
        for (std::size_t i = 0; i < std::min(count, shown); ++i) {
            message += "\n  " + selection.passed_over[i].first.file + ": " + selection.passed_over[i].second;
        }
        if (count > shown) message += "\n  and " + std::to_string(count - shown) + " more";
    }
    std::string target = has(rtx_targets, machine.compute_capability) ? machine.compute_capability : "portable";
    std::string gpu = machine.backend == "tensorrt-rtx" ? " --gpu " + target : "";
    return NoPlanError(message, "build one with: clip-export build " + bundle + " --engine " + machine.backend + gpu +
                                    " --precision " + selection.precision.value_or(preference[0]));
}

} // namespace clip_export
