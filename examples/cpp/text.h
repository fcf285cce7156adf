// Prompts as text: UTF-8, lowercase, white space.
#pragma once

#include <cstddef>
#include <string>

namespace sana {

/// The bytes of the character of a valid UTF-8 text that starts with `lead`.
std::size_t utf8_length(char lead);

/// A UTF-8 text as code points. Throws UsageError, naming `what`, if it is not UTF-8.
std::u32string decode_utf8(const std::string& text, const std::string& what);

std::string encode_utf8(const std::u32string& characters);

/// `text` as Python's `text.lower().strip()` makes it. Without a UTF-8 locale on this machine, only ASCII letters change.
std::string normalized_prompt(const std::string& text);

}  // namespace sana
