#include "image_file.h"

#include <algorithm>
#include <fstream>
#include <string>

#include "errors.h"

namespace sana {
namespace {

void append_number(std::string& bytes, std::uint32_t number) {
    for (int shift = 24; shift >= 0; shift -= 8) bytes += static_cast<char>(number >> shift & 0xff);
}

std::uint32_t crc32(const std::string& bytes) {
    std::uint32_t crc = ~0u;
    for (const char byte : bytes) {
        crc ^= static_cast<unsigned char>(byte);
        for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? 0xedb88320u : 0);
    }
    return ~crc;
}

std::uint32_t adler32(const std::string& bytes) {
    std::uint32_t a = 1, b = 0;
    for (const char byte : bytes) {
        a = (a + static_cast<unsigned char>(byte)) % 65521;
        b = (b + a) % 65521;
    }
    return b << 16 | a;
}

/// zlib's format with blocks that are stored, not compressed.
std::string stored(const std::string& bytes) {
    constexpr std::size_t most = 65535;
    std::string stream = "\x78\x01";
    for (std::size_t at = 0; at < bytes.size(); at += most) {
        const std::size_t count = std::min(most, bytes.size() - at);
        stream += at + count == bytes.size() ? '\1' : '\0';
        for (const std::size_t number : {count, ~count}) {
            stream += static_cast<char>(number & 0xff);
            stream += static_cast<char>(number >> 8 & 0xff);
        }
        stream.append(bytes, at, count);
    }
    append_number(stream, adler32(bytes));
    return stream;
}

std::string chunk(const std::string& type, const std::string& content) {
    std::string bytes;
    append_number(bytes, static_cast<std::uint32_t>(content.size()));
    bytes += type + content;
    append_number(bytes, crc32(type + content));
    return bytes;
}

std::string png(const Image& image) {
    std::string header;
    append_number(header, static_cast<std::uint32_t>(image.width));
    append_number(header, static_cast<std::uint32_t>(image.height));
    header += std::string("\x08\x02\x00\x00\x00", 5);  // 8 bits, RGB, not interlaced
    std::string rows;
    for (std::size_t y = 0; y < image.height; ++y) {
        rows += '\0';  // no filter
        rows.append(reinterpret_cast<const char*>(&image.rgb[y * image.width * 3]), image.width * 3);
    }
    return "\x89PNG\r\n\x1a\n" + chunk("IHDR", header) + chunk("IDAT", stored(rows)) + chunk("IEND", "");
}

std::string ppm(const Image& image) {
    return "P6\n" + std::to_string(image.width) + " " + std::to_string(image.height) + "\n255\n" +
           std::string(image.rgb.begin(), image.rgb.end());
}

}  // namespace

void check_image_path(const std::filesystem::path& path) {
    if (path.extension() != ".png" && path.extension() != ".ppm")
        throw UsageError("unsupported image format: " + path.string() + ", wanted: a name that ends in .png or .ppm");
}

void save(const Image& image, const std::filesystem::path& path) {
    const std::string bytes = path.extension() == ".png" ? png(image) : ppm(image);
    std::filesystem::path unfinished = path;
    unfinished += ".part";
    std::ofstream file(unfinished, std::ios::binary);
    file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    file.close();
    std::error_code error;
    if (file) std::filesystem::rename(unfinished, path, error);
    if (!file || error) {
        std::error_code ignored;
        std::filesystem::remove(unfinished, ignored);
        throw MachineError(path.string() + " cannot be written");
    }
}

}  // namespace sana
