// Normal noise equal to that of torch.randn with torch.Generator("cpu").manual_seed(seed).
#pragma once

#include <cstdint>
#include <optional>
#include <random>
#include <vector>

namespace sana {

/// The stream depends on the low 32 bits of the seed only.
class Noise {
public:
    explicit Noise(std::uint64_t seed) : words_(static_cast<std::uint32_t>(seed)) {}

    /// The next `count` standard normal values, as one call of torch.randn draws them.
    std::vector<float> draw(std::size_t count);

private:
    float uniform24();
    double uniform53();
    double next();

    std::mt19937 words_;
    std::optional<double> kept_;
};

}  // namespace sana
