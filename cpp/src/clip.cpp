#include <clip_export/clip.hpp>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdio>
#include <numeric>

#include "choice.hpp"
#include "engine.hpp"
#include "sentences.hpp"
#include "golden.hpp"

namespace clip_export {
namespace {

constexpr int plan_trim_step = 8; // tokens: plans meet few lengths, and tensor cores like multiples of 8
constexpr const char *rebuild = "build the bundle again, or copy it again from where it came";

void to_stderr(const std::string &message) { std::fprintf(stderr, "warning: %s\n", message.c_str()); }

InputError no_tower(Tower tower) {
    return InputError(std::string("this bundle has no ") + name_of(tower) + " tower",
                      std::string("build it again with --towers ") + name_of(tower));
}

// Rows divided by their length; the sum of squares in double, so that no range is lost.
void normalize_rows(std::vector<float> &rows, std::size_t dim) {
    for (std::size_t start = 0; dim && start < rows.size(); start += dim) {
        double sum = 0;
        for (std::size_t i = start; i < start + dim; ++i) sum += static_cast<double>(rows[i]) * rows[i];
        double length = std::max(std::sqrt(sum), static_cast<double>(FLT_MIN));
        for (std::size_t i = start; i < start + dim; ++i) rows[i] = static_cast<float>(rows[i] / length);
    }
}

void check_options(const Options &options) {
    if (options.threads < 0 || options.threads > 1024) {
        throw InputError("expected threads from 1 to 1024, found " + std::to_string(options.threads),
                         "leave it out for all cores");
    }
    if (options.batch_size < 0) {
        throw InputError("expected a batch size of at least 1, found " + std::to_string(options.batch_size), "32 is the default");
    }
    if (options.max_contexts < 1) {
        throw InputError("expected max_contexts of at least 1, found " + std::to_string(options.max_contexts));
    }
}

} // namespace

struct Clip::Parts {
    Options options;
    Bundle bundle;
    Choice choice;
    std::optional<Tokenizer> tokenizer;
    std::optional<Preprocessor> preprocessor;
    std::map<Tower, std::unique_ptr<Engine>> engines;
    std::size_t batch_size = 32;
    bool trim = false;

    const Engine &engine(Tower tower) const {
        auto found = engines.find(tower);
        if (found == engines.end()) throw no_tower(tower);
        return *found->second;
    }

