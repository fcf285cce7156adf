// Prompt to image: the graphs of a bundle, in ONNX Runtime, in the order of docs/bundle.md.
#pragma once

#include <algorithm>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "bundle.h"
#include "noise.h"
#include "prompt.h"
#include "schedule.h"

namespace sana {

struct Request {
    std::string prompt, negative_prompt;
    std::uint64_t seed;
    int steps;
    /// Classifier-free guidance runs if this is above 1.
    double guidance_scale;
    /// In pixels: multiples of the bundle's vae_scale_factor.
    std::int64_t width, height;
};

struct Drawing {
    /// 8 bits for each of red, green and blue, row by row.
    std::vector<std::uint8_t> rgb;
    /// Tokens of the prompt and of the negative prompt that were cut off.
    std::size_t dropped;
};

using Shape = std::vector<std::int64_t>;

/// Prompts are padded to a multiple of 8 tokens, as sana-export does with ONNX Runtime: the same sums, the same bits.
inline std::size_t padded(std::size_t count, std::size_t most) { return std::max(count, std::min((count + 7) / 8 * 8, most)); }

inline std::size_t count_of(const Shape& shape) {
    std::size_t count = 1;
    for (const std::int64_t side : shape) count *= static_cast<std::size_t>(side);
    return count;
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

/// The values of a graph's output. Throws an Error if it has another type or shape: the graph is not what the manifest says.
template <typename T>
const T* values_of(const Ort::Value& value, const Shape& shape, const std::string& what) {
    const auto info = value.GetTensorTypeAndShapeInfo();
    require(info.GetElementType() == Ort::TypeToTensorType<T>::type && info.GetShape() == shape,
            "the bundle's " + what + " has the wrong type or the shape " + Json(info.GetShape()).dump() +
                ", wanted: " + Json(shape).dump());
    return value.GetTensorData<T>();
}

/// One graph of a bundle, loaded.
class Graph {
public:
    using Feeds = std::map<std::string, const Ort::Value*>;

    Graph(const Ort::Env& env, const Bundle& bundle, const std::string& name) : name_(name), spec_(bundle.graphs.at(name).second) {
        Ort::SessionOptions options;
        options.AddConfigEntry("session.force_spinning_stop", "1");  // idle threads leave the cores to the next graph
        // ONNX Runtime rounds the activations before 4-bit weights to 8 bits otherwise.
        options.AddConfigEntry("session.qdq_matmulnbits_accuracy_level", "1");
        const fs::path& path = bundle.graphs.at(name).first;
        try {
            session_ = Ort::Session(env, path.c_str(), options);
        } catch (const Ort::Exception& error) {
            throw Error(kBundle, "ONNX Runtime cannot load " + path.string() + ": " + error.what());
        }
    }

    /// The outputs, of which the manifest lists `count`. Feeds that the graph does not have are left out.
    std::vector<Ort::Value> run(const Feeds& feeds, std::size_t count = 1) {
        const std::string named = "the bundle's graph " + name_;
        require(spec_.at("outputs").size() == count, named + " has not " + std::to_string(count) + " outputs");
        Ort::IoBinding binding(session_);
        for (const Json& tensor : spec_.at("inputs")) {
            const std::string input = tensor.at("name");
            require(feeds.count(input) != 0, "this program does not support " + named + ": it has the input " + input);
            binding.BindInput(input.c_str(), *feeds.at(input));
        }
        for (const Json& tensor : spec_.at("outputs"))
            binding.BindOutput(tensor.at("name").get<std::string>().c_str(),
                               Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault));
        session_.Run(Ort::RunOptions(), binding);
        return binding.GetOutputValues();
    }

private:
    std::string name_;
    const Json& spec_;
    Ort::Session session_{nullptr};
};

/// What the denoiser reads of the prompts: `context`, as its graph made it, and the mask of its tokens.
struct Conditioning {
    Ort::Value context;
    Tensor<float> mask;
};

/// Each prompt [1, S, C] through the text encoder; kept rows into prompt_embeds [U, 1, L, C]; then `context`.
inline Conditioning encode(const Ort::Env& env, const Bundle& bundle, const std::vector<Tokens>& branches, const PromptReader& reader) {
    const std::size_t channels = reader.bos_row().size();
    std::size_t longest = 1;
    for (const Tokens& tokens : branches) longest = std::max(longest, tokens.kept_rows());
    longest = padded(longest, static_cast<std::size_t>(bundle.max_sequence_length));
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
        std::copy_n(found + (tokens.first_kept - tokens.shared) * channels, (kept - 1) * channels, rows + channels);
    }

    const auto texts = static_cast<std::int64_t>(branches.size()), length = static_cast<std::int64_t>(longest);
    const Tensor<float> prompt_embeds(std::move(embeds), {texts, 1, length, static_cast<std::int64_t>(channels)});
    auto outputs = Graph(env, bundle, "context").run({{"prompt_embeds", &prompt_embeds}});
    return {std::move(outputs[0]), Tensor<float>(std::move(mask), {texts, 1, length})};
}

