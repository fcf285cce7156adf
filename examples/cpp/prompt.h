// Prompts as the text encoder reads them: lower case, tokens after the instruction, and what the bundle stores for the instruction.
#pragma once

#include <algorithm>
#include <locale>
#include <string>
#include <vector>

#include "bundle.h"
#include "tokenizer.h"

namespace sana {

/// The character tables of a UTF-8 locale, whatever the user's own is. Throws std::runtime_error on a machine without any.
inline const std::ctype<wchar_t>& unicode() {
    static const std::locale locale("C.UTF-8");
    return std::use_facet<std::ctype<wchar_t>>(locale);
}

inline char32_t lower(char32_t c) { return static_cast<char32_t>(unicode().tolower(static_cast<wchar_t>(c))); }

inline bool has_case(char32_t c) { return lower(c) != c || static_cast<char32_t>(unicode().toupper(static_cast<wchar_t>(c))) != c; }

/// Marks inside a word, which Unicode skips when it looks for the end of one: the usual ones.
inline bool is_skipped(char32_t c) {
    return std::u32string(U"'.:^`\u00a8\u00ad\u00af\u00b4\u00b7\u00b8\u2018\u2019\u2024\u2027").find(c) != std::u32string::npos ||
           (c >= 0x300 && c <= 0x36f) || (c >= 0x200b && c <= 0x200f);
}

/// Whether the capital sigma at `at` ends a word: a letter with case before it, and none after it.
inline bool ends_word(const std::u32string& text, std::size_t at) {
    std::size_t before = at, after = at + 1;
    while (before > 0 && is_skipped(text[before - 1])) --before;
    while (after < text.size() && is_skipped(text[after])) ++after;
    return before > 0 && has_case(text[before - 1]) && !(after < text.size() && has_case(text[after]));
}

/// The white space of Python's `str.strip`.
inline bool is_space(char32_t c) {
    return (c >= 9 && c <= 13) || (c >= 28 && c <= 32) || c == 0x85 || c == 0xa0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200a) ||
           c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f || c == 0x3000;
}

/// `text` as Python's `text.lower().strip()` makes it. Throws an Error if it is not UTF-8.
inline std::string normalized_prompt(const std::string& text) {
    try {
        Json(text).dump();
    } catch (const Json::exception&) {
        throw Error(kUsage, "the prompt is not UTF-8");
    }
    std::u32string given, lowered;
    for (std::size_t at = 0; at < text.size();) {
        const std::size_t length = utf8_length(text[at]);
        char32_t c = static_cast<unsigned char>(text[at++]) & (length == 1 ? 0x7f : 0x7f >> length);
        for (std::size_t more = 1; more < length; ++more) c = c << 6 | (static_cast<unsigned char>(text[at++]) & 0x3f);
        given += c;
    }
    for (std::size_t at = 0; at < given.size(); ++at) {
        const char32_t c = given[at];
        lowered += c == 0x3a3 && ends_word(given, at) ? U'\u03c2' : c == 0x130 ? U'i' : lower(c);
        if (c == 0x130) lowered += U'\u0307';  // the only capital whose small form is two characters
    }
    while (!lowered.empty() && is_space(lowered.back())) lowered.pop_back();
    lowered.erase(lowered.begin(), std::find_if_not(lowered.begin(), lowered.end(), is_space));
    std::string result;
    for (const char32_t c : lowered) {
        const int more = c < 0x80 ? 0 : c < 0x800 ? 1 : c < 0x10000 ? 2 : 3;
        result += static_cast<char>(more == 0 ? c : 0xff00 >> (more + 1) | c >> 6 * more);
        for (int left = more - 1; left >= 0; --left) result += static_cast<char>(0x80 | (c >> 6 * left & 0x3f));
    }
    return result;
}

/// The tokens of one prompt.
struct Tokens {
    /// BOS first, then the instruction's tokens if the prompt follows it.
    std::vector<std::int64_t> ids;
    /// The denoiser gets row 0 and the rows from this one on.
    std::size_t first_kept;
    /// The leading ids that are the instruction's: their keys and values are in the bundle.
    std::size_t shared;
    /// The most ids that a prompt of this kind has.
    std::size_t limit;
    /// Ids that were cut off, because the prompt is too long.
    std::size_t dropped;

    std::size_t kept_rows() const { return 1 + (ids.size() > first_kept ? ids.size() - first_kept : 0); }
};

