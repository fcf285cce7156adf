// The errors of this program: what is wrong, and the exit code, as `sana-export` has them.
#pragma once

#include <stdexcept>
#include <string>

namespace sana {

struct Error : std::runtime_error {
    Error(int exit_code, const std::string& what) : std::runtime_error(what), code(exit_code) {}
    int code;
};

/// The user asked for something that is not possible.
struct UsageError : Error {
    explicit UsageError(const std::string& what) : Error(2, what) {}
};

/// This machine refused something: a file cannot be written, memory is short.
struct MachineError : Error {
    explicit MachineError(const std::string& what) : Error(3, what) {}
};

/// The bundle is damaged, or it needs something that this program does not have.
struct BundleError : Error {
    explicit BundleError(const std::string& what) : Error(4, what) {}
};

}  // namespace sana