/// The latents [1, c, h, w] after the last step.
inline Ort::Value sample(const Ort::Env& env, const Bundle& bundle, const Request& request, const Conditioning& prompts,
                         const Shape& shape) {
    const std::vector<Step> schedule = make_schedule(bundle.scheduler, request.steps);
    const bool guided = request.guidance_scale > 1;
    const auto guidance = static_cast<float>(request.guidance_scale), rest = static_cast<float>(1 - request.guidance_scale);
    const std::int64_t branches = guided ? 2 : 1;
    const Tensor<float> weights(guided ? std::vector<float>{rest, guidance} : std::vector<float>{1}, {branches});
    // A bundle for perturbed attention guidance has these two inputs. This program runs no perturbed branch.
    const Tensor<float> perturbed(std::vector<float>(static_cast<std::size_t>(branches), 0), {branches});
    const Tensor<std::int64_t> source(guided ? Shape{0, 1} : Shape{0}, {branches});

    const Tensor<float> noise(draw_noise(request.seed, count_of(shape)), shape);
    const Tensor<float> zeros(std::vector<float>(count_of(shape)), shape);
    Graph denoiser(env, bundle, "denoiser"), sampler(env, bundle, "sampler");
    const Ort::Value* latents = &noise;
    const Ort::Value* history[3] = {&zeros, &zeros, &zeros};  // x0 of the steps before, newest first
    std::vector<Ort::Value> kept;                             // the values that `latents` and `history` point to
    kept.reserve(2 * schedule.size());
    for (const Step& step : schedule) {
        const Tensor<float> timestep({step.timestep * static_cast<float>(bundle.timestep_scale)}, {1});
        const Tensor<float> coefficients({step.coefficients.begin(), step.coefficients.end()}, {8});
        const Graph::Feeds prediction = {{"latents", latents},           {"timestep", &timestep},   {"context", &prompts.context},
                                         {"context_mask", &prompts.mask}, {"perturbed", &perturbed}, {"source", &source}};
        const auto predicted = denoiser.run(prediction);
        const Graph::Feeds update = {{"noise_pred", &predicted[0]},   {"latents", latents},          {"previous_x0", history[0]},
                                     {"previous_x0_2", history[1]},   {"previous_x0_3", history[2]}, {"noise", &zeros},
                                     {"coefficients", &coefficients}, {"weights", &weights}};
        auto sampled = sampler.run(update, 2);
        for (Ort::Value& value : sampled) kept.push_back(std::move(value));
        latents = &kept[kept.size() - 2];
        history[2] = std::exchange(history[1], std::exchange(history[0], &kept.back()));
    }
    return std::move(kept[kept.size() - 2]);
}

/// The pixels, row by row, that the latents stand for.
inline std::vector<std::uint8_t> decode(const Ort::Env& env, const Bundle& bundle, const Ort::Value& latents, const Request& request) {
    const auto decoded = Graph(env, bundle, "vae_decoder").run({{"latents", &latents}});
    values_of<float>(decoded[0], {1, 3, request.height, request.width}, "decoded image");  // checks its type and shape
    // postprocess can resize: each row and column is a weighted sum of two. Here it is itself, with the weight 1.
    const auto index = [](std::int64_t pixels) {
        std::vector<std::int64_t> values;
        for (std::int64_t i = 0; i < pixels; ++i) values.push_back(i);
        for (std::int64_t i = 0; i < pixels; ++i) values.push_back(std::min(i + 1, pixels - 1));
        return Tensor<std::int64_t>(std::move(values), {2, pixels});
    };
    const auto weight = [](std::int64_t pixels) {
        std::vector<float> values(2 * static_cast<std::size_t>(pixels));
        std::fill_n(values.begin(), pixels, 1.0f);
        return Tensor<float>(std::move(values), {2, pixels});
    };
    const auto row_index = index(request.height), column_index = index(request.width);
    const auto row_weight = weight(request.height), column_weight = weight(request.width);
    const Graph::Feeds feeds = {{"image", &decoded[0]},
                                {"row_index", &row_index},
                                {"row_weight", &row_weight},
                                {"column_index", &column_index},
                                {"column_weight", &column_weight}};
    const auto outputs = Graph(env, bundle, "postprocess").run(feeds);
    const Shape shape = {1, request.height, request.width, 3};
    const std::uint8_t* const pixels = values_of<std::uint8_t>(outputs[0], shape, "postprocess output");
    return {pixels, pixels + count_of(shape)};
}

/// Throws an Error for a bundle or a size that does not fit, and Ort::Exception if ONNX Runtime fails.
inline Drawing draw(const Bundle& bundle, const Request& request) {
    const std::int64_t factor = bundle.vae_scale_factor;
    if (request.width % factor != 0 || request.height % factor != 0)
        throw Error(kUsage, "width and height must be multiples of " + std::to_string(factor) + ", found: " +
                                std::to_string(request.width) + "x" + std::to_string(request.height));
    const PromptReader reader(bundle);
    std::vector<Tokens> branches;
    if (request.guidance_scale > 1) branches.push_back(reader.tokenize(request.negative_prompt, false));
    branches.push_back(reader.tokenize(request.prompt, true));
    const Ort::Env env(ORT_LOGGING_LEVEL_ERROR, "sana");
    const Conditioning prompts = encode(env, bundle, branches, reader);
    const Shape shape = {1, bundle.latent_channels, request.height / factor, request.width / factor};
    const Ort::Value latents = sample(env, bundle, request, prompts, shape);
    return {decode(env, bundle, latents, request), branches.front().dropped + (branches.size() > 1 ? branches.back().dropped : 0)};
}

}  // namespace sana
