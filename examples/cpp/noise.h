// Normal noise equal to that of torch.randn with torch.Generator("cpu").manual_seed(seed).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "bundle.h"

namespace sana {

constexpr double kPi = 3.14159265358979323846;

// torch's kernels for x86 evaluate the single precision polynomials of the Cephes library with fused multiply-adds. std::fma
// rounds in the same way on every processor.
template <std::size_t N>
float polynomial(float x, const float (&coefficients)[N]) {
    float y = coefficients[0];
    for (std::size_t i = 1; i < N; ++i) y = std::fma(y, x, coefficients[i]);
    return y;
}

/// The natural logarithm of x > 0: x = m * 2**e with m in [sqrt(1/2), sqrt(2)), and a polynomial for log(1 + r), r = m - 1.
inline float log_of(float x) {
    constexpr float coefficients[] = {7.0376836292e-2f,  -1.1514610310e-1f, 1.1676998740e-1f,  -1.2420140846e-1f, 1.4249322787e-1f,
                                      -1.6668057665e-1f, 2.0000714765e-1f,  -2.4999993993e-1f, 3.3333331174e-1f};
    int exponent;
    const float mantissa = std::frexp(x, &exponent);
    const bool small = mantissa < std::sqrt(0.5f);
    const float r = (small ? mantissa + mantissa : mantissa) - 1.0f;
    const auto e = static_cast<float>(exponent - (small ? 1 : 0));
    const float square = r * r;
    float y = std::fma(polynomial(r, coefficients) * r, square, e * -2.12194440e-4f);
    y = std::fma(square, -0.5f, y);
    return std::fma(e, 0.693359375f, r + y);
}

/// Cosine and sine of x >= 0, from the two polynomials at the distance of x from the nearest multiple of pi/2.
inline void cos_sin(float x, float& cosine, float& sine) {
    constexpr float sin_coefficients[] = {-1.9515295891e-4f, 8.3321608736e-3f, -1.6666654611e-1f};
    constexpr float cos_coefficients[] = {2.443315711809948e-5f, -1.388731625493765e-3f, 4.166664568298827e-2f};
    auto octant = static_cast<int>(x * static_cast<float>(4 / kPi));
    octant = (octant + 1) & ~1;
    const auto multiple = static_cast<float>(octant);
    for (const float part : {0.78515625f, 2.4187564849853515625e-4f, 3.77489497744594108e-8f}) x = std::fma(multiple, -part, x);
    const float square = x * x;
    const float near_cos = std::fma(polynomial(square, cos_coefficients) * square, square, square * -0.5f) + 1.0f;
    const float near_sin = std::fma(polynomial(square, sin_coefficients) * square, x, x);
    const bool swap = octant & 2;
    cosine = swap ? near_sin : near_cos;
    sine = swap ? near_cos : near_sin;
    if ((octant + 2) & 4) cosine = -cosine;
    if (octant & 4) sine = -sine;
}

/// Box-Muller on a block of 16 uniforms: the first 8 give the radii, the last 8 the angles.
inline void to_normal(float* block) {
    for (float* low = block; low < block + 8; ++low) {
        const float radius = std::sqrt(-2.0f * log_of(1.0f - low[0]));
        float cosine, sine;
        cos_sin(static_cast<float>(2 * kPi) * low[8], cosine, sine);
        low[0] = radius * cosine;
        low[8] = radius * sine;
    }
}

/// The first `count` standard normal values, of 16 or more: torch draws fewer in another way, and latents are never so small.
/// They depend on the low 32 bits of the seed only.
inline std::vector<float> draw_noise(std::uint64_t seed, std::size_t count) {
    require(count >= 16, "the bundle's latents have fewer than 16 values");
    std::mt19937 words(static_cast<std::uint32_t>(seed));
    const auto uniform = [&] { return static_cast<float>(words() & 0xffffff) * 0x1p-24f; };
    std::vector<float> values(count);
    std::generate(values.begin(), values.end(), uniform);
    for (std::size_t start = 0; start + 16 <= count; start += 16) to_normal(&values[start]);
    if (count % 16 != 0) {  // the last 16 values are drawn again
        std::generate(values.end() - 16, values.end(), uniform);
        to_normal(&values[count - 16]);
    }
    return values;
}

}  // namespace sana
