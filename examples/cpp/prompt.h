// Prompts as the text encoder reads them: tokens after the instruction, and what the bundle stores for the instruction.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "bundle.h"
#include "tokenizer.h"

namespace sana {

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
    /// Throws BundleError if the files are damaged or do not belong together.
    explicit PromptReader(const Bundle& bundle);

    /// The tokens of a prompt, alone or after the instruction. Throws UsageError if it is not UTF-8.
    Tokens tokenize(const std::string& prompt, bool after_instruction) const;

    /// The embedding rows [rows, C] of the tokens that are not shared, with zeros behind.
    std::vector<float> embeddings(const Tokens& tokens, std::size_t rows) const;

    /// Keys and values [layers, 2, heads, shared, dim] of the instruction's first `shared` tokens, and their shape.
    std::vector<float> prefix(std::size_t shared) const;
    std::vector<std::int64_t> prefix_shape(std::size_t shared) const;

    /// The text encoder's output [C] at BOS.
    const std::vector<float>& bos_row() const { return bos_row_; }

private:
    std::vector<std::int64_t> checked_ids(const std::string& text) const;

    const Bundle& bundle_;
    Tokenizer tokenizer_;
    TensorFile embeddings_;
    std::vector<std::int64_t> token_ids_, shape_;
    std::vector<float> prefix_, bos_row_;
};

}  // namespace sana
