// PNG files, not compressed.
#pragma once

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <string>
#include <vector>

#include "bundle.h"

namespace sana {

inline std::string big_endian(std::uint32_t number) {
    std::string bytes;
    for (int shift = 24; shift >= 0; shift -= 8) bytes += static_cast<char>(number >> shift & 0xff);
    return bytes;
}

inline std::string chunk(const std::string& type, const std::string& content) {
    std::uint32_t crc = ~0u;
    for (const char byte : type + content) {
        crc ^= static_cast<unsigned char>(byte);
        for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? 0xedb88320u : 0);
    }
    return big_endian(static_cast<std::uint32_t>(content.size())) + type + content + big_endian(~crc);
}

/// zlib's format with blocks that are stored, not compressed.
inline std::string stored(const std::string& bytes) {
    std::string stream = "\x78\x01";
    for (std::size_t at = 0; at < bytes.size(); at += 65535) {
        const std::size_t count = std::min<std::size_t>(65535, bytes.size() - at);
        stream += at + count == bytes.size() ? '\1' : '\0';
        for (const std::size_t number : {count, ~count}) {
            stream += static_cast<char>(number & 0xff);
            stream += static_cast<char>(number >> 8 & 0xff);
        }
        stream.append(bytes, at, count);
    }
    std::uint32_t a = 1, b = 0;  // the Adler-32 checksum
    for (const char byte : bytes) {
        a = (a + static_cast<unsigned char>(byte)) % 65521;
        b = (b + a) % 65521;
    }
    return stream + big_endian(b << 16 | a);
}

/// Writes pixels, 3 bytes each. A file of this name is replaced when the new one is complete.
inline void save_png(const std::vector<std::uint8_t>& rgb, std::int64_t width, const fs::path& path) {
    const auto row = static_cast<std::size_t>(width) * 3;
    std::string rows;
    for (std::size_t at = 0; at < rgb.size(); at += row) rows += '\0' + std::string(&rgb[at], &rgb[at] + row);  // no filter
    const auto height = static_cast<std::uint32_t>(rgb.size() / row);
    const std::string kind("\x08\x02\x00\x00\x00", 5);  // 8 bits, RGB, not interlaced
    const std::string header = big_endian(static_cast<std::uint32_t>(width)) + big_endian(height) + kind;
    fs::path unfinished = path;
    unfinished += ".part";
    std::ofstream file(unfinished, std::ios::binary);
    file << "\x89PNG\r\n\x1a\n" << chunk("IHDR", header) << chunk("IDAT", stored(rows)) << chunk("IEND", "");
    file.close();
    std::error_code error, ignored;
    if (file) fs::rename(unfinished, path, error);
    if (!file || error) {
        fs::remove(unfinished, ignored);
        throw Error(kMachine, path.string() + " cannot be written");
    }
}

}  // namespace sana
