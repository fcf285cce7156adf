#include "bundle.h"

#include <cmath>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>

#include "errors.h"

namespace sana {
namespace {

using Json = nlohmann::json;
namespace fs = std::filesystem;

constexpr int kFormat = 3;
constexpr std::uintmax_t kMostManifestBytes = 32 << 20;
constexpr std::uint64_t kMostHeaderBytes = 100 << 20;
constexpr std::int64_t kMostNativeSize = 16384;
/// The text files of a bundle.
const char* const kFiles[] = {"tokenizer/tokenizer.json", "instruction.safetensors", "embeddings.safetensors"};

/// Python's NaN, Infinity and -Infinity, which strict JSON does not have, as null.
std::string strict_json(const std::string& text) {
    std::string strict;
    bool quoted = false;
    for (std::size_t at = 0; at < text.size();) {
        if (!quoted && (text[at] == 'N' || text[at] == 'I' || text[at] == '-')) {
            std::size_t length = 0;
            for (const std::string word : {"NaN", "Infinity", "-Infinity"}) {
                if (text.compare(at, word.size(), word) == 0) length = word.size();
            }
            if (length) {
                strict += "null";
                at += length;
                continue;
            }
        }
        if (text[at] == '"') quoted = !quoted;
        if (quoted && text[at] == '\\' && at + 1 < text.size()) strict += text[at++];
        strict += text[at++];
    }
    return strict;
}

double number(const Json& value, const std::string& what, double least, double most) {
    if (value.is_number()) {
        const double found = value.get<double>();
        if (found >= least && found <= most) return found;
    }
    throw BundleError(what + " is out of range: " + value.dump());
}

/// Whether a path of a manifest stays in the bundle on every system.
bool stays_inside(const std::string& text) {
    const fs::path path = fs::u8path(text);
    if (text.empty() || path.is_absolute() || path.has_root_path() || text.find_first_of("\\:") != std::string::npos) return false;
    for (const fs::path& part : path) {
        if (part == ".." || part == ".") return false;
    }
    return text.find('\0') == std::string::npos;
}

Model read_model(const Json& json) {
    const auto whole = [&](const char* key, std::int64_t most) { return integer(json.at(key), key, 1, most); };
    Model model{};
    model.sample_size = whole("sample_size", 4096);
    model.latent_channels = whole("latent_channels", 4096);
    model.vae_scale_factor = whole("vae_scale_factor", 1024);
    model.text_channels = whole("text_channels", 1 << 17);
    model.embedding_rows = whole("embedding_rows", 1 << 24);
    model.max_sequence_length = whole("max_sequence_length", 1 << 16);
    model.default_steps = whole("default_steps", 1000);
    model.timestep_scale = number(json.at("timestep_scale"), "timestep_scale", 1e-6, 1e6);
    model.default_guidance_scale = number(json.at("default_guidance_scale"), "default_guidance_scale", -1000, 1000);
    model.instruction = json.at("instruction").get<std::string>();
    model.scheduler = json.at("scheduler").dump();
    if (model.sample_size * model.vae_scale_factor > kMostNativeSize) throw BundleError("the native size is out of range");
    if (json.value("guidance_embeds", false))
        throw BundleError("this program does not support SANA-Sprint checkpoints: guidance_embeds is true");
    return model;
}

std::vector<std::string> names(const Json& tensors) {
    std::vector<std::string> found;
    for (const Json& tensor : tensors) found.push_back(tensor.at("name").get<std::string>());
    return found;
}

float half_to_float(std::uint16_t half) {
    const int exponent = half >> 10 & 31, mantissa = half & 1023;
    const float size = exponent == 31  ? (mantissa ? NAN : INFINITY)
                       : exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                       : std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
    return half & 0x8000 ? -size : size;
}

float bfloat_to_float(std::uint16_t stored) {
    const std::uint32_t bits = static_cast<std::uint32_t>(stored) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

/// The sizes of the dtypes that a bundle's .safetensors files have. The values are little-endian, as those of this machine.
const std::map<std::string, std::uint64_t> kItemBytes = {{"F32", 4}, {"F16", 2}, {"BF16", 2}, {"I64", 8}};

}  // namespace

Json read_json(const fs::path& path, std::uintmax_t most_bytes) {
    std::error_code error;
    if (!fs::is_regular_file(path, error)) throw BundleError(path.string() + " is not there");
    if (fs::file_size(path, error) > most_bytes || error) throw BundleError(path.string() + " is too large");
    std::ifstream file(path, std::ios::binary);
    const std::string text{std::istreambuf_iterator<char>(file), {}};
    try {
        return Json::parse(strict_json(text));
    } catch (const Json::exception& failure) {
        throw BundleError(path.string() + " is damaged: " + failure.what());
    }
}

std::vector<char> read_bytes(const fs::path& path, std::uint64_t offset, std::uint64_t bytes) {
    std::vector<char> values(bytes);
    std::ifstream file(path, std::ios::binary);
    file.seekg(static_cast<std::streamoff>(offset));
    file.read(values.data(), static_cast<std::streamsize>(bytes));
    if (!file) throw BundleError(path.string() + " cannot be read");
    return values;
}

std::int64_t integer(const Json& value, const std::string& what, std::int64_t least, std::int64_t most) {
    if (value.is_number_integer() && value.get<double>() >= static_cast<double>(least) &&
        value.get<double>() <= static_cast<double>(most))
        return value.get<std::int64_t>();
    throw BundleError(what + " is out of range: " + value.dump());
}

Bundle::Bundle(const fs::path& folder, const std::vector<std::string>& graphs) : folder_(folder) {
    if (fs::is_regular_file(folder / "model_index.json") && !fs::exists(folder / "manifest.json"))
        throw BundleError(folder.string() + " is a checkpoint, not a bundle: sana-export export makes one of it");
    const Json manifest = read_json(folder / "manifest.json", kMostManifestBytes);
    const Json format = manifest.value("format", Json());
    if (format != kFormat)
        throw BundleError(folder.string() + " has the format " + format.dump() + ", wanted: " + std::to_string(kFormat) +
                          ". Export it again with the sana-export that this program belongs to");
    model_ = read_model(manifest.at("model"));
    const auto precision = manifest.at("options").at("precision").get<std::string>();
    if (precision == "bf16") throw BundleError("ONNX Runtime cannot run a bundle in bf16 on a CPU. Export it with --dtype fp32 or fp16");

    for (const Json& entry : manifest.at("files")) files_[entry.at("path").get<std::string>()] = checked(entry);
    for (const char* name : kFiles) {
        if (!files_.count(name)) throw BundleError("the manifest does not list " + std::string(name));
    }
    for (const std::string& name : graphs) {
        if (!manifest.at("graphs").contains(name)) throw BundleError("the bundle was exported without the graph " + name);
        const Json& graph = manifest.at("graphs").at(name);
        GraphEntry& entry = graphs_[name];
        entry = {checked(graph.at("onnx")), {}, names(graph.at("spec").at("inputs")), names(graph.at("spec").at("outputs"))};
        for (const Json& data : graph.at("data")) entry.data.push_back(checked(data));
    }
}

/// The path of a file entry whose file exists with the right size.
fs::path Bundle::checked(const Json& entry) const {
    const auto name = entry.at("path").get<std::string>();
    if (!stays_inside(name)) throw BundleError("the manifest names a file outside of the bundle: " + Json(name).dump());
    const fs::path path = folder_ / fs::u8path(name);
    const std::int64_t wanted = integer(entry.at("bytes"), "the size of " + name, 0, std::int64_t{1} << 50);
    std::error_code error;
    if (!fs::is_regular_file(path, error)) throw BundleError(path.string() + " is not there");
    const std::uintmax_t found = fs::file_size(path, error);
    if (error || found != static_cast<std::uintmax_t>(wanted))
        throw BundleError(path.string() + " has another size: " + std::to_string(found) + " bytes, wanted: " + std::to_string(wanted));
    return path;
}

TensorFile::TensorFile(const fs::path& path) : path_(path) {
    const std::uintmax_t size = fs::file_size(path);
    const auto damaged = [&] { return BundleError(path.string() + " is not a whole .safetensors file"); };
    if (size < 8) throw damaged();
    std::uint64_t header = 0;
    std::memcpy(&header, read_bytes(path, 0, 8).data(), 8);
    if (header > kMostHeaderBytes || header > size - 8) throw damaged();
    const std::vector<char> text = read_bytes(path, 8, header);
    const Json tensors = Json::parse(text.begin(), text.end());
    for (const auto& [name, entry] : tensors.items()) {
        if (name == "__metadata__") continue;
        const auto limit = static_cast<std::int64_t>(size - 8 - header);
        Tensor tensor{entry.at("dtype").get<std::string>(), {}, 0, 1};
        if (!kItemBytes.count(tensor.dtype)) continue;  // `at` says that it is not there
        for (const Json& side : entry.at("shape")) {
            tensor.shape.push_back(integer(side, "a side of " + name, 0, std::int64_t{1} << 31));
            tensor.count *= static_cast<std::uint64_t>(tensor.shape.back());
            if (tensor.count > size) throw damaged();
        }
        const std::int64_t first = integer(entry.at("data_offsets").at(0), "the offset of " + name, 0, limit);
        const std::int64_t stop = integer(entry.at("data_offsets").at(1), "the offset of " + name, first, limit);
        if (tensor.count * kItemBytes.at(tensor.dtype) != static_cast<std::uint64_t>(stop - first)) throw damaged();
        tensor.offset = 8 + header + static_cast<std::uint64_t>(first);
        tensors_[name] = tensor;
    }
}

const TensorFile::Tensor& TensorFile::at(const std::string& name) const {
    const auto found = tensors_.find(name);
    if (found == tensors_.end()) throw BundleError(path_.string() + " is damaged: it has no " + name + " that can be read");
    return found->second;
}

std::vector<std::int64_t> TensorFile::shape(const std::string& name, std::size_t dimensions) const {
    const Tensor& tensor = at(name);
    if (tensor.shape.size() != dimensions)
        throw BundleError(path_.string() + " is damaged: " + name + " has " + std::to_string(tensor.shape.size()) +
                          " dimensions, wanted: " + std::to_string(dimensions));
    return tensor.shape;
}

/// `count` values from the one with the number `first`, as float.
std::vector<float> TensorFile::widened(const Tensor& tensor, std::uint64_t first, std::uint64_t count) const {
    const std::uint64_t item = kItemBytes.at(tensor.dtype);
    if (tensor.dtype == "I64") throw BundleError(path_.string() + " is damaged: integers in place of numbers");
    const std::vector<char> stored = read_bytes(path_, tensor.offset + first * item, count * item);
    std::vector<float> values(count);
    for (std::uint64_t i = 0; i < count; ++i) {
        if (item == 4) {
            std::memcpy(&values[i], &stored[i * 4], 4);
        } else {
            std::uint16_t bits;
            std::memcpy(&bits, &stored[i * 2], 2);
            values[i] = tensor.dtype == "F16" ? half_to_float(bits) : bfloat_to_float(bits);
        }
    }
    return values;
}

std::vector<float> TensorFile::floats(const std::string& name) const { return widened(at(name), 0, at(name).count); }

std::vector<std::int64_t> TensorFile::integers(const std::string& name) const {
    const Tensor& tensor = at(name);
    if (tensor.dtype != "I64") throw BundleError(path_.string() + " is damaged: " + name + " is " + tensor.dtype + ", wanted: I64");
    const std::vector<char> stored = read_bytes(path_, tensor.offset, tensor.count * 8);
    std::vector<std::int64_t> values(tensor.count);
    if (!values.empty()) std::memcpy(values.data(), stored.data(), stored.size());
    return values;
}

std::vector<float> TensorFile::row(const std::string& name, std::int64_t index) const {
    const std::vector<std::int64_t> sides = shape(name, 2);
    if (index < 0 || index >= sides[0]) throw BundleError(path_.string() + " is damaged: it has no row " + std::to_string(index));
    const auto width = static_cast<std::uint64_t>(sides[1]);
    return widened(at(name), static_cast<std::uint64_t>(index) * width, width);
}

}  // namespace sana
