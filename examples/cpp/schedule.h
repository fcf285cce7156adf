// The steps of a sampling run as a table, which the graph `sampler` reads.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "bundle.h"

namespace sana {

/// One step.
struct Step {
    /// The denoiser's timestep, before `timestep_scale`.
    float timestep;
    /// The sampler's input: factors on latents and guided noise_pred (for x0), then on latents, x0, three earlier x0, and noise.
    std::array<float, 8> coefficients;
};

/// Throws an Error for settings that this program has no formulas for. Other keys of the config have no effect on these.
inline void check_supported(const Json& config) {
    const std::vector<std::pair<const char*, std::vector<Json>>> supported = {
        {"_class_name", {"DPMSolverMultistepScheduler"}},
        {"algorithm_type", {"dpmsolver++"}},
        {"solver_type", {"midpoint", "heun"}},
        {"solver_order", {1, 2}},
        {"prediction_type", {"flow_prediction"}},
        {"final_sigmas_type", {"zero"}},
        {"use_flow_sigmas", {true}},
        {"use_karras_sigmas", {false, nullptr}},
        {"use_exponential_sigmas", {false, nullptr}},
        {"use_beta_sigmas", {false, nullptr}},
        {"use_lu_lambdas", {false, nullptr}},
        {"thresholding", {false, nullptr}},
    };
    for (const auto& [key, values] : supported) {
        require(std::find(values.begin(), values.end(), config.at(key)) != values.end(),
                "this program does not support the bundle's scheduler: " + std::string(key) + " is " + config.at(key).dump() +
                    ", supported: " + Json(values).dump());
    }
}

/// A logarithm or exponential in double precision, rounded once to float, as diffusers' float32 tensors have it.
inline float rounded_log(float x) { return static_cast<float>(std::log(static_cast<double>(x))); }
inline float rounded_exp(float x) { return static_cast<float>(std::exp(static_cast<double>(x))); }

/// The schedule of `steps` steps of DPM-Solver++ of order 1 or 2 for flows, as `config`, the manifest's `model.scheduler`, has it.
inline std::vector<Step> make_schedule(const Json& config, int steps) {
    check_supported(config);
    const double train_steps = number(config.at("num_train_timesteps"), "num_train_timesteps", 1, 1e6);
    const double shift = number(config.at("flow_shift"), "flow_shift", 1e-6, 1e6);

    // set_timesteps: noise levels from 1 down, shifted towards 1, and 0 at the end.
    std::vector<float> sigmas, timesteps, log_snr;
    const double width = (1 / train_steps - 1) / steps;
    for (int step = 0; step < steps; ++step) {
        const int index = steps - step;  // from the end of linspace(1, 1 / train_steps, steps + 1)
        const double linear = 1.0 - (index == steps ? 1 / train_steps : index * width + 1);
        const double sigma = shift * linear / (1 + (shift - 1) * linear);
        sigmas.push_back(static_cast<float>(sigma));
        timesteps.push_back(static_cast<float>(static_cast<long long>(sigma * train_steps)));
    }
    sigmas.push_back(0);
    for (const float sigma : sigmas) log_snr.push_back(rounded_log(1.0f - sigma) - rounded_log(sigma));

    // The update from sigma s to sigma t in float, as diffusers computes it: h is the step in log SNR, which is infinite at the end.
    const bool midpoint = config.at("solver_type") == "midpoint";
    std::vector<Step> table;
    for (int step = 0; step < steps; ++step) {
        const float h = log_snr[step + 1] - log_snr[step];
        const float alpha = 1.0f - sigmas[step + 1], gone = rounded_exp(-h) - 1.0f;
        const float on_x0 = -(alpha * gone);
        const float on_slope = midpoint ? -(0.5f * (alpha * gone)) : alpha * (gone / h + 1.0f);
        Step row{timesteps[step], {1, -sigmas[step], sigmas[step + 1] / sigmas[step], on_x0, 0, 0, 0, 0}};
        if (step != 0 && step != steps - 1 && config.at("solver_order") == 2) {  // the slope is (x0 - previous x0) / r
            const float r = (log_snr[step] - log_snr[step - 1]) / h;
            const double share = on_slope * (1 / static_cast<double>(r));
            row.coefficients[3] = static_cast<float>(on_x0 + share);
            row.coefficients[4] = static_cast<float>(-share);
        }
        for (const float value : row.coefficients)
            require(std::isfinite(value), "the bundle's scheduler has no finite schedule of " + std::to_string(steps) + " steps");
        table.push_back(row);
    }
    return table;
}

}  // namespace sana
