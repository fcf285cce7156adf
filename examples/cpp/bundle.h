// A bundle on disk: docs/bundle.md is the specification.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

namespace sana {

/// A JSON document of at most `most_bytes`. NaN and Infinity outside of texts, which Python writes, become null. Throws BundleError.
nlohmann::json read_json(const std::filesystem::path& path, std::uintmax_t most_bytes);

/// `bytes` bytes of a file. Throws BundleError if it has not so many.
std::vector<char> read_bytes(const std::filesystem::path& path, std::uint64_t offset, std::uint64_t bytes);

/// A JSON integer from `least` to `most`. Throws BundleError, naming `what`, for anything else.
std::int64_t integer(const nlohmann::json& value, const std::string& what, std::int64_t least, std::int64_t most);

/// A graph that the manifest lists.
struct GraphEntry {
    std::filesystem::path onnx;
    /// The files that it reads weights from.
    std::vector<std::filesystem::path> data;
    std::vector<std::string> inputs, outputs;
};

/// What the manifest says of the checkpoint, as far as sampling text to images needs it.
struct Model {
    std::int64_t sample_size, latent_channels, vae_scale_factor, text_channels, embedding_rows, max_sequence_length, default_steps;
    double timestep_scale, default_guidance_scale;
    std::string instruction;
    /// `scheduler`, as JSON.
    std::string scheduler;
};

/// The manifest of a bundle, and its files, of which the sizes have been checked. Their hashes are not.
class Bundle {
public:
    /// Reads `folder`/manifest.json. Throws BundleError if the bundle is damaged, of another format, or lacks one of `graphs`.
    Bundle(const std::filesystem::path& folder, const std::vector<std::string>& graphs);

    /// The path of a text file, which the manifest lists by this name.
    const std::filesystem::path& file(const std::string& name) const { return files_.at(name); }
    const GraphEntry& graph(const std::string& name) const { return graphs_.at(name); }
    const Model& model() const { return model_; }

private:
    std::filesystem::path checked(const nlohmann::json& entry) const;

    std::filesystem::path folder_;
    Model model_;
    std::map<std::string, std::filesystem::path> files_;
    std::map<std::string, GraphEntry> graphs_;
};

/// A .safetensors file, of which tensors and rows are read one at a time.
class TensorFile {
public:
    /// Reads the header. Throws BundleError if it is damaged.
    explicit TensorFile(const std::filesystem::path& path);

    /// The shape of a tensor. Throws BundleError if it is not there, or has not `dimensions` of them.
    std::vector<std::int64_t> shape(const std::string& name, std::size_t dimensions) const;
    std::vector<float> floats(const std::string& name) const;
    std::vector<std::int64_t> integers(const std::string& name) const;
    /// Row `index` of a matrix, as float.
    std::vector<float> row(const std::string& name, std::int64_t index) const;

private:
    struct Tensor {
        std::string dtype;
        std::vector<std::int64_t> shape;
        std::uint64_t offset, count;
    };
    const Tensor& at(const std::string& name) const;
    std::vector<float> widened(const Tensor& tensor, std::uint64_t first, std::uint64_t count) const;

    std::filesystem::path path_;
    std::map<std::string, Tensor> tensors_;
};

}  // namespace sana
