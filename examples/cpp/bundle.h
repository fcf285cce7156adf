// A bundle on disk, as docs/bundle.md specifies it: the manifest, the files that it lists, and .safetensors files.
// A bundle may be a stranger's, so sizes are checked before anything is read or allocated.
#pragma once

#include <onnxruntime_cxx_api.h>

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace sana {

using Json = nlohmann::json;
namespace fs = std::filesystem;

/// The exit codes, as `sana-export` has them.
enum Code { kUsage = 2, kMachine = 3, kBundle = 4 };

struct Error : std::runtime_error {
    Error(Code error_code, const std::string& what) : std::runtime_error(what), code(error_code) {}
    Code code;
};

inline void require(bool holds, const std::string& what) {
    if (!holds) throw Error(kBundle, what);
}

/// A number from `least` to `most`. Throws an Error, naming `what`, for anything else.
inline double number(const Json& value, const std::string& what, double least, double most, Code code = kBundle) {
    const bool within = value.is_number() && value.get<double>() >= least && value.get<double>() <= most;
    if (!within) throw Error(code, what + " is " + value.dump() + ", wanted: " + Json(least).dump() + " to " + Json(most).dump());
    return value.get<double>();
}

inline std::int64_t integer(const Json& value, const std::string& what, std::int64_t least, std::int64_t most, Code code = kBundle) {
    const bool whole = value.is_number_integer() && value.get<double>() >= static_cast<double>(least) &&
                       value.get<double>() <= static_cast<double>(most);
    if (!whole) throw Error(code, what + " is " + value.dump() + ", wanted: " + std::to_string(least) + " to " + std::to_string(most));
    return value.get<std::int64_t>();
}

/// `bytes` bytes of a file. The caller has checked that the file is so large.
inline std::string read_bytes(const fs::path& path, std::uint64_t offset, std::uint64_t bytes) {
    std::string content(bytes, '\0');
    std::ifstream file(path, std::ios::binary);
    file.seekg(static_cast<std::streamoff>(offset));
    file.read(content.data(), static_cast<std::streamsize>(bytes));
    require(static_cast<bool>(file), path.string() + " cannot be read");
    return content;
}

/// The size of a file. Throws an Error unless it is there.
inline std::uint64_t size_of(const fs::path& path) {
    require(fs::is_regular_file(path), path.string() + " is not there");
    return fs::file_size(path);
}

/// A JSON document of at most `most_bytes`. Python's NaN and Infinity, which strict JSON does not have, become null.
inline Json read_json(const fs::path& path, std::uint64_t most_bytes) {
    const std::uint64_t size = size_of(path);
    require(size <= most_bytes, path.string() + " is too large");
    const std::string text = read_bytes(path, 0, size);
    std::string strict;
    bool quoted = false;
    for (std::size_t at = 0; at < text.size(); ++at) {
        if (text[at] == '"') quoted = !quoted;
        if (quoted && text[at] == '\\' && at + 1 < text.size()) strict += text[at++];
        std::size_t length = 0;
        if (!quoted) {
            for (const std::string_view word : {"NaN", "Infinity", "-Infinity"}) {
                if (text.compare(at, word.size(), word) == 0) length = word.size();
            }
        }
        strict += length ? "null" : std::string(1, text[at]);
        if (length) at += length - 1;
    }
    try {
        return Json::parse(strict);
    } catch (const Json::exception& failure) {
        throw Error(kBundle, path.string() + " is damaged: " + failure.what());
    }
}

/// The manifest of a bundle, and its files, of which the sizes have been checked. Their hashes are not.
class Bundle {
public:
    /// Throws an Error if the bundle is damaged, of another format, or this program cannot draw with it.
    explicit Bundle(const fs::path& folder) : folder_(folder) {
        require(fs::exists(folder / "manifest.json") || !fs::exists(folder / "model_index.json"),
                folder.string() + " is a checkpoint, not a bundle: sana-export export makes one of it");
        const Json manifest = read_json(folder / "manifest.json", 32 << 20);
        const Json format = manifest.value("format", Json());
        require(format == kFormat, folder.string() + " has the format " + format.dump() + ", wanted: " + std::to_string(kFormat) +
                                       ". Export it again with the sana-export that this program belongs to");
        require(manifest.at("options").at("precision") != "bf16",
                "ONNX Runtime cannot run a bundle in bf16 on a CPU. Export it with --dtype fp32 or fp16");
        read_model(manifest.at("model"));
        for (const Json& entry : manifest.at("files")) files_[entry.at("path").get<std::string>()] = checked(entry);
        for (const char* name : {"text_encoder", "context", "denoiser", "sampler", "vae_decoder", "postprocess"}) {
            require(manifest.at("graphs").contains(name), std::string("the bundle was exported without the graph ") + name);
            const Json& graph = manifest.at("graphs").at(name);
            for (const Json& data : graph.at("data")) checked(data);
            graphs[name] = {checked(graph.at("onnx")), graph.at("spec")};
        }
    }

    /// The path of a text file, which the manifest lists by this name.
    fs::path file(const std::string& name) const {
        require(files_.count(name) != 0, "the manifest does not list " + name);
        return files_.at(name);
    }

    /// The path of each graph, and its `spec` in the manifest.
    std::map<std::string, std::pair<fs::path, Json>> graphs;
    std::int64_t sample_size, latent_channels, vae_scale_factor, text_channels, embedding_rows, max_sequence_length, default_steps;
    double timestep_scale, default_guidance_scale;
    std::string instruction;
    Json scheduler;

private:
    static constexpr int kFormat = 3;

    void read_model(const Json& model) {
        const auto whole = [&](const char* key, std::int64_t most) { return integer(model.at(key), key, 1, most); };
        sample_size = whole("sample_size", 4096);
        latent_channels = whole("latent_channels", 4096);
        vae_scale_factor = whole("vae_scale_factor", 1024);
        text_channels = whole("text_channels", 1 << 17);
        embedding_rows = whole("embedding_rows", 1 << 24);
        max_sequence_length = whole("max_sequence_length", 1 << 16);
        default_steps = whole("default_steps", 1000);
        timestep_scale = number(model.at("timestep_scale"), "timestep_scale", 1e-6, 1e6);
        default_guidance_scale = number(model.at("default_guidance_scale"), "default_guidance_scale", -1000, 1000);
        instruction = model.at("instruction").get<std::string>();
        scheduler = model.at("scheduler");
        require(!model.value("guidance_embeds", false), "this program does not support SANA-Sprint checkpoints");
    }

    /// The path of a file entry. Throws an Error unless the file is inside the bundle, on every system, and has the right size.
    fs::path checked(const Json& entry) const {
        const auto name = entry.at("path").get<std::string>();
        const fs::path relative = fs::u8path(name);
        bool inside = !name.empty() && !relative.has_root_path() && name.find_first_of(std::string("\\:\0", 3)) == std::string::npos;
        for (const fs::path& part : relative) inside = inside && part != ".." && part != ".";
        require(inside, "the manifest names a file outside of the bundle: " + Json(name).dump());
        const fs::path path = folder_ / relative;
        const std::uint64_t found = size_of(path);
        require(entry.at("bytes") == found,
                path.string() + " has another size: " + std::to_string(found) + " bytes, wanted: " + entry.at("bytes").dump());
        return path;
    }

    fs::path folder_;
    std::map<std::string, fs::path> files_;
};

/// A .safetensors file, of which tensors and rows are read one at a time. The values are little-endian, as those of this machine.
class TensorFile {
public:
    /// Reads the header. Throws an Error if it is damaged, as the other functions do for a damaged tensor.
    explicit TensorFile(const fs::path& path) : path_(path), size_(size_of(path)) {
        std::uint64_t header = 0;
        if (size_ >= 8) std::memcpy(&header, read_bytes(path, 0, 8).data(), 8);
        require(size_ >= 8 && header <= size_ - 8 && header <= 100 << 20, path.string() + " is not a whole .safetensors file");
        start_ = 8 + header;
        tensors_ = Json::parse(read_bytes(path, 8, header));
    }

    std::string dtype(const std::string& name) const { return at(name).dtype; }
    std::vector<std::int64_t> shape(const std::string& name) const { return at(name).shape; }
    std::vector<float> floats(const std::string& name) const { return floats(name, 0, at(name).count); }

    /// `count` values from the one with the number `first`, as float.
    std::vector<float> floats(const std::string& name, std::uint64_t first, std::uint64_t count) const {
        const Tensor tensor = at(name);
        require(tensor.dtype != "I64", path_.string() + " is damaged: " + name + " is I64");
        require(first <= tensor.count && count <= tensor.count - first, path_.string() + " is too small for " + name);
        const std::string stored = read_bytes(path_, tensor.offset + first * tensor.item, count * tensor.item);
        std::vector<float> values(count);
        for (std::uint64_t i = 0; i < count; ++i) {
            std::uint16_t bits = 0;
            if (tensor.item == 2) std::memcpy(&bits, &stored[i * 2], 2);
            if (tensor.dtype == "I8") values[i] = static_cast<signed char>(stored[i]);
            if (tensor.dtype == "F32") std::memcpy(&values[i], &stored[i * 4], 4);
            if (tensor.dtype == "F16") values[i] = Ort::Float16_t::FromBits(bits).ToFloat();
            if (tensor.dtype == "BF16") values[i] = Ort::BFloat16_t::FromBits(bits).ToFloat();
        }
        return values;
    }

    std::vector<std::int64_t> integers(const std::string& name) const {
        const Tensor tensor = at(name);
        require(tensor.dtype == "I64", path_.string() + " is damaged: " + name + " is " + tensor.dtype + ", wanted: I64");
        std::vector<std::int64_t> values(tensor.count);
        const std::string stored = read_bytes(path_, tensor.offset, tensor.count * 8);
        std::copy_n(stored.data(), stored.size(), reinterpret_cast<char*>(values.data()));
        return values;
    }

private:
    struct Tensor {
        std::string dtype;
        std::vector<std::int64_t> shape;
        std::uint64_t offset, count, item;
    };

    /// A tensor whose values are in the file.
    Tensor at(const std::string& name) const {
        static const std::map<std::string, std::uint64_t> item_bytes = {{"F32", 4}, {"F16", 2}, {"BF16", 2}, {"I8", 1}, {"I64", 8}};
        require(tensors_.contains(name), path_.string() + " is damaged: it has no " + name);
        const Json& entry = tensors_.at(name);
        const auto dtype = entry.at("dtype").get<std::string>();
        require(item_bytes.count(dtype) != 0, path_.string() + " is damaged: " + name + " is " + dtype);
        Tensor tensor{dtype, {}, 0, 1, item_bytes.at(dtype)};
        for (const Json& side : entry.at("shape")) {
            tensor.shape.push_back(integer(side, "a side of " + name, 1, std::int64_t{1} << 31));
            require(tensor.count <= size_ / side.get<std::uint64_t>(), path_.string() + " is too small for " + name);
            tensor.count *= side.get<std::uint64_t>();
        }
        const auto limit = static_cast<std::int64_t>(size_ - start_);
        const std::int64_t first = integer(entry.at("data_offsets").at(0), "the offset of " + name, 0, limit);
        require(tensor.count <= static_cast<std::uint64_t>(limit - first) / tensor.item, path_.string() + " is too small for " + name);
        tensor.offset = start_ + static_cast<std::uint64_t>(first);
        return tensor;
    }

    fs::path path_;
    std::uint64_t size_, start_;
    Json tensors_;
};

}  // namespace sana