/// The text files of a bundle.
class PromptReader {
public:
    /// Throws an Error if the files are damaged or do not belong together.
    explicit PromptReader(const Bundle& bundle)
        : bundle_(bundle), tokenizer_(bundle.file("tokenizer/tokenizer.json")), embeddings_(bundle.file("embeddings.safetensors")) {
        const TensorFile stored(bundle.file("instruction.safetensors"));
        token_ids_ = stored.integers("token_ids");
        prefix_ = stored.floats("prefix");
        prefix_shape_ = stored.shape("prefix");
        bos_row_ = stored.floats("bos_row");
        const std::vector<std::int64_t> table = {bundle.embedding_rows, bundle.text_channels};
        const auto shared = static_cast<std::int64_t>(token_ids_.size()) - 1;
        together(shared >= 1 && prefix_shape_.size() == 5 && prefix_shape_[3] == shared, "token_ids and prefix");
        together(embeddings_.shape(kTable) == table, "the embedding table's shape");
        together(static_cast<std::int64_t>(bos_row_.size()) == table[1], "bos_row and the embedding table");
        together(checked_ids(bundle.instruction) == token_ids_, "the tokenizer gives other token_ids for the instruction");
        // The text encoder's graph has no sliding attention windows, which could matter for longer texts.
        together(token_ids_.size() + static_cast<std::size_t>(bundle.max_sequence_length) - 2 <= 2048,
                 "the instruction and max_sequence_length have more than 2048 tokens");
    }

    /// The tokens of a prompt, alone or after the instruction. Throws an Error if it is not UTF-8.
    Tokens tokenize(const std::string& prompt, bool after_instruction) const {
        Tokens tokens{};
        tokens.ids = checked_ids((after_instruction ? bundle_.instruction : "") + normalized_prompt(prompt));
        tokens.first_kept = after_instruction ? token_ids_.size() - 1 : 1;
        tokens.limit = tokens.first_kept + static_cast<std::size_t>(bundle_.max_sequence_length) - 1;
        tokens.dropped = tokens.ids.size() - std::min(tokens.ids.size(), tokens.limit);
        tokens.ids.resize(tokens.ids.size() - tokens.dropped);
        const std::size_t most = std::min({tokens.first_kept, tokens.ids.size(), token_ids_.size()});
        while (tokens.shared < most && tokens.ids[tokens.shared] == token_ids_[tokens.shared]) ++tokens.shared;
        return tokens;
    }

    /// The embedding rows [rows, C] of the tokens that are not shared, with zeros behind.
    std::vector<float> embeddings(const Tokens& tokens, std::size_t rows) const {
        const std::size_t width = bos_row_.size();
        const bool quantized = embeddings_.dtype(kTable) == "I8";  // integers, and a number for each row to multiply them with
        std::vector<float> values;
        for (std::size_t i = tokens.shared; i < tokens.ids.size(); ++i) {
            const auto id = static_cast<std::size_t>(tokens.ids[i]);
            const float scale = quantized ? embeddings_.floats("embed_tokens.scale", id, 1)[0] : 1;
            for (const float value : embeddings_.floats(kTable, id * width, width)) values.push_back(value * scale);
        }
        values.resize(rows * width);
        return values;
    }

    /// Keys and values [layers, 2, heads, shared, dim] of the instruction's first `shared` tokens, and their shape.
    std::vector<float> prefix(std::size_t shared) const {
        const auto dim = static_cast<std::size_t>(prefix_shape_[4]), whole = (token_ids_.size() - 1) * dim;
        std::vector<float> values;
        for (std::size_t start = 0; start < prefix_.size(); start += whole)
            values.insert(values.end(), &prefix_[start], &prefix_[start] + shared * dim);
        return values;
    }
    std::vector<std::int64_t> prefix_shape(std::size_t shared) const {
        std::vector<std::int64_t> shape = prefix_shape_;
        shape[3] = static_cast<std::int64_t>(shared);
        return shape;
    }

    /// The text encoder's output [C] at BOS.
    const std::vector<float>& bos_row() const { return bos_row_; }

private:
    static constexpr const char* kTable = "embed_tokens.weight";

    static void together(bool holds, const std::string& what) {
        require(holds, "the bundle's text files do not belong together: " + what);
    }

    std::vector<std::int64_t> checked_ids(const std::string& text) const {
        const std::vector<std::int64_t> ids = tokenizer_.encode(text);
        together(!ids.empty() && ids[0] == token_ids_[0], "the tokenizer does not start a text with the instruction's first token");
        for (const std::int64_t id : ids) together(id < bundle_.embedding_rows, "token " + std::to_string(id) + " has no row");
        return ids;
    }

    const Bundle& bundle_;
    Tokenizer tokenizer_;
    TensorFile embeddings_;
    std::vector<std::int64_t> token_ids_, prefix_shape_;
    std::vector<float> prefix_, bos_row_;
};

}  // namespace sana
