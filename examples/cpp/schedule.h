// The steps of a sampling run as a table, which the graph `sampler` reads.
#pragma once

#include <array>
#include <string>
#include <vector>

namespace sana {

/// One step.
struct Step {
    /// The denoiser's timestep, before `timestep_scale`.
    float timestep;
    /// The sampler's input: factors on latents and guided noise_pred (for x0), then on latents, x0, three earlier x0, and noise.
    std::array<float, 8> coefficients;
};

/// The schedule of `steps` steps of the scheduler that the manifest has in `model.scheduler`, given as JSON.
///
/// Throws BundleError, naming what is not supported, for any but DPMSolverMultistepScheduler of order 1 or 2 for flows.
std::vector<Step> make_schedule(const std::string& scheduler_json, int steps);

}  // namespace sana
