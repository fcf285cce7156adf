// Prompt to image: the graphs of a bundle, in ONNX Runtime, in the order of docs/bundle.md.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "bundle.h"
#include "image_file.h"

namespace sana {

struct Request {
    std::string prompt, negative_prompt;
    std::uint64_t seed;
    int steps;
    /// Classifier-free guidance runs if this is above 1.
    double guidance_scale;
    /// In pixels: multiples of the bundle's vae_scale_factor.
    std::size_t width, height;
};

struct Drawing {
    Image image;
    /// Seconds for loading and running the graphs of each stage.
    double encoding, denoising, decoding;
    /// Tokens of the prompt and of the negative prompt that were cut off.
    std::size_t dropped;
};

/// The graphs that `draw` runs.
std::vector<std::string> graphs_of_a_drawing();

/// The version of ONNX Runtime. Throws MachineError if the library is older than the headers that this program was built with.
std::string onnxruntime_version();

/// Throws BundleError, UsageError for a size that does not fit, and MachineError if ONNX Runtime fails.
Drawing draw(const Bundle& bundle, const Request& request);

}  // namespace sana
