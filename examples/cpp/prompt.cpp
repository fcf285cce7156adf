#include "prompt.h"

#include <algorithm>

#include "errors.h"
#include "text.h"

namespace sana {
namespace {

const char* const kTable = "embed_tokens.weight";
/// The text encoder's graph has no sliding attention windows, which could matter for longer texts.
constexpr std::size_t kMostTokens = 2048;

void require_together(bool whole, const std::string& what) {
    if (!whole) throw BundleError("the bundle's text files do not belong together: " + what);
}

}  // namespace

PromptReader::PromptReader(const Bundle& bundle)
    : bundle_(bundle), tokenizer_(bundle.file("tokenizer/tokenizer.json")), embeddings_(bundle.file("embeddings.safetensors")) {
    const TensorFile instruction(bundle.file("instruction.safetensors"));
    token_ids_ = instruction.integers("token_ids");
    shape_ = instruction.shape("prefix", 5);
    prefix_ = instruction.floats("prefix");
    bos_row_ = instruction.floats("bos_row");
    const std::vector<std::int64_t> table = embeddings_.shape(kTable, 2);
    require_together(token_ids_.size() >= 2 && shape_[3] == static_cast<std::int64_t>(token_ids_.size()) - 1, "token_ids and prefix");
    require_together(table[0] == bundle.model().embedding_rows && table[1] == bundle.model().text_channels, "the embedding table's shape");
    require_together(static_cast<std::int64_t>(bos_row_.size()) == table[1], "bos_row and the embedding table");
    require_together(checked_ids(bundle.model().instruction) == token_ids_, "the tokenizer gives other token_ids for the instruction");
    require_together(token_ids_.size() - 1 + static_cast<std::size_t>(bundle.model().max_sequence_length) - 1 <= kMostTokens,
            "the instruction and max_sequence_length have more than " + std::to_string(kMostTokens) + " tokens");
}

std::vector<std::int64_t> PromptReader::checked_ids(const std::string& text) const {
    const std::vector<std::int64_t> ids = tokenizer_.encode(text);
    require_together(!ids.empty() && ids[0] == token_ids_[0], "the tokenizer does not start a text with the instruction's first token");
    for (const std::int64_t id : ids) require_together(id < bundle_.model().embedding_rows, "token " + std::to_string(id) + " has no row");
    return ids;
}

Tokens PromptReader::tokenize(const std::string& prompt, bool after_instruction) const {
    Tokens tokens{};
    tokens.ids = checked_ids((after_instruction ? bundle_.model().instruction : "") + normalized_prompt(prompt));
    tokens.first_kept = after_instruction ? token_ids_.size() - 1 : 1;
    tokens.limit = tokens.first_kept + static_cast<std::size_t>(bundle_.model().max_sequence_length) - 1;
    if (tokens.ids.size() > tokens.limit) {
        tokens.dropped = tokens.ids.size() - tokens.limit;
        tokens.ids.resize(tokens.limit);
    }
    const std::size_t most = std::min({tokens.first_kept, tokens.ids.size(), token_ids_.size()});
    while (tokens.shared < most && tokens.ids[tokens.shared] == token_ids_[tokens.shared]) ++tokens.shared;
    return tokens;
}

std::vector<float> PromptReader::embeddings(const Tokens& tokens, std::size_t rows) const {
    std::vector<float> values;
    for (std::size_t i = tokens.shared; i < tokens.ids.size(); ++i) {
        const std::vector<float> row = embeddings_.row(kTable, tokens.ids[i]);
        values.insert(values.end(), row.begin(), row.end());
    }
    values.resize(rows * bos_row_.size());
    return values;
}

std::vector<std::int64_t> PromptReader::prefix_shape(std::size_t shared) const {
    std::vector<std::int64_t> shape = shape_;
    shape[3] = static_cast<std::int64_t>(shared);
    return shape;
}

std::vector<float> PromptReader::prefix(std::size_t shared) const {
    const auto whole = static_cast<std::size_t>(shape_[3] * shape_[4]), part = shared * static_cast<std::size_t>(shape_[4]);
    std::vector<float> values;
    for (std::size_t start = 0; start < prefix_.size(); start += whole) {
        const auto first = prefix_.begin() + static_cast<std::ptrdiff_t>(start);
        values.insert(values.end(), first, first + static_cast<std::ptrdiff_t>(part));
    }
    return values;
}

}  // namespace sana
