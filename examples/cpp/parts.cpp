// sana-parts: prints what `sana` computes from a bundle itself, without ONNX Runtime. For tests, and for whoever writes another reader.
//
//   sana-parts tokens BUNDLE PROMPT      ids of the prompt after the instruction, then of the prompt alone
//   sana-parts encode TOKENIZER TEXT...  ids of each text as it is
//   sana-parts lower                     the text on standard input as a prompt is tokenized: in lower case and stripped
//   sana-parts noise SEED COUNT...       one line for each draw from one generator
//   sana-parts schedule BUNDLE STEPS     a line for each step: timestep, 8 coefficients
//
// Floating-point numbers are hexadecimal, so that no bit is lost.

#include <cstdlib>
#include <functional>
#include <iostream>
#include <iterator>
#include <map>
#include <nlohmann/json.hpp>

#include "bundle.h"
#include "errors.h"
#include "noise.h"
#include "prompt.h"
#include "schedule.h"
#include "text.h"

namespace {

using Words = std::vector<std::string>;

template <typename Values>
void print(const Values& values) {
    for (const auto value : values) std::cout << value << ' ';
    std::cout << '\n';
}

void print_tokens(const Words& words) {
    const sana::Bundle bundle(words.at(0), {});
    const sana::PromptReader reader(bundle);
    for (const bool after_instruction : {true, false}) print(reader.tokenize(words.at(1), after_instruction).ids);
}

void print_ids(const Words& words) {
    const sana::Tokenizer tokenizer(words.at(0));
    for (std::size_t i = 1; i < words.size(); ++i) print(tokenizer.encode(words[i]));
}

void print_noise(const Words& words) {
    sana::Noise noise(std::strtoull(words.at(0).c_str(), nullptr, 10));
    for (std::size_t i = 1; i < words.size(); ++i) print(noise.draw(std::strtoull(words[i].c_str(), nullptr, 10)));
}

void print_schedule(const Words& words) {
    const sana::Bundle bundle(words.at(0), {});
    for (const sana::Step& step : sana::make_schedule(bundle.model().scheduler, std::atoi(words.at(1).c_str()))) {
        std::cout << step.timestep << ' ';
        print(step.coefficients);
    }
}

const std::map<std::string, std::function<void(const Words&)>> kCommands = {
    {"tokens", print_tokens},
    {"encode", print_ids},
    {"lower", [](const Words&) { std::cout << sana::normalized_prompt({std::istreambuf_iterator<char>(std::cin), {}}); }},
    {"noise", print_noise},
    {"schedule", print_schedule},
};

}  // namespace

int main(int count, char** words) {
    try {
        std::cout << std::hexfloat;
        kCommands.at(count > 1 ? words[1] : "")({words + 2, words + count});
        return 0;
    } catch (const sana::Error& error) {
        std::cerr << "error: " << error.what() << "\n";
        return error.code;
    } catch (const nlohmann::json::exception& error) {
        std::cerr << "error: the bundle is damaged: " << error.what() << "\n";
        return 4;
    } catch (const std::exception&) {
        std::cerr << "usage: the first lines of parts.cpp\n";
        return 2;
    }
}
