// Images, and files of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <vector>

namespace sana {

/// 8 bits for each of red, green and blue, row by row.
struct Image {
    std::size_t width, height;
    std::vector<std::uint8_t> rgb;
};

/// Throws UsageError unless `path` ends in .png or .ppm.
void check_image_path(const std::filesystem::path& path);

/// Writes a PNG, not compressed, or a PPM. A file of this name is replaced when the new one is complete. Throws MachineError.
void save(const Image& image, const std::filesystem::path& path);

}  // namespace sana
