#include "noise.h"

#include <cmath>

namespace sana {
namespace {

constexpr std::size_t kBlock = 16;
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
float log_of(float x) {
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
void cos_sin(float x, float& cosine, float& sine) {
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
void transform(float* block) {
    for (std::size_t i = 0; i < kBlock / 2; ++i) {
        const float radius = std::sqrt(-2.0f * log_of(1.0f - block[i]));
        float cosine, sine;
        cos_sin(static_cast<float>(2 * kPi) * block[i + kBlock / 2], cosine, sine);
        block[i] = radius * cosine;
        block[i + kBlock / 2] = radius * sine;
    }
}

}  // namespace

std::vector<float> Noise::draw(std::size_t count) {
    std::vector<float> values(count);
    if (count < kBlock) {
        for (float& value : values) value = static_cast<float>(next());
        return values;
    }
    for (float& value : values) value = uniform24();
    for (std::size_t start = 0; start + kBlock <= count; start += kBlock) transform(&values[start]);
    if (count % kBlock != 0) {  // the last 16 values are drawn again
        float* tail = &values[count - kBlock];
        for (std::size_t i = 0; i < kBlock; ++i) tail[i] = uniform24();
        transform(tail);
    }
    return values;
}

float Noise::uniform24() { return static_cast<float>(words_() & 0xffffff) * 0x1p-24f; }

double Noise::uniform53() {
    const std::uint64_t high = words_(), low = words_();
    return static_cast<double>((high << 32 | low) & ((std::uint64_t{1} << 53) - 1)) * 0x1p-53;
}

/// One value by Box-Muller in double precision. Every second value is the one kept from the call before.
double Noise::next() {
    if (kept_) {
        const double value = *kept_;
        kept_.reset();
        return value;
    }
    const double angle = 2 * kPi * uniform53();
    const double radius = std::sqrt(-2 * std::log1p(-uniform53()));
    kept_ = radius * std::sin(angle);
    return radius * std::cos(angle);
}

}  // namespace sana
