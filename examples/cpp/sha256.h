// SHA-256, FIPS 180-4.
#pragma once

#include <filesystem>
#include <string>

namespace sana {

/// The hash of a file's content, 64 lowercase hexadecimal digits. Throws MachineError if the file cannot be read.
std::string sha256_of_file(const std::filesystem::path& path);

}  // namespace sana
