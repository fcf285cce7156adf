#include "pipeline.h"

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <numeric>
#include <utility>

#include "errors.h"
#include "noise.h"
#include "prompt.h"
#include "schedule.h"

namespace sana {
namespace {

using Shape = std::vector<std::int64_t>;

/// Prompts are padded to a multiple of this many tokens, as sana-export does with ONNX Runtime: the same sums, the same bits.
constexpr std::size_t kTextMultiple = 8;

std::size_t padded(std::size_t count, std::size_t most) {
    return std::max(count, std::min((count + kTextMultiple - 1) / kTextMultiple * kTextMultiple, most));
}

std::string text_of(const Shape& shape) {
    std::string text = "[";
    for (const std::int64_t side : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(side);
    return text + "]";
}

std::size_t count_of(const Shape& shape) {
    return static_cast<std::size_t>(std::accumulate(shape.begin(), shape.end(), std::int64_t{1}, std::multiplies<>()));
}

/// Values of this program as a tensor of ONNX Runtime, which reads them in place.
template <typename T>
class Tensor {
public:
    Tensor(std::vector<T> values, const Shape& shape)
        : values_(std::move(values)),
          value_(Ort::Value::CreateTensor<T>(Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault), values_.data(),
                                             values_.size(), shape.data(), shape.size())) {}
    const Ort::Value* operator&() const { return &value_; }

private:
    std::vector<T> values_;
    Ort::Value value_;
};

/// The values of a graph's output. Throws BundleError if it has another type or shape: the graph is not what the manifest says.
template <typename T>
const T* values_of(const Ort::Value& value, const Shape& shape, const std::string& what) {
    const auto info = value.GetTensorTypeAndShapeInfo();
    if (info.GetElementType() != Ort::TypeToTensorType<T>::type || info.GetShape() != shape)
        throw BundleError("the bundle's " + what + " has the wrong type or the shape " + text_of(info.GetShape()) +
                          ", wanted: " + text_of(shape));
    return value.GetTensorData<T>();
}

/// One graph of a bundle, loaded.
class Graph {
public:
    using Feeds = std::map<std::string, const Ort::Value*>;

    Graph(const Ort::Env& env, const Bundle& bundle, const std::string& name) : name_(name), entry_(bundle.graph(name)) {
        Ort::SessionOptions options;
        options.AddConfigEntry("session.force_spinning_stop", "1");  // idle threads leave the cores to the next graph
        std::vector<std::vector<char>> contents;  // the session copies them
        pass_linked_files(options, contents);
        try {
            session_ = Ort::Session(env, entry_.onnx.c_str(), options);
        } catch (const Ort::Exception& error) {
            throw BundleError("ONNX Runtime cannot load " + entry_.onnx.string() + ": " + error.what());
        }
    }

    /// The outputs, in the manifest's order. Feeds that the graph does not have are left out.
    std::vector<Ort::Value> run(const Feeds& feeds) {
        Ort::IoBinding binding(session_);
        for (const std::string& input : entry_.inputs) {
            const auto found = feeds.find(input);
            if (found == feeds.end())
                throw BundleError("this program does not support the bundle's graph " + name_ + ": it has the input " + input);
            binding.BindInput(input.c_str(), *found->second);
        }
        for (const std::string& output : entry_.outputs)
            binding.BindOutput(output.c_str(), Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault));
        session_.Run(Ort::RunOptions(), binding);
        std::vector<Ort::Value> outputs = binding.GetOutputValues();
        if (outputs.empty()) throw BundleError("the bundle's graph " + name_ + " has no outputs");
        return outputs;
    }

private:
    /// Passes weight files that are links out of the model's folder, as in the hub's cache, which ONNX Runtime refuses to open.
    void pass_linked_files(Ort::SessionOptions& options, std::vector<std::vector<char>>& contents) const {
        namespace fs = std::filesystem;
        std::vector<fs::path::string_type> names;
        std::vector<char*> starts;
        std::vector<std::size_t> sizes;
        for (const fs::path& data : entry_.data) {
            if (fs::canonical(data).parent_path() == fs::canonical(entry_.onnx).parent_path()) continue;
            contents.push_back(read_bytes(data, 0, fs::file_size(data)));
            names.push_back(data.filename().native());
            starts.push_back(contents.back().data());
            sizes.push_back(contents.back().size());
        }
        if (!names.empty()) options.AddExternalInitializersFromFilesInMemory(names, starts, sizes);
    }

