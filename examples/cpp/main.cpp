// sana: draws an image with a bundle. See README.md.

#include <cctype>
#include <cerrno>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <iostream>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "errors.h"
#include "pipeline.h"

namespace {

constexpr long kMostSide = 8192, kMostSteps = 1000;
constexpr double kMostGuidance = 1000;
const char* const kUsage =
    "usage: sana BUNDLE PROMPT OUT.png|OUT.ppm [options]\n"
    "\n"
    "  --seed N             a number from -2**63 to 2**64 - 1 (default: drawn)\n"
    "  --steps N            steps (default: the bundle's)\n"
    "  --guidance X         classifier-free guidance; 1 or less: none (default: the bundle's)\n"
    "  --negative TEXT      negative prompt\n"
    "  --width N, --height N   pixels (default: the bundle's native size)\n";

struct Arguments {
    std::vector<std::string> positional;
    std::string negative;
    std::optional<std::uint64_t> seed;
    std::optional<long> steps, width, height;
    std::optional<double> guidance;
};

/// `text` as `convert` reads it. Throws UsageError unless `convert` reads all of it.
template <typename Convert>
auto parsed(const std::string& option, const std::string& text, Convert convert) {
    char* end = nullptr;
    errno = 0;
    const auto value = convert(text.c_str(), &end);
    if (errno != 0 || text.empty() || std::isspace(static_cast<unsigned char>(text[0])) || *end != '\0')
        throw sana::UsageError(option + " is not a number in its range: " + text);
    return value;
}

long whole(const std::string& option, const std::string& text, long most) {
    const long value = parsed(option, text, [](const char* start, char** end) { return std::strtol(start, end, 10); });
    if (value < 1 || value > most) throw sana::UsageError(option + " is " + text + ", wanted: 1 to " + std::to_string(most));
    return value;
}

double real(const std::string& option, const std::string& text) {
    const double value = parsed(option, text, [](const char* start, char** end) { return std::strtod(start, end); });
    if (!(std::abs(value) <= kMostGuidance)) throw sana::UsageError(option + " is " + text + ", wanted: at most 1000");
    return value;
}

std::uint64_t seed(const std::string& option, const std::string& text) {
    if (!text.empty() && text[0] == '-')
        return static_cast<std::uint64_t>(
            parsed(option, text, [](const char* start, char** end) { return std::strtoll(start, end, 10); }));
    return parsed(option, text, [](const char* start, char** end) { return std::strtoull(start, end, 10); });
}

Arguments parse(const std::vector<std::string>& words) {
    Arguments arguments;
    const std::map<std::string, std::function<void(const std::string&, const std::string&)>> options = {
        {"--seed", [&](auto& option, auto& text) { arguments.seed = seed(option, text); }},
        {"--steps", [&](auto& option, auto& text) { arguments.steps = whole(option, text, kMostSteps); }},
        {"--guidance", [&](auto& option, auto& text) { arguments.guidance = real(option, text); }},
        {"--negative", [&](auto&, auto& text) { arguments.negative = text; }},
        {"--width", [&](auto& option, auto& text) { arguments.width = whole(option, text, kMostSide); }},
        {"--height", [&](auto& option, auto& text) { arguments.height = whole(option, text, kMostSide); }},
    };
    for (std::size_t i = 0; i < words.size(); ++i) {
        if (const auto option = options.find(words[i]); option != options.end()) {
            if (i + 1 == words.size()) throw sana::UsageError(words[i] + " needs a value");
            option->second(words[i], words[i + 1]);
            ++i;
        } else if (words[i].rfind("--", 0) == 0) {
            throw sana::UsageError("unknown option " + words[i] + "\n" + kUsage);
        } else {
            arguments.positional.push_back(words[i]);
        }
    }
    if (arguments.positional.size() != 3) throw sana::UsageError(kUsage);
    return arguments;
}

void run(const Arguments& arguments) {
    const std::filesystem::path output = std::filesystem::u8path(arguments.positional[2]);
    sana::check_image_path(output);
    const std::string version = sana::onnxruntime_version();
    const sana::Bundle bundle(std::filesystem::u8path(arguments.positional[0]), sana::graphs_of_a_drawing());
    const sana::Model& model = bundle.model();
    const auto native = static_cast<long>(model.sample_size * model.vae_scale_factor);

    sana::Request request{};
    request.prompt = arguments.positional[1];
    request.negative_prompt = arguments.negative;
    request.seed = arguments.seed ? *arguments.seed : std::random_device()();
    request.steps = static_cast<int>(arguments.steps.value_or(static_cast<long>(model.default_steps)));
    request.guidance_scale = arguments.guidance.value_or(model.default_guidance_scale);
    request.width = static_cast<std::size_t>(arguments.width.value_or(native));
    request.height = static_cast<std::size_t>(arguments.height.value_or(native));

    const sana::Drawing drawing = sana::draw(bundle, request);
    sana::save(drawing.image, output);
    if (drawing.dropped) std::cerr << "the prompt is too long: its last " << drawing.dropped << " tokens were dropped\n";
    std::cout << output.string() << ": " << request.width << "x" << request.height << ", seed " << request.seed << ", "
              << request.steps << " steps, ONNX Runtime " << version << "\n"
              << "text encoder " << drawing.encoding << " s, denoising " << drawing.denoising << " s, decoder " << drawing.decoding
              << " s\n";
}

}  // namespace

int main(int count, char** words) {
    if (count == 2 && std::string(words[1]) == "--help") {
        std::cout << kUsage;
        return 0;
    }
    try {
        run(parse({words + 1, words + count}));
        return 0;
    } catch (const sana::Error& error) {
        std::cerr << "error: " << error.what() << "\n";
        return error.code;
    } catch (const nlohmann::json::exception& error) {
        std::cerr << "error: the bundle is damaged: " << error.what() << "\n";
        return 4;
    } catch (const std::exception& error) {  // no memory, a file that went away
        std::cerr << "error: " << error.what() << "\n";
        return 3;
    }
}
