#include "tokenizer.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <queue>
#include <tuple>

#include "bundle.h"
#include "errors.h"
#include "text.h"

namespace sana {
namespace {

using Json = nlohmann::json;
constexpr std::uintmax_t kMostBytes = 500'000'000;

void require_supported(bool supported, const std::string& what) {
    if (!supported) throw BundleError("this program does not support the bundle's tokenizer: " + what);
}

void check_model(const Json& model) {
    require_supported(model.at("type") == "BPE", "model type " + model.at("type").dump());
    require_supported(model.value("byte_fallback", false), "no byte_fallback");
    require_supported(!model.value("ignore_merges", false), "ignore_merges");
    for (const char* key : {"dropout", "continuing_subword_prefix", "end_of_word_suffix"}) {
        const Json value = model.value(key, Json());
        require_supported(value.is_null() || value == "", key + (": " + value.dump()));
    }
}

std::uint64_t pair_key(std::int64_t left, std::int64_t right) {
    return static_cast<std::uint64_t>(left) << 32 | static_cast<std::uint64_t>(right);
}

std::string replaced(const std::string& text, const std::string& from, const std::string& to) {
    if (from.empty()) return text;
    std::string result;
    std::size_t start = 0;
    for (std::size_t at; (at = text.find(from, start)) != std::string::npos; start = at + from.size())
        result.append(text, start, at - start).append(to);
    return result.append(text, start);
}

/// Calls `piece` for the text between the tokens of `trie` and `token` for their ids, in order. Of several tokens at one place
/// it takes the longest.
template <typename Trie, typename Piece, typename Found>
void split(const std::string& text, const Trie& trie, Piece piece, Found token) {
    std::size_t start = 0;
    for (std::size_t at = 0; at < text.size();) {
        const auto candidates = trie.find(text[at]);
        std::size_t length = 0;
        if (candidates != trie.end()) {
            for (const auto& candidate : candidates->second) {
                if (text.compare(at, candidate.content.size(), candidate.content) != 0) continue;
                if (at > start) piece(text.substr(start, at - start));
                token(candidate.id);
                length = candidate.content.size();
                break;
            }
        }
        at += length ? length : 1;
        if (length) start = at;
    }
    if (start < text.size()) piece(text.substr(start));
}

}  // namespace

Tokenizer::Tokenizer(const std::filesystem::path& path) {
    const Json document = read_json(path, kMostBytes);
    const Json& model = document.at("model");
    check_model(model);
    for (const auto& [token, id] : model.at("vocab").items()) vocabulary_[token] = integer(id, "a token's id", 0, INT32_MAX);

    const auto id_of = [&](const std::string& token) {
        const auto found = vocabulary_.find(token);
        if (found == vocabulary_.end()) throw BundleError(path.string() + " is damaged: a merge has no token");
        return found->second;
    };
    std::size_t rank = 0;
    for (const Json& merge : model.at("merges")) {  // a pair, or a text with a space between the two
        std::string left, right;
        if (merge.is_string()) {
            const auto text = merge.get<std::string>();
            const std::size_t space = text.find(' ');
            if (space == std::string::npos) throw BundleError(path.string() + " is damaged: a merge is not a pair");
            left = text.substr(0, space);
            right = text.substr(space + 1);
        } else {
            left = merge.at(0).get<std::string>();
            right = merge.at(1).get<std::string>();
        }
        merges_[pair_key(id_of(left), id_of(right))] = {rank++, id_of(left + right)};
    }
    for (int byte = 0; byte < 256; ++byte) {
        constexpr char digits[] = "0123456789ABCDEF";
        const auto found = vocabulary_.find(std::string("<0x") + digits[byte >> 4] + digits[byte & 15] + ">");
        require_supported(found != vocabulary_.end(), "it lacks tokens of bytes");
        bytes_.push_back(found->second);
    }

    const Json& normalizer = document.at("normalizer");
    if (!normalizer.is_null()) {
        require_supported(normalizer.at("type") == "Replace" && normalizer.at("pattern").contains("String"), "normalizer " + normalizer.dump());
        space_ = normalizer.at("pattern").at("String").get<std::string>();
        space_replacement_ = normalizer.at("content").get<std::string>();
    }
    const Json& pre_tokenizer = document.at("pre_tokenizer");
    if (!pre_tokenizer.is_null()) {  // Gemma's splits at what the normalizer has just replaced, so it never splits
        const bool idle = pre_tokenizer.at("type") == "Split" && !space_.empty() &&
                          pre_tokenizer.at("pattern") == normalizer.at("pattern") &&
                          !pre_tokenizer.value("invert", false) && space_replacement_.find(space_) == std::string::npos;
        require_supported(idle, "pre_tokenizer " + pre_tokenizer.dump());
    }

    for (const Json& token : document.at("added_tokens")) {
        const auto content = token.at("content").get<std::string>();
        for (const char* key : {"single_word", "lstrip", "rstrip"})
            require_supported(!token.value(key, false), "the added token " + content + " has " + key);
        if (content.empty()) continue;
        const bool normalized = token.value("normalized", false);
        const std::string found = normalized ? replaced(content, space_, space_replacement_) : content;
        auto& place = (normalized ? added_normalized_ : added_)[found[0]];
        place.push_back({found, integer(token.at("id"), "a token's id", 0, INT32_MAX)});
        std::stable_sort(place.begin(), place.end(),
                         [](const Token& a, const Token& b) { return a.content.size() > b.content.size(); });
    }

    const Json& processor = document.at("post_processor");
    if (processor.is_null()) return;
    require_supported(processor.at("type") == "TemplateProcessing", "post_processor " + processor.at("type").dump());
    bool text_seen = false;
    for (const Json& part : processor.at("single")) {
        if (part.contains("Sequence")) {
            text_seen = true;
            continue;
        }
        const auto name = part.at("SpecialToken").at("id").get<std::string>();
        for (const Json& id : processor.at("special_tokens").at(name).at("ids"))
            (text_seen ? after_ : before_).push_back(integer(id, "a token's id", 0, INT32_MAX));
    }
}

std::vector<std::int64_t> Tokenizer::encode(const std::string& text) const {
    std::vector<std::int64_t> ids = before_;
    const auto add = [&](std::int64_t id) { ids.push_back(id); };
    const auto merge = [&](const std::string& piece) { append_merged(piece, ids); };
    const auto normalize = [&](const std::string& piece) {
        split(replaced(piece, space_, space_replacement_), added_normalized_, merge, add);
    };
    split(text, added_, normalize, add);
    ids.insert(ids.end(), after_.begin(), after_.end());
    return ids;
}

/// The ids of the characters; those without a token as their bytes.
std::vector<std::int64_t> Tokenizer::characters(const std::string& text) const {
    std::vector<std::int64_t> ids;
    for (std::size_t at = 0; at < text.size();) {
        const std::string character = text.substr(at, utf8_length(text[at]));
        const auto found = vocabulary_.find(character);
        if (found != vocabulary_.end()) {
            ids.push_back(found->second);
        } else {
            for (const char byte : character) ids.push_back(bytes_[static_cast<unsigned char>(byte)]);
        }
        at += character.size();
    }
    return ids;
}

const Tokenizer::Merge* Tokenizer::merge_of(std::int64_t left, std::int64_t right) const {
    const auto found = merges_.find(pair_key(left, right));
    return found == merges_.end() ? nullptr : &found->second;
}

/// Merges neighbors, the pair of the lowest rank first, and of equal ones the first, until no pair is left.
void Tokenizer::append_merged(const std::string& text, std::vector<std::int64_t>& ids) const {
    constexpr auto none = static_cast<std::size_t>(-1);
    std::vector<std::int64_t> symbols = characters(text);
    std::vector<std::size_t> next(symbols.size()), previous(symbols.size());
    using Candidate = std::tuple<std::size_t, std::size_t, std::int64_t>;  // rank, place, id of the result
    std::priority_queue<Candidate, std::vector<Candidate>, std::greater<Candidate>> queue;
    const auto consider = [&](std::size_t left) {
        if (left == none || next[left] == none) return;
        if (const Merge* merge = merge_of(symbols[left], symbols[next[left]])) queue.push({merge->rank, left, merge->id});
    };
    for (std::size_t i = 0; i < symbols.size(); ++i) {
        next[i] = i + 1 < symbols.size() ? i + 1 : none;
        previous[i] = i ? i - 1 : none;
    }
    for (std::size_t i = 0; i < symbols.size(); ++i) consider(i);
    while (!queue.empty()) {
        const auto [rank, left, id] = queue.top();
        queue.pop();
        if (symbols[left] < 0 || next[left] == none) continue;  // one of the two was merged with another neighbor
        const Merge* merge = merge_of(symbols[left], symbols[next[left]]);
        if (!merge || merge->id != id) continue;
        const std::size_t right = next[left];
        symbols[left] = id;
        symbols[right] = -1;
        next[left] = next[right];
        if (next[right] != none) previous[next[right]] = left;
        consider(previous[left]);
        consider(left);
    }
    for (const std::int64_t symbol : symbols) {
        if (symbol >= 0) ids.push_back(symbol);
    }
}

}  // namespace sana
