// The tokenizer of a bundle: byte-pair merges as Gemma has them, in a tokenizer.json of the tokenizers library.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <unordered_map>
#include <vector>

namespace sana {

/// Gives the ids of `Tokenizer.from_file(path).encode(text).ids`.
class Tokenizer {
public:
    /// Throws BundleError if the file is damaged, or naming what this program does not support.
    explicit Tokenizer(const std::filesystem::path& path);

    /// The ids of a UTF-8 text, with those that the tokenizer puts around every text (BOS).
    std::vector<std::int64_t> encode(const std::string& text) const;

private:
    struct Token {
        std::string content;
        std::int64_t id;
    };
    struct Merge {
        std::size_t rank;
        std::int64_t id;
    };
    /// Tokens that are found in a text before it is split, by their first byte, longest first.
    using Trie = std::unordered_map<char, std::vector<Token>>;

    void append_merged(const std::string& text, std::vector<std::int64_t>& ids) const;
    std::vector<std::int64_t> characters(const std::string& text) const;
    const Merge* merge_of(std::int64_t left, std::int64_t right) const;

    std::unordered_map<std::string, std::int64_t> vocabulary_;
    std::unordered_map<std::uint64_t, Merge> merges_;
    /// The ids of <0x00> to <0xFF>, for characters without a token.
    std::vector<std::int64_t> bytes_;
    /// Found in the text as it is, and found in the text with its spaces replaced.
    Trie added_, added_normalized_;
    std::string space_, space_replacement_;
    std::vector<std::int64_t> before_, after_;
};

}  // namespace sana