    std::string name_;
    const GraphEntry& entry_;
    Ort::Session session_{nullptr};
};

/// What the denoiser reads of the prompts: `context`, as its graph made it, and the mask of its tokens.
struct Conditioning {
    Ort::Value context;
    Tensor<float> mask;
    std::size_t dropped;
};

/// Each prompt [1, S, C] through the text encoder; kept rows into prompt_embeds [U, 1, L, C]; then `context`.
Conditioning encode(const Ort::Env& env, const Bundle& bundle, const std::vector<Tokens>& branches, const PromptReader& reader) {
    const std::size_t channels = reader.bos_row().size();
    std::size_t longest = 1, dropped = 0;
    for (const Tokens& tokens : branches) {
        longest = std::max(longest, tokens.kept_rows());
        dropped += tokens.dropped;
    }
    longest = padded(longest, static_cast<std::size_t>(bundle.model().max_sequence_length));
    std::vector<float> embeds(branches.size() * longest * channels), mask(branches.size() * longest);

    Graph text_encoder(env, bundle, "text_encoder");
    for (std::size_t branch = 0; branch < branches.size(); ++branch) {
        const Tokens& tokens = branches[branch];
        const std::size_t kept = tokens.kept_rows();
        float* const rows = &embeds[branch * longest * channels];
        std::copy(reader.bos_row().begin(), reader.bos_row().end(), rows);
        std::fill_n(&mask[branch * longest], kept, 1.0f);
        if (kept == 1) continue;  // BOS alone
        const std::size_t length = padded(tokens.ids.size() - tokens.shared, tokens.limit - tokens.shared);
        const Shape shape = {1, static_cast<std::int64_t>(length), static_cast<std::int64_t>(channels)};
        const Tensor<float> inputs(reader.embeddings(tokens, length), shape);
        const Tensor<float> prefix(reader.prefix(tokens.shared), reader.prefix_shape(tokens.shared));
        const auto outputs = text_encoder.run({{"inputs_embeds", &inputs}, {"prefix", &prefix}});
        const float* const found = values_of<float>(outputs[0], shape, "text encoder's output");
        const float* const first = found + (tokens.first_kept - tokens.shared) * channels;
        std::copy(first, first + (kept - 1) * channels, rows + channels);
    }

    const auto texts = static_cast<std::int64_t>(branches.size()), length = static_cast<std::int64_t>(longest);
    const Tensor<float> prompt_embeds(std::move(embeds), {texts, 1, length, static_cast<std::int64_t>(channels)});
    auto outputs = Graph(env, bundle, "context").run({{"prompt_embeds", &prompt_embeds}});
    return {std::move(outputs[0]), Tensor<float>(std::move(mask), {texts, 1, length}), dropped};
}

/// The latents [1, c, h, w] after the last step.
Ort::Value sample(const Ort::Env& env, const Bundle& bundle, const Request& request, const Conditioning& prompts, const Shape& shape) {
    const std::vector<Step> schedule = make_schedule(bundle.model().scheduler, request.steps);
    const auto guidance = static_cast<float>(request.guidance_scale);
    const bool guided = request.guidance_scale > 1;
    const std::vector<float> branch_weights =
        guided ? std::vector<float>{static_cast<float>(1 - request.guidance_scale), guidance} : std::vector<float>{1};
    const auto branches = static_cast<std::int64_t>(branch_weights.size());
    const Tensor<float> weights(branch_weights, {branches});
    // A bundle for perturbed attention guidance has these two inputs. This program runs no perturbed branch.
    const Tensor<float> perturbed(std::vector<float>(branch_weights.size(), 0), {branches});
    const Tensor<std::int64_t> source(guided ? std::vector<std::int64_t>{0, 1} : std::vector<std::int64_t>{0}, {branches});

    const Tensor<float> noise(Noise(request.seed).draw(count_of(shape)), shape);
    const Tensor<float> zeros(std::vector<float>(count_of(shape)), shape);
    Graph denoiser(env, bundle, "denoiser"), sampler(env, bundle, "sampler");
    const Ort::Value* latents = &noise;
    const Ort::Value* history[3] = {&zeros, &zeros, &zeros};  // x0 of the steps before, newest first
    std::vector<Ort::Value> kept;                             // the values that `latents` and `history` point to
    kept.reserve(2 * schedule.size());
    for (const Step& step : schedule) {
        const Tensor<float> timestep({step.timestep * static_cast<float>(bundle.model().timestep_scale)}, {1});
        const Tensor<float> coefficients({step.coefficients.begin(), step.coefficients.end()}, {8});
        const auto predicted = denoiser.run({{"latents", latents},
                                             {"timestep", &timestep},
                                             {"context", &prompts.context},
                                             {"context_mask", &prompts.mask},
                                             {"perturbed", &perturbed},
                                             {"source", &source}});
        auto sampled = sampler.run({{"noise_pred", &predicted[0]},
                                    {"latents", latents},
                                    {"previous_x0", history[0]},
                                    {"previous_x0_2", history[1]},
                                    {"previous_x0_3", history[2]},
                                    {"noise", &zeros},
                                    {"coefficients", &coefficients},
                                    {"weights", &weights}});
        if (sampled.size() != 2) throw BundleError("the bundle's graph sampler has not two outputs");
        for (Ort::Value& value : sampled) kept.push_back(std::move(value));
        latents = &kept[kept.size() - 2];
        history[2] = std::exchange(history[1], std::exchange(history[0], &kept.back()));
    }
    return std::move(kept[kept.size() - 2]);
}

/// The input of `postprocess` for one side: each pixel is made of itself alone.
struct Side {
    explicit Side(std::size_t pixels)
        : index(indices(pixels), {2, static_cast<std::int64_t>(pixels)}),
          weight(weights(pixels), {2, static_cast<std::int64_t>(pixels)}) {}

