// The tokenizer of a bundle: byte-pair merges as Gemma has them, in a tokenizer.json of the tokenizers library.
#pragma once

#include <algorithm>
#include <functional>
#include <map>
#include <string>
#include <unordered_map>
#include <vector>

#include "bundle.h"

namespace sana {

/// The bytes of the character of a valid UTF-8 text that starts with `lead`.
inline std::size_t utf8_length(char lead) {
    const auto byte = static_cast<unsigned char>(lead);
    return byte < 0x80 ? 1 : byte < 0xe0 ? 2 : byte < 0xf0 ? 3 : 4;
}

/// Gives the ids of `Tokenizer.from_file(path).encode(text).ids`.
class Tokenizer {
public:
    using Ids = std::vector<std::int64_t>;

    /// Throws an Error if the file is damaged, or naming what this program does not support.
    explicit Tokenizer(const fs::path& path) {
        const Json document = read_json(path, 500'000'000);
        read_model(document.at("model"));
        read_normalizer(document.at("normalizer"), document.at("pre_tokenizer"));
        for (const Json& token : document.at("added_tokens")) {
            const auto content = token.at("content").get<std::string>();
            for (const char* key : {"single_word", "lstrip", "rstrip"})
                supported(!token.value(key, false), "the added token " + content + " has " + key);
            const bool normalized = token.value("normalized", false);
            const std::string found = normalized ? normalize(content) : content;
            if (!found.empty()) (normalized ? added_normalized_ : added_)[found[0]].emplace(found, id(token.at("id")));
        }
        const Json& processor = document.at("post_processor");
        if (processor.is_null()) return;
        supported(processor.at("type") == "TemplateProcessing", "post_processor " + processor.at("type").dump());
        bool text_seen = false;
        for (const Json& part : processor.at("single")) {
            text_seen = text_seen || part.contains("Sequence");
            if (part.contains("Sequence")) continue;
            const auto name = part.at("SpecialToken").at("id").get<std::string>();
            Ids& ids = text_seen ? after_ : before_;
            for (const Json& token : processor.at("special_tokens").at(name).at("ids")) ids.push_back(id(token));
        }
    }

    /// The ids of a UTF-8 text, with those that the tokenizer puts around every text (BOS).
    Ids encode(const std::string& text) const {
        Ids ids = before_;
        const auto merge = [&](const std::string& piece) { append_merged(piece, ids); };
        const auto split_again = [&](const std::string& piece) { split(normalize(piece), added_normalized_, ids, merge); };
        split(text, added_, ids, split_again);
        ids.insert(ids.end(), after_.begin(), after_.end());
        return ids;
    }

private:
    /// What two neighbors become. Lower ranks go first.
    struct Merge {
        std::size_t rank;
        std::int64_t id;
    };
    /// Tokens that are found in a text before it is merged, by their first byte. In this order a token comes before its own beginnings.
    using Added = std::unordered_map<char, std::map<std::string, std::int64_t, std::greater<>>>;
    static constexpr Merge kNoMerge = {static_cast<std::size_t>(-1), 0};

    static void supported(bool holds, const std::string& what) {
        require(holds, "this program does not support the bundle's tokenizer: " + what);
    }

    static std::int64_t id(const Json& value) { return integer(value, "a token's id", 0, INT32_MAX); }

    std::int64_t id_of(const std::string& token) const {
        const auto found = vocabulary_.find(token);
        require(found != vocabulary_.end(), "the bundle's tokenizer.json is damaged: it has no token " + token);
        return found->second;
    }

    static std::uint64_t pair_key(std::int64_t left, std::int64_t right) {
        return static_cast<std::uint64_t>(left) << 32 | static_cast<std::uint64_t>(right);
    }

    void read_model(const Json& model) {
        supported(model.at("type") == "BPE", "model type " + model.at("type").dump());
        supported(model.value("byte_fallback", false), "no byte_fallback");
        supported(!model.value("ignore_merges", false), "ignore_merges");
        for (const char* key : {"dropout", "continuing_subword_prefix", "end_of_word_suffix"}) {
            const Json value = model.value(key, Json());
            supported(value.is_null() || value == "", key + (": " + value.dump()));
        }
        for (const auto& [token, value] : model.at("vocab").items()) vocabulary_[token] = id(value);
        std::size_t rank = 0;
        for (const Json& merge : model.at("merges")) {  // a pair, or a text with a space between the two
            const std::string text = merge.is_string() ? merge.get<std::string>() : "";
            const std::size_t space = text.find(' ');
            const std::string left = merge.is_string() ? text.substr(0, space) : merge.at(0).get<std::string>();
            const std::string right = merge.is_string() ? text.substr(space + 1) : merge.at(1).get<std::string>();
            merges_[pair_key(id_of(left), id_of(right))] = {rank++, id_of(left + right)};
        }
        constexpr char digits[] = "0123456789ABCDEF";
        for (int byte = 0; byte < 256; ++byte)
            bytes_.push_back(id_of(std::string("<0x") + digits[byte >> 4] + digits[byte & 15] + ">"));
    }