    void open_towers();
    void check_golden() const;
    void check_width(const Engine &engine, Tower tower) const;
    void require_embedding(Tower tower) const;
    int length(const Tokens &tokens, const std::size_t *rows, std::size_t count) const;
    void run(Tower tower, const std::vector<Feed> &feeds, const std::size_t *rows, std::vector<float> &embeddings) const;
};

// A tokenizer that makes other ids than that of the build would change embeddings silently. Golden texts that look like
// mojibake are left out: this tokenizer refuses them.
void Clip::Parts::check_golden() const {
    std::string bytes = bundle.read("golden.safetensors");
    check_golden_shapes(bytes, bundle.manifest());
    if (!tokenizer) return;
    GoldenTexts golden = read_golden_texts(bytes, tokenizer->spec().context_length);
    TokenizerOptions strict;
    Tokenizer checking(tokenizer->spec(), bundle.tokenizer_json(), strict);
    for (std::size_t row = 0; row < golden.texts.size(); ++row) {
        Tokens tokens;
        try {
            tokens = checking({golden.texts[row]}, true);
        } catch (const TextError &) {
            continue;
        }
        auto expected = golden.input_ids.begin() + row * tokens.context_length;
        bool same = std::equal(tokens.input_ids.begin(), tokens.input_ids.end(), expected);
        if (!same || tokens.eot_index[0] != golden.eot_index[row]) {
            throw BundleError("the libraries installed here give other token ids than the build for the golden text " +
                                  repr(golden.texts[row]),
                              "use the clip_export in C++ of the version that built the bundle, or build it again");
        }
    }
}

void Clip::Parts::open_towers() {
    for (Tower tower : bundle.spec().towers()) {
        auto plan = choice.plans.find(tower);
        EngineRequest request;
        request.plan = plan == choice.plans.end() ? nullptr : &plan->second;
        request.path = request.plan ? bundle.path() / request.plan->file : bundle.graph_path(tower, choice.precision);
        request.device = choice.device;
        request.warn = options.warn;
        request.options = &options;
        auto engine = choice.backend->open(request);
        const Graph &graph = bundle.graph(tower, choice.precision);
        std::vector<std::string> given = engine->outputs(), wanted = graph.outputs;
        given.erase(std::remove(given.begin(), given.end(), "normalized"), given.end());
        std::sort(given.begin(), given.end());
        std::sort(wanted.begin(), wanted.end());
        if (given != wanted) {
            throw BundleIntegrityError(graph.file + " gives " + joined(engine->outputs()) + ", the manifest says " +
                                           joined(graph.outputs),
                                       rebuild);
        }
        check_width(*engine, tower);
        engines[tower] = std::move(engine);
    }
}

// Callers make room by the spec's embedding_dim, and an engine that writes on the GPU writes what it has.
void Clip::Parts::check_width(const Engine &engine, Tower tower) const {
    const auto &dim = tower == Tower::text ? bundle.spec().text->embedding_dim : bundle.spec().image->embedding_dim;
    for (const std::string &name : engine.outputs()) {
        if (name != "embedding" && name != "normalized") continue;
        Shape shape = engine.output_shape(name);
        bool fits = dim && (shape.empty() || (shape.size() == 2 && (shape[1] == *dim || shape[1] == -1)));
        if (fits) continue;
        throw BundleIntegrityError(std::string("the ") + name_of(tower) + " engine gives " + name + " " + text_of(shape) +
                                       ", the manifest says " + (dim ? "[-1, " + std::to_string(*dim) + "]" : "none"),
                                   rebuild);
    }
}

void Clip::Parts::require_embedding(Tower tower) const {
    std::vector<std::string> outputs = engine(tower).outputs();
    if (std::find(outputs.begin(), outputs.end(), "embedding") == outputs.end()) {
        throw InputError(std::string("the ") + name_of(tower) + " graph gives " + joined(outputs) + ", and no embedding",
                         "build the bundle again with --outputs embedding");
    }
}

// How much of the context the engine gets for some rows.
int Clip::Parts::length(const Tokens &tokens, const std::size_t *rows, std::size_t count) const {
    if (!trim) return tokens.context_length;
    int step = choice.plans.empty() ? 1 : plan_trim_step, longest = 0;
    for (std::size_t i = 0; i < count; ++i) longest = std::max(longest, tokens.eot_index[rows[i]] + 1);
    return std::min(tokens.context_length, (longest + step - 1) / step * step);
}

// Run one batch, and put its embeddings where `rows` says.
void Clip::Parts::run(Tower tower, const std::vector<Feed> &feeds, const std::size_t *rows, std::vector<float> &embeddings) const {
    std::map<std::string, Array> outputs = engine(tower).run(feeds);
    const Array &array = outputs.at("embedding");
    const auto &expected = tower == Tower::text ? bundle.spec().text->embedding_dim : bundle.spec().image->embedding_dim;
    std::size_t dim = expected.value_or(0), count = feeds[0].shape[0];
    if (array.values.size() != count * dim) {
        throw BackendError(std::string("the ") + name_of(tower) + " engine gives embedding " + text_of(array.shape) +
                           ", expected " + text_of(Shape{static_cast<std::int64_t>(count), static_cast<std::int64_t>(dim)}));
    }
    for (std::size_t i = 0; i < count; ++i) {
        std::copy_n(array.values.begin() + i * dim, dim, embeddings.begin() + rows[i] * dim);
    }
}

Clip::Clip(std::unique_ptr<Parts> parts) : parts_(std::move(parts)) {}
Clip::~Clip() = default;
Clip::Clip(Clip &&) noexcept = default;
Clip &Clip::operator=(Clip &&) noexcept = default;

Clip Clip::open(const std::filesystem::path &path, const Options &given) {
    check_options(given);
    Options options = given;
    if (!options.warn) options.warn = to_stderr;
    if (!options.backend.empty()) backend_named(options.backend); // before anything that takes long
    Bundle bundle = Bundle::open(path, options.check_files);
    if (bundle.spec().context) {
        throw BundleError(bundle.path().string() + " is a bundle of Context, which this C++ runtime does not compute",
                          "use it from Python: clip_export.load(BUNDLE).context(PROMPTS), or build one without --context");
    }
    Choice choice = choose(bundle, options);
    auto contract = bundle.manifest().contracts.find(choice.precision);
    if (contract != bundle.manifest().contracts.end() && !contract->second.missed.empty()) {
        options.warn(choice.precision + " of " + bundle.path().string() + " misses its accuracy contract: " +
                     joined(contract->second.missed, "; "));
    }
    auto parts = std::make_unique<Parts>(Parts{options, std::move(bundle), std::move(choice), {}, {}, {}, 32, false});
    const ModelSpec &spec = parts->bundle.spec();
    if (spec.tokenizer) {
        parts->tokenizer.emplace(*spec.tokenizer, parts->bundle.tokenizer_json(),
                                 TokenizerOptions{options.mojibake, options.warn});
        const Graph &graph = parts->bundle.graph(Tower::text, parts->choice.precision);
        // Trimming needs a graph with a dynamic sequence, and nobody who asks for the states of all positions.
        bool states = std::count(graph.outputs.begin(), graph.outputs.end(), "hidden_states") > 0;
        parts->trim = graph.sequence_dynamic && !states;
    }
    if (spec.preprocess) parts->preprocessor.emplace(*spec.preprocess);
    parts->check_golden();
    parts->open_towers();
    parts->batch_size = options.batch_size > 0 ? options.batch_size : parts->choice.batch_size;
    return Clip(std::move(parts));
}

std::vector<float> Clip::encode_text(const std::vector<std::string> &texts, bool normalize, std::optional<bool> truncate) const {
    const Parts &parts = *parts_;
    parts.require_embedding(Tower::text);
    Tokens tokens = (*parts.tokenizer)(texts, truncate);
    std::size_t dim = embedding_dim(Tower::text);
    std::vector<float> embeddings(texts.size() * dim);
    std::vector<std::size_t> order(texts.size()); // texts of like length together, so that little is padded
    std::iota(order.begin(), order.end(), 0);
    if (parts.trim) {
        std::stable_sort(order.begin(), order.end(),
                         [&](std::size_t a, std::size_t b) { return tokens.eot_index[a] < tokens.eot_index[b]; });
    }
    for (std::size_t start = 0; start < order.size(); start += parts.batch_size) {
        const std::size_t *rows = order.data() + start;
        std::size_t count = std::min(parts.batch_size, order.size() - start);
        int length = parts.length(tokens, rows, count);
        std::vector<std::int32_t> ids, ends;
        for (std::size_t i = 0; i < count; ++i) {
            ids.insert(ids.end(), tokens.row(rows[i]), tokens.row(rows[i]) + length);
            ends.push_back(tokens.eot_index[rows[i]]);
        }
        auto n = static_cast<std::int64_t>(count);
        parts.run(Tower::text, {{"input_ids", Dtype::int32, {n, length}, ids.data()}, {"eot_index", Dtype::int32, {n}, ends.data()}},
                  rows, embeddings);
    }
    if (normalize) normalize_rows(embeddings, dim);
    return embeddings;
}

std::vector<float> Clip::encode_images(const std::vector<ImageView> &images, bool normalize) const {
    const Parts &parts = *parts_;
    parts.require_embedding(Tower::image);
    std::size_t dim = embedding_dim(Tower::image);
    std::vector<float> embeddings;
    embeddings.reserve(images.size() * dim);
    for (std::size_t start = 0; start < images.size(); start += parts.batch_size) {
        std::size_t count = std::min(parts.batch_size, images.size() - start);
        std::vector<std::uint8_t> pixels(count * parts.preprocessor->size());
        for (std::size_t i = 0; i < count; ++i) {
            try {
                (*parts.preprocessor)(images[start + i], pixels.data() + i * parts.preprocessor->size());
            } catch (const ImageError &error) {
                throw ImageError("image " + std::to_string(start + i) + ": " + error.message(), error.hint());
            }
        }
        std::vector<float> some = encode_pixels(pixels.data(), count, normalize);
        embeddings.insert(embeddings.end(), some.begin(), some.end());
    }
    return embeddings;
}

std::vector<float> Clip::encode_image(const std::uint8_t *rgb, std::int64_t width, std::int64_t height, bool normalize) const {
    return encode_images({{rgb, width, height, 3, 0}}, normalize);
}

std::vector<float> Clip::encode_pixels(const std::uint8_t *pixels, std::size_t n, bool normalize) const {
    const Parts &parts = *parts_;
    parts.require_embedding(Tower::image);
    if (!pixels && n) throw ImageError("expected pixels, found a null pointer");
    std::size_t dim = embedding_dim(Tower::image);
    std::int64_t side = parts.preprocessor->spec().crop_size;
    std::vector<float> embeddings(n * dim);
    std::vector<std::size_t> rows(n);
    std::iota(rows.begin(), rows.end(), 0);
    for (std::size_t start = 0; start < n; start += parts.batch_size) {
        auto count = static_cast<std::int64_t>(std::min(parts.batch_size, n - start));
        parts.run(Tower::image, {{"pixels", Dtype::uint8, {count, 3, side, side}, pixels + start * parts.preprocessor->size()}},
                  rows.data() + start, embeddings);
    }
    if (normalize) normalize_rows(embeddings, dim);
    return embeddings;
}

void Clip::encode_image_device(const void *device_pixels, std::size_t n, void *stream, void *device_embeddings,
                               bool normalize) const {
    const Parts &parts = *parts_;
    const Engine &engine = parts.engine(Tower::image);
    std::vector<std::string> outputs = engine.outputs();
    std::string name = normalize ? "normalized" : "embedding";
    if (!engine.on_device()) {
        throw InputError("the engine of the image tower runs on the CPU and can neither take nor leave arrays on a GPU",
                         "load the bundle with backend tensorrt or tensorrt-rtx");
    }
    if (std::find(outputs.begin(), outputs.end(), name) == outputs.end()) {
        throw InputError("the image engine can leave " + joined(outputs) + " on the GPU, and not " + repr(name),
                         "pass normalize=False");
    }
    if (n == 0) throw InputError("expected at least one image for device_output, found none");
    if (!device_pixels || !device_embeddings) throw InputError("expected device memory, found a null pointer");
    std::int64_t side = parts.preprocessor->spec().crop_size;
    engine.run_on_device({{"pixels", Dtype::uint8, {static_cast<std::int64_t>(n), 3, side, side}, device_pixels}}, name,
                         device_embeddings, stream);
}

std::vector<float> Clip::similarity(const std::vector<ImageView> &images, const std::vector<std::string> &texts) const {
    std::vector<float> left = encode_images(images), right = encode_text(texts), logits;
    std::size_t dim = embedding_dim(Tower::image);
    auto factor = static_cast<float>(logit_factor()), bias = static_cast<float>(spec().logit_bias.value_or(0));
    for (std::size_t i = 0; i < images.size(); ++i) {
        for (std::size_t t = 0; t < texts.size(); ++t) {
            float cosine = std::inner_product(left.begin() + i * dim, left.begin() + (i + 1) * dim, right.begin() + t * dim, 0.0f);
            logits.push_back(cosine * factor + bias);
        }
    }
    return logits;
}

Tokens Clip::tokenize(const std::vector<std::string> &texts, std::optional<bool> truncate) const {
    if (!parts_->tokenizer) throw no_tower(Tower::text);
    return (*parts_->tokenizer)(texts, truncate);
}

std::vector<std::uint8_t> Clip::preprocess(const std::vector<ImageView> &images) const {
    if (!parts_->preprocessor) throw no_tower(Tower::image);
    std::size_t size = parts_->preprocessor->size();
    std::vector<std::uint8_t> pixels(images.size() * size);
    for (std::size_t i = 0; i < images.size(); ++i) {
        try {
            (*parts_->preprocessor)(images[i], pixels.data() + i * size);
        } catch (const ImageError &error) {
            throw ImageError("image " + std::to_string(i) + ": " + error.message(), error.hint());
        }
    }
    return pixels;
}

bool Clip::has(Tower tower) const { return parts_->engines.count(tower) > 0; }

int Clip::embedding_dim(Tower tower) const {
    parts_->require_embedding(tower);
    const auto &dim = tower == Tower::text ? spec().text->embedding_dim : spec().image->embedding_dim;
    if (!dim) throw InputError(std::string("the ") + name_of(tower) + " tower has no projection, and so no embedding");
    return *dim;
}

double Clip::logit_factor() const {
    if (!spec().logit_scale) {
        throw InputError("this bundle has no logit scale: its checkpoint held a single tower",
                         "multiply the embeddings of encode_text and encode_image yourself");
    }
    return std::exp(*spec().logit_scale);
}

const ModelSpec &Clip::spec() const { return parts_->bundle.spec(); }
const std::string &Clip::engine() const { return parts_->choice.title; }

} // namespace clip_export
