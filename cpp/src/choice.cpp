#include "choice.hpp"

#include <algorithm>

#include "sentences.hpp"

namespace clip_export {
namespace {

constexpr const char *fp32 = "fp32";
constexpr const char *cpu_int8 = "int8cpu"; // the one precision besides fp32 whose graphs a CPU runs as they are
constexpr std::size_t runs_at_once = 4;     // batches of a plan in one call

std::optional<std::string> wanted_precision(const Options &options) {
    return options.precision.empty() ? std::nullopt : std::optional<std::string>(options.precision);
}

Choice of_plans(const Bundle &bundle, const Backend &backend, const Options &options) {
    Choice choice;
    choice.backend = &backend;
    choice.device = options.device.empty() ? "cuda:0" : options.device;
    Gpu gpu = backend.gpu(choice.device);
    Machine machine{backend.name, backend.version(), gpu.compute_capability, gpu.free_bytes, options.allow_host_code};
    Selection selection = bundle.select_plans(machine, wanted_precision(options));
    if (selection.chosen.empty()) throw explain(selection, bundle.path().string());
    choice.plans = selection.chosen;
    std::int64_t largest = 1;
    std::vector<std::string> titles;
    for (const auto &[tower, plan] : choice.plans) {
        choice.precision = plan.precision;
        std::string title = plan.backend + " " + plan.version + ", " + plan.compute_capability;
        if (std::find(titles.begin(), titles.end(), title) == titles.end()) titles.push_back(title);
        for (const Profile &profile : plan.profiles) {
            for (const auto &[name, shapes] : profile) largest = std::max(largest, shapes.max[0]);
        }
    }
    choice.batch_size = runs_at_once * static_cast<std::size_t>(largest);
    choice.title = joined(titles, " and ");
    return choice;
}

Choice of_graphs(const Backend &backend, const Options &options) {
    Choice choice;
    choice.backend = &backend;
    choice.device = options.device.empty() ? "cpu" : options.device;
    choice.precision = options.precision.empty() ? fp32 : options.precision;
    bool cpu = device_index(choice.device) < 0;
    if (choice.precision == cpu_int8 && !cpu) {
        throw BackendError(std::string(cpu_int8) + " graphs are for CPUs, not for " + choice.device, "plans of int8 are for GPUs");
    }
    if (choice.precision != fp32 && choice.precision != cpu_int8 && cpu) {
        throw BackendError(choice.precision + " graphs are for GPUs: a CPU computes them in fp32 and hides every overflow",
                           "leave out the precision, or use device cuda:0; clip-export verify simulates them honestly");
    }
    choice.title = std::string(backend.name) + ", " + choice.device;
    return choice;
}

// The plans of the first compiler that is compiled in, works here and has some that fit; reasons where there are none.
std::optional<Choice> best_plans(const Bundle &bundle, const Options &options, std::vector<std::string> &reasons) {
    for (const Backend &backend : compiled_in()) {
        bool held = std::any_of(bundle.manifest().plans.begin(), bundle.manifest().plans.end(),
                                [&](const Plan &plan) { return plan.backend == backend.name; });
        if (!backend.runs_plans || !held || options.device == "cpu") continue;
        try {
            return of_plans(bundle, backend, options);
        } catch (const NoPlanError &error) { // there is a GPU, which whoever has one may wonder about
            reasons.push_back(error.what());
            options.warn("no plan runs here: " + std::string(error.what()));
        } catch (const Error &error) {
            reasons.push_back(std::string(backend.name) + ": " + error.message());
        }
    }
    return std::nullopt;
}

} // namespace

Choice choose(const Bundle &bundle, const Options &options) {
    const Manifest &manifest = bundle.manifest();
    if (!options.precision.empty() && !manifest.variant(options.precision) && !manifest.variant(options.precision + "all")) {
        std::vector<std::string> held;
        for (const auto &entry : manifest.variants) held.push_back(entry.first);
        throw BundleError(bundle.path().string() + " holds no " + options.precision + " graphs, only " + joined(held),
                          "choose one of these");
    }
    if (!options.backend.empty()) {
        const Backend &backend = backend_named(options.backend);
        return backend.runs_plans ? of_plans(bundle, backend, options) : of_graphs(backend, options);
    }
    std::vector<std::string> reasons;
    if (auto plans = best_plans(bundle, options, reasons)) return *plans;
    for (const Backend &backend : compiled_in()) {
        if (!backend.runs_plans) return of_graphs(backend, options);
    }
    reasons.push_back("no backend that runs graphs is compiled in");
    throw BackendError("no backend works here (" + joined(reasons, "; ") + ")",
                       "configure cpp/ with -DCLIP_EXPORT_OPENVINO=ON or -DCLIP_EXPORT_ONNXRUNTIME=ON");
}

} // namespace clip_export