    static std::vector<std::int64_t> indices(std::size_t pixels) {
        std::vector<std::int64_t> values(2 * pixels);
        for (std::size_t i = 0; i < pixels; ++i) {
            values[i] = static_cast<std::int64_t>(i);
            values[pixels + i] = static_cast<std::int64_t>(std::min(i + 1, pixels - 1));
        }
        return values;
    }
    static std::vector<float> weights(std::size_t pixels) {
        std::vector<float> values(2 * pixels);
        std::fill_n(values.begin(), pixels, 1.0f);
        return values;
    }

    Tensor<std::int64_t> index;
    Tensor<float> weight;
};

Image decode(const Ort::Env& env, const Bundle& bundle, const Ort::Value& latents, std::size_t width, std::size_t height) {
    const auto decoded = Graph(env, bundle, "vae_decoder").run({{"latents", &latents}});
    const Shape decoded_shape = {1, 3, static_cast<std::int64_t>(height), static_cast<std::int64_t>(width)};
    values_of<float>(decoded[0], decoded_shape, "decoded image");  // checks its type and shape
    const Side rows(height), columns(width);
    const auto outputs = Graph(env, bundle, "postprocess")
                             .run({{"image", &decoded[0]},
                                   {"row_index", &rows.index},
                                   {"row_weight", &rows.weight},
                                   {"column_index", &columns.index},
                                   {"column_weight", &columns.weight}});
    const Shape shape = {1, static_cast<std::int64_t>(height), static_cast<std::int64_t>(width), 3};
    const std::uint8_t* const pixels = values_of<std::uint8_t>(outputs[0], shape, "postprocess output");
    return {width, height, {pixels, pixels + count_of(shape)}};
}

}  // namespace

std::vector<std::string> graphs_of_a_drawing() {
    return {"text_encoder", "context", "denoiser", "sampler", "vae_decoder", "postprocess"};
}

std::string onnxruntime_version() {
    const std::string version = OrtGetApiBase()->GetVersionString();
    if (!OrtGetApiBase()->GetApi(ORT_API_VERSION))
        throw MachineError("ONNX Runtime " + version + " is older than the headers that this program was built with, of version 1." +
                           std::to_string(ORT_API_VERSION));
    return version;
}

Drawing draw(const Bundle& bundle, const Request& request) {
    const auto factor = static_cast<std::size_t>(bundle.model().vae_scale_factor);
    if (request.width % factor != 0 || request.height % factor != 0)
        throw UsageError("width and height must be multiples of " + std::to_string(factor) + ", found: " +
                         std::to_string(request.width) + "x" + std::to_string(request.height));
    const Shape shape = {1, bundle.model().latent_channels, static_cast<std::int64_t>(request.height / factor),
                         static_cast<std::int64_t>(request.width / factor)};
    const PromptReader reader(bundle);
    std::vector<Tokens> branches;
    if (request.guidance_scale > 1) branches.push_back(reader.tokenize(request.negative_prompt, false));
    branches.push_back(reader.tokenize(request.prompt, true));

    auto since = std::chrono::steady_clock::now();
    const auto lap = [&] {
        const auto start = std::exchange(since, std::chrono::steady_clock::now());
        return std::chrono::duration<double>(since - start).count();
    };
    try {
        const Ort::Env env(ORT_LOGGING_LEVEL_ERROR, "sana");
        Drawing drawing{};
        const Conditioning prompts = encode(env, bundle, branches, reader);
        drawing.dropped = prompts.dropped;
        drawing.encoding = lap();
        const Ort::Value latents = sample(env, bundle, request, prompts, shape);
        drawing.denoising = lap();
        drawing.image = decode(env, bundle, latents, request.width, request.height);
        drawing.decoding = lap();
        return drawing;
    } catch (const Ort::Exception& error) {
        throw MachineError(std::string("ONNX Runtime: ") + error.what());
    }
}

}  // namespace sana
