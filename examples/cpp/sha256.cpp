#include "sha256.h"

#include <array>
#include <cmath>
#include <cstdint>
#include <fstream>
#include <vector>

#include "errors.h"

namespace sana {
namespace {

constexpr std::size_t kBlockBytes = 64;

std::uint32_t rotated(std::uint32_t x, int bits) { return x >> bits | x << (32 - bits); }

/// The first 32 bits of the fraction of the cube root of each of the first 64 primes. A double is exact enough for them.
std::array<std::uint32_t, 64> round_constants() {
    std::array<std::uint32_t, 64> constants{};
    std::size_t found = 0;
    for (int candidate = 2; found < constants.size(); ++candidate) {
        bool prime = true;
        for (int divisor = 2; divisor * divisor <= candidate; ++divisor) prime = prime && candidate % divisor != 0;
        const double root = std::cbrt(static_cast<double>(candidate));
        if (prime) constants[found++] = static_cast<std::uint32_t>((root - std::floor(root)) * 0x1p32);
    }
    return constants;
}

void add_block(std::array<std::uint32_t, 8>& state, const unsigned char* block) {
    static const std::array<std::uint32_t, 64> constants = round_constants();
    std::array<std::uint32_t, 64> words;
    for (int i = 0; i < 16; ++i)
        words[i] = static_cast<std::uint32_t>(block[4 * i]) << 24 | block[4 * i + 1] << 16 | block[4 * i + 2] << 8 | block[4 * i + 3];
    for (int i = 16; i < 64; ++i) {
        const std::uint32_t s0 = rotated(words[i - 15], 7) ^ rotated(words[i - 15], 18) ^ words[i - 15] >> 3;
        const std::uint32_t s1 = rotated(words[i - 2], 17) ^ rotated(words[i - 2], 19) ^ words[i - 2] >> 10;
        words[i] = words[i - 16] + s0 + words[i - 7] + s1;
    }
    auto [a, b, c, d, e, f, g, h] = state;
    for (int i = 0; i < 64; ++i) {
        const std::uint32_t s1 = rotated(e, 6) ^ rotated(e, 11) ^ rotated(e, 25);
        const std::uint32_t t1 = h + s1 + ((e & f) ^ (~e & g)) + constants[i] + words[i];
        const std::uint32_t t2 = (rotated(a, 2) ^ rotated(a, 13) ^ rotated(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
        h = g, g = f, f = e, e = d + t1, d = c, c = b, b = a, a = t1 + t2;
    }
    const std::uint32_t added[] = {a, b, c, d, e, f, g, h};
    for (int i = 0; i < 8; ++i) state[i] += added[i];
}

}  // namespace

std::string sha256_of_file(const std::filesystem::path& path) {
    std::array<std::uint32_t, 8> state = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    std::ifstream file(path, std::ios::binary);
    if (!file) throw MachineError(path.string() + " cannot be read");
    std::vector<unsigned char> buffer(1 << 20);
    std::uint64_t total = 0;
    std::size_t count = 0;
    do {
        file.read(reinterpret_cast<char*>(buffer.data()), static_cast<std::streamsize>(buffer.size()));
        count = static_cast<std::size_t>(file.gcount());
        total += count;
        for (std::size_t at = 0; at + kBlockBytes <= count; at += kBlockBytes) add_block(state, &buffer[at]);
    } while (count == buffer.size());
    if (file.bad()) throw MachineError(path.string() + " cannot be read");

    // The rest, a one, zeros, and the length in bits.
    std::vector<unsigned char> rest(buffer.begin() + static_cast<std::ptrdiff_t>(count - count % kBlockBytes),
                                    buffer.begin() + static_cast<std::ptrdiff_t>(count));
    rest.push_back(0x80);
    while (rest.size() % kBlockBytes != kBlockBytes - 8) rest.push_back(0);
    for (int shift = 56; shift >= 0; shift -= 8) rest.push_back(static_cast<unsigned char>(total * 8 >> shift));
    for (std::size_t at = 0; at < rest.size(); at += kBlockBytes) add_block(state, &rest[at]);

    std::string digest;
    for (const std::uint32_t word : state) {
        for (int shift = 28; shift >= 0; shift -= 4) digest += "0123456789abcdef"[word >> shift & 15];
    }
    return digest;
}

}  // namespace sana
