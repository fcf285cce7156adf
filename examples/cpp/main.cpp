// sana: draws an image with a bundle. See README.md.

#include <iostream>
#include <iterator>
#include <random>

#include "pipeline.h"
#include "png.h"

namespace sana {

using Words = std::vector<std::string>;

const char* const kHelp =
    "usage: sana BUNDLE PROMPT OUT.png [options]\n"
    "\n"
    "  --seed N                a number from -2**63 to 2**64 - 1 (default: drawn)\n"
    "  --steps N               steps (default: the bundle's)\n"
    "  --guidance X            classifier-free guidance; 1 or less: none (default: the bundle's)\n"
    "  --negative TEXT         negative prompt\n"
    "  --width N, --height N   pixels (default: the bundle's native size)\n";

/// A number as JSON writes it, which has 64 bits for seeds.
Json parsed(const std::string& option, const std::string& text) {
    const Json value = Json::parse(text, nullptr, false);
    if (!value.is_number()) throw Error(kUsage, option + " is not a number: " + text);
    return value;
}

std::uint64_t parsed_seed(const std::string& text) {
    const Json seed = parsed("--seed", text);
    if (!seed.is_number_integer()) throw Error(kUsage, "--seed is out of range: " + text + ", wanted: -2**63 to 2**64 - 1");
    return seed.get<std::uint64_t>();  // modulo 2**64
}

void run(const Words& words) {
    Words places;
    std::map<std::string, std::string> options;
    for (std::size_t i = 0; i < words.size(); ++i) {
        if (words[i].rfind("--", 0) != 0) {
            places.push_back(words[i]);
            continue;
        }
        const Words known = {"--seed", "--steps", "--guidance", "--negative", "--width", "--height"};
        if (std::find(known.begin(), known.end(), words[i]) == known.end())
            throw Error(kUsage, "unknown option " + words[i] + "\n" + kHelp);
        if (i + 1 == words.size()) throw Error(kUsage, words[i] + " needs a value");
        options[words[i]] = words[i + 1];
        ++i;
    }
    if (places.size() != 3) throw Error(kUsage, kHelp);
    const fs::path output = fs::u8path(places[2]);
    if (output.extension() != ".png")
        throw Error(kUsage, "unsupported image format: " + places[2] + ", wanted: a name that ends in .png");

    const Bundle bundle(fs::u8path(places[0]));
    const auto given = [&](const std::string& option, const Json& otherwise) {
        return options.count(option) ? parsed(option, options.at(option)) : otherwise;
    };
    const auto whole = [&](const std::string& option, std::int64_t otherwise, std::int64_t most) {
        return integer(given(option, otherwise), option, 1, most, kUsage);
    };
    const std::int64_t native = bundle.sample_size * bundle.vae_scale_factor;
    Request request{};
    request.prompt = places[1];
    request.negative_prompt = options["--negative"];
    request.seed = options.count("--seed") ? parsed_seed(options.at("--seed")) : std::random_device()();
    request.steps = static_cast<int>(whole("--steps", bundle.default_steps, 1000));
    request.guidance_scale = number(given("--guidance", bundle.default_guidance_scale), "--guidance", -1000, 1000, kUsage);
    request.width = whole("--width", native, 8192);
    request.height = whole("--height", native, 8192);

    const Drawing drawing = draw(bundle, request);
    save_png(drawing.rgb, request.width, output);
    if (drawing.dropped) std::cerr << "the prompt is too long: its last " << drawing.dropped << " tokens were dropped\n";
    std::cout << output.string() << ": " << request.width << "x" << request.height << ", seed " << request.seed << ", " << request.steps
              << " steps\n";
}

template <typename Values>
void print(const Values& values) {
    for (const auto value : values) std::cout << value << ' ';
    std::cout << '\n';
}

/// `sana --parts`: prints what this program computes itself. For tests, and for whoever writes another reader.
/// Floating-point numbers are hexadecimal, so that no bit is lost.
///
///   tokens BUNDLE PROMPT      ids of the prompt after the instruction, then of the prompt alone
///   encode TOKENIZER TEXT...  ids of each text as it is
///   lower                     the text on standard input as a prompt is tokenized: in lower case and stripped
///   noise SEED COUNT          as many values
///   schedule BUNDLE STEPS     a line for each step: timestep, 8 coefficients
void print_part(Words words) {
    words.resize(std::max<std::size_t>(words.size(), 3));
    const fs::path path = fs::u8path(words[1]);
    std::cout << std::hexfloat;
    if (words[0] == "tokens") {
        const Bundle bundle(path);
        const PromptReader reader(bundle);
        for (const bool after_instruction : {true, false}) print(reader.tokenize(words[2], after_instruction).ids);
    } else if (words[0] == "encode") {
        const Tokenizer tokenizer(path);
        for (std::size_t i = 2; i < words.size(); ++i) print(tokenizer.encode(words[i]));
    } else if (words[0] == "lower") {
        std::cout << normalized_prompt({std::istreambuf_iterator<char>(std::cin), {}});
    } else if (words[0] == "noise") {
        print(draw_noise(parsed_seed(words[1]), parsed("COUNT", words[2])));
    } else if (words[0] == "schedule") {
        for (const Step& step : make_schedule(Bundle(path).scheduler, parsed("STEPS", words[2]))) {
            std::cout << step.timestep << ' ';
            print(step.coefficients);
        }
    } else {
        throw Error(kUsage, "main.cpp lists the parts");
    }
}

}  // namespace sana

int main(int count, char** words) {
    const std::vector<std::string> arguments(words + std::min(count, 1), words + count);
    const std::string first = arguments.empty() ? "" : arguments[0];
    try {
        if (!OrtGetApiBase()->GetApi(ORT_API_VERSION))
            throw sana::Error(sana::kMachine, "ONNX Runtime " + std::string(OrtGetApiBase()->GetVersionString()) +
                                                  " is older than the headers that this program was built with");
        if (first == "--help") {
            std::cout << sana::kHelp;
        } else if (first == "--parts") {
            sana::print_part({arguments.begin() + 1, arguments.end()});
        } else {
            sana::run(arguments);
        }
        return 0;
    } catch (const sana::Error& error) {
        std::cerr << "error: " << error.what() << "\n";
        return error.code;
    } catch (const nlohmann::json::exception& error) {  // a key that is missing, a value of another type
        std::cerr << "error: the bundle is damaged: " << error.what() << "\n";
        return sana::kBundle;
    } catch (const Ort::Exception& error) {
        std::cerr << "error: ONNX Runtime: " << error.what() << "\n";
        return sana::kMachine;
    } catch (const std::exception& error) {  // no memory, a file that went away
        std::cerr << "error: " << error.what() << "\n";
        return sana::kMachine;
    }
}