    void read_normalizer(const Json& normalizer, const Json& pre_tokenizer) {
        if (!normalizer.is_null()) {
            const bool replace = normalizer.at("type") == "Replace" && normalizer.at("pattern").contains("String");
            supported(replace, "normalizer " + normalizer.dump());
            space_ = normalizer.at("pattern").at("String").get<std::string>();
            replacement_ = normalizer.at("content").get<std::string>();
        }
        if (!pre_tokenizer.is_null()) {  // Gemma's splits at what the normalizer has just replaced, so it never splits
            const bool idle = pre_tokenizer.at("type") == "Split" && !space_.empty() &&
                              pre_tokenizer.at("pattern") == normalizer.at("pattern") && !pre_tokenizer.value("invert", false) &&
                              replacement_.find(space_) == std::string::npos;
            supported(idle, "pre_tokenizer " + pre_tokenizer.dump());
        }
    }

    /// `text` with its spaces replaced.
    std::string normalize(const std::string& text) const {
        if (space_.empty()) return text;
        std::string result;
        std::size_t start = 0;
        for (std::size_t at; (at = text.find(space_, start)) != std::string::npos; start = at + space_.size())
            result.append(text, start, at - start).append(replacement_);
        return result.append(text, start);
    }

    /// Appends the ids of the tokens `added` in `text`, the longest at each place, and calls `piece` for the text between them.
    template <typename Piece>
    static void split(const std::string& text, const Added& added, Ids& ids, Piece piece) {
        std::size_t start = 0;
        for (std::size_t at = 0; at < text.size();) {
            std::size_t length = 0;
            if (const auto candidates = added.find(text[at]); candidates != added.end()) {
                for (const auto& [content, token] : candidates->second) {
                    if (text.compare(at, content.size(), content) != 0) continue;
                    if (at > start) piece(text.substr(start, at - start));
                    ids.push_back(token);
                    length = content.size();
                    break;
                }
            }
            at += length ? length : 1;
            if (length) start = at;
        }
        if (start < text.size()) piece(text.substr(start));
    }

    /// Merges neighbors, the pair of the lowest rank first, and of equal ones the first, until no pair is left.
    void append_merged(const std::string& text, Ids& ids) const {
        Ids symbols;  // the characters; those without a token as their bytes
        for (std::size_t at = 0; at < text.size(); at += utf8_length(text[at])) {
            const std::string character = text.substr(at, utf8_length(text[at]));
            if (const auto found = vocabulary_.find(character); found != vocabulary_.end()) {
                symbols.push_back(found->second);
            } else {
                for (const char byte : character) symbols.push_back(bytes_[static_cast<unsigned char>(byte)]);
            }
        }
        std::vector<Merge> merges;  // of each symbol with the next one
        for (std::size_t i = 0; i < symbols.size(); ++i) merges.push_back(merge_at(symbols, i));
        while (!merges.empty()) {
            const auto by_rank = [](const Merge& a, const Merge& b) { return a.rank < b.rank; };
            const auto first = std::min_element(merges.begin(), merges.end(), by_rank);
            if (first->rank == kNoMerge.rank) break;
            const auto at = static_cast<std::size_t>(first - merges.begin());
            symbols[at] = first->id;
            symbols.erase(symbols.begin() + static_cast<std::ptrdiff_t>(at) + 1);
            merges.erase(first);
            for (const std::size_t changed : {at, at ? at - 1 : at}) merges[changed] = merge_at(symbols, changed);
        }
        ids.insert(ids.end(), symbols.begin(), symbols.end());
    }

    Merge merge_at(const Ids& symbols, std::size_t at) const {
        if (at + 1 >= symbols.size()) return kNoMerge;
        const auto found = merges_.find(pair_key(symbols[at], symbols[at + 1]));
        return found == merges_.end() ? kNoMerge : found->second;
    }

    std::unordered_map<std::string, std::int64_t> vocabulary_;
    std::unordered_map<std::uint64_t, Merge> merges_;
    /// The ids of <0x00> to <0xFF>.
    Ids bytes_;
    /// Found in the text as it is, and found in the text with its spaces replaced.
    Added added_, added_normalized_;
    std::string space_, replacement_;
    Ids before_, after_;
};

}  // namespace sana
