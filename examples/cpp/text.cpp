#include "text.h"

#include <locale>
#include <optional>

#include "errors.h"

namespace sana {
namespace {

/// The character tables of a UTF-8 locale, whatever the user's own is.
const std::optional<std::locale>& unicode_locale() {
    static const std::optional<std::locale> found = []() -> std::optional<std::locale> {
        for (const char* name : {"C.UTF-8", "en_US.UTF-8", ".UTF-8"}) {
            try {
                return std::locale(name);
            } catch (const std::runtime_error&) {  // this one is not installed
            }
        }
        return std::nullopt;
    }();
    return found;
}

char32_t lower(char32_t c) {
    if (c < 128) return c >= 'A' && c <= 'Z' ? c + 32 : c;
    if (!unicode_locale() || c > static_cast<char32_t>(WCHAR_MAX)) return c;
    return static_cast<char32_t>(std::tolower(static_cast<wchar_t>(c), *unicode_locale()));
}

bool has_case(char32_t c) {
    if (c < 128) return (c | 32) >= 'a' && (c | 32) <= 'z';
    if (!unicode_locale() || c > static_cast<char32_t>(WCHAR_MAX)) return false;
    const auto wide = static_cast<wchar_t>(c);
    return std::tolower(wide, *unicode_locale()) != wide || std::toupper(wide, *unicode_locale()) != wide;
}

/// Marks inside a word, which Unicode skips when it looks for the end of one: the usual ones.
bool is_skipped(char32_t c) {
    return std::u32string(U"'.:^`\u00a8\u00ad\u00af\u00b4\u00b7\u00b8\u2018\u2019\u2024\u2027").find(c) != std::u32string::npos ||
           (c >= 0x300 && c <= 0x36f) || (c >= 0x200b && c <= 0x200f);
}

/// Whether the capital sigma at `at` ends a word: a letter with case before it, and none after it.
bool ends_word(const std::u32string& text, std::size_t at) {
    std::size_t before = at, after = at + 1;
    while (before > 0 && is_skipped(text[before - 1])) --before;
    while (after < text.size() && is_skipped(text[after])) ++after;
    return before > 0 && has_case(text[before - 1]) && !(after < text.size() && has_case(text[after]));
}

/// The white space of Python's `str.strip`.
bool is_space(char32_t c) {
    return (c >= 9 && c <= 13) || (c >= 28 && c <= 32) || c == 0x85 || c == 0xa0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200a) ||
           c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f || c == 0x3000;
}

}  // namespace

std::size_t utf8_length(char lead) {
    const auto byte = static_cast<unsigned char>(lead);
    return byte < 0x80 ? 1 : byte < 0xe0 ? 2 : byte < 0xf0 ? 3 : 4;
}

std::u32string decode_utf8(const std::string& text, const std::string& what) {
    constexpr char32_t least[] = {0, 0, 0x80, 0x800, 0x10000};
    std::u32string characters;
    for (std::size_t at = 0; at < text.size();) {
        const auto byte = static_cast<unsigned char>(text[at]);
        const std::size_t length = utf8_length(text[at]);
        bool valid = at + length <= text.size() && (byte < 0x80 || (byte >= 0xc2 && byte <= 0xf4));
        char32_t c = length == 1 ? byte : byte & (0xff >> (length + 1));
        for (std::size_t next = 1; valid && next < length; ++next) {
            const auto more = static_cast<unsigned char>(text[at + next]);
            valid = (more & 0xc0) == 0x80;
            c = c << 6 | (more & 0x3f);
        }
        if (!valid || c < least[length] || c > 0x10ffff || (c >= 0xd800 && c <= 0xdfff))
            throw UsageError(what + " is not UTF-8: byte " + std::to_string(at));
        characters += c;
        at += length;
    }
    return characters;
}

std::string encode_utf8(const std::u32string& characters) {
    std::string text;
    for (const char32_t c : characters) {
        const int more = c < 0x80 ? 0 : c < 0x800 ? 1 : c < 0x10000 ? 2 : 3;
        text += static_cast<char>(more == 0 ? c : (0xff00 >> (more + 1) & 0xff) | c >> 6 * more);
        for (int left = more - 1; left >= 0; --left) text += static_cast<char>(0x80 | (c >> 6 * left & 0x3f));
    }
    return text;
}

std::string normalized_prompt(const std::string& text) {
    const std::u32string given = decode_utf8(text, "the prompt");
    std::u32string lowered;
    for (std::size_t at = 0; at < given.size(); ++at) {
        if (given[at] == 0x130) {  // the only capital whose small form is two characters
            lowered += U"i\u0307";
        } else if (given[at] == 0x3a3) {
            lowered += ends_word(given, at) ? U'\u03c2' : U'\u03c3';
        } else {
            lowered += lower(given[at]);
        }
    }
    std::size_t first = 0, stop = lowered.size();
    while (first < stop && is_space(lowered[first])) ++first;
    while (stop > first && is_space(lowered[stop - 1])) --stop;
    return encode_utf8(lowered.substr(first, stop - first));
}

}  // namespace sana
